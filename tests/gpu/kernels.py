"""Attention of MLA (query and key 192, value 128) by kernel: which takes it, how far off, how long."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from check import Place, Row
from measuring import error, milliseconds
from torch.nn.attention import SDPBackend, sdpa_kernel

from deepseek_sft.model.kept_attention import KeptAttention

BOUND = 2e-2  # bf16
KERNELS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
QUERY, VALUE = 192, 128


def with_gradients(call: Callable[..., torch.Tensor], tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Output and the three gradients."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    output = call(*leaves)
    output.float().square().sum().backward()
    return [output.detach(), *(leaf.grad for leaf in leaves)]


def reference(tensors: list[torch.Tensor], scale: float) -> list[torch.Tensor]:
    """The same in fp32, written out."""

    def call(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        scores = query @ key.transpose(-1, -2) * scale
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        return scores.masked_fill(hidden, float("-inf")).softmax(-1) @ value

    return with_gradients(call, [tensor.float() for tensor in tensors])


def flash_of(tensors: list[torch.Tensor], scale: float) -> list[torch.Tensor] | None:
    """The same by torch's flash kernel with the value padded; None where it takes it not."""

    def call(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        full = F.pad(value, (0, QUERY - VALUE))
        return F.scaled_dot_product_attention(query, key, full, is_causal=True, scale=scale)[..., :VALUE]

    try:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return with_gradients(call, tensors)
    except RuntimeError:
        return None


def one(place: Place, name: str, call: Callable[..., torch.Tensor], tensors, wanted) -> Row:
    try:
        found = with_gradients(call, tensors)
    except RuntimeError as caught:
        return Row(name, None, {"takes it": "no", "why": str(caught).strip().splitlines()[0][:120]})
    apart = max(error(mine, theirs) for mine, theirs in zip(found, wanted, strict=True)) if wanted else None
    figures = {"takes it": "yes"} | ({"error": apart} if wanted else {})
    figures["ms"] = milliseconds(place.device, lambda: with_gradients(call, tensors), 3)
    return Row(name, None if apart is None else apart < BOUND, figures)


def kept(name: str, call: Callable[..., torch.Tensor], tensors: list[torch.Tensor]) -> Row:
    """A kernel that is not computed again in the recomputation: its output must be the one of the forward pass."""
    keeping = KeptAttention()
    try:
        wanted = with_gradients(call, tensors)
        with torch.no_grad():
            first = keeping(call, *tensors)
        found = with_gradients(lambda *leaves: keeping(call, *leaves), tensors)
    except RuntimeError as caught:
        return Row(name, None, {"takes it": "no", "why": str(caught).strip().splitlines()[0][:120]})
    same = torch.equal(first, found[0]) and torch.equal(first, wanted[0])
    apart = max(error(mine, theirs) for mine, theirs in zip(found, wanted, strict=True))
    return Row(name, same and apart < BOUND, {"same output": same, "error of gradients": apart})


def rows(place: Place) -> list[Row]:
    rows_, heads = place.sizes((1, 32), (1, 2))
    scale, found = QUERY**-0.5, []
    for length in place.sizes((1024, 32768), (48,)):
        generator = torch.Generator(place.device).manual_seed(0)
        sizes = (QUERY, QUERY, VALUE)
        made = [
            torch.randn(rows_, heads, length, size, generator=generator, device=place.device).bfloat16()
            for size in sizes
        ]
        # Written-out scores of the longest rows do not fit: there kernels are compared with one that is judged before.
        wanted = reference(made, scale) if length <= 2048 else flash_of(made, scale)
        for kernel, backend in KERNELS.items():
            if kernel == "math" and length > 2048:
                continue

            def padded(query, key, value, backend=backend):
                with sdpa_kernel(backend):
                    full = F.pad(value, (0, QUERY - VALUE))
                    return F.scaled_dot_product_attention(query, key, full, is_causal=True, scale=scale)[..., :VALUE]

            def plain(query, key, value, backend=backend):
                with sdpa_kernel(backend):
                    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)

            found.append(one(place, f"{length} tokens, {kernel}, 192/128", plain, made, wanted))
            if length <= 2048:
                found.append(kept(f"{length} tokens, {kernel}, padded, kept", padded, made))
                found.append(kept(f"{length} tokens, {kernel}, 192/128, kept", plain, made))
            found.append(one(place, f"{length} tokens, {kernel}, value padded", padded, made, wanted))
        found += variable_length(place, made, wanted, scale, length)
    fits = [row for row in found if row.passed]
    return [*found, Row("a kernel takes MLA's heads", bool(fits), {"kernels": len(fits)})]


def variable_length(place: Place, made, wanted, scale: float, length: int) -> list[Row]:
    """torch's attention over packed rows, value padded; here one sample is the whole row."""
    name = f"{length} tokens, varlen_attn, value padded"
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return [Row(name, None, {"takes it": "no", "why": "this torch has no variable-length attention"})]
    ends = torch.tensor([0, length], dtype=torch.int32, device=place.device)

    def call(query, key, value):
        full = F.pad(value, (0, QUERY - VALUE))
        laid = [tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, full)]
        try:
            output = varlen_attn(*laid, ends, ends, length, length, scale=scale, window_size=(-1, 0))
        except TypeError:  # torch 2.11
            output = varlen_attn(*laid, ends, ends, length, length, is_causal=True, scale=scale)
        return output.transpose(0, 1)[None, ..., :VALUE]

    try:
        return [one(place, name, call, made, wanted)]
    except (TypeError, NotImplementedError) as caught:
        return [Row(name, None, {"takes it": "no", "why": str(caught).strip().splitlines()[0][:120]})]
