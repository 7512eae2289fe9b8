"""Causal attention over sequences split across a sequence-parallel group, as transformers attention functions.

Ulysses: an all-to-all turns each rank's part of the sequence with all heads into the whole sequence with a part of the
heads; attention runs there, a second all-to-all turns the result back. Rows are padded on the right, and no real
position attends to what is right of it, so padding needs no mask.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AttentionMaskInterface
from xtuner.parallel.sequence import sequence_parallel_wrapper

from . import attention_choice
from .attention_choice import UNPADDED, VARLEN, Device
from .kept_attention import KeptAttention

AUTO, SDPA, FLASH = "sequence_parallel_auto", "sequence_parallel_sdpa", "sequence_parallel_flash"


@dataclass(frozen=True)
class Packing:
    """Where the samples of packed rows begin and end, over whole rows (not split across ranks).

    Attributes:
        sample_of: int32 [rows, length], index of each position's sample; equal within a sample, padding has its own.
        boundaries: int32 [samples + 1], starts of the samples in the rows laid end to end, and the end.
        longest: tokens of the longest sample.
        lengths: lengths of the samples of every row, padding included.
    """

    sample_of: torch.Tensor
    boundaries: torch.Tensor
    longest: int
    lengths: list[list[int]]

    @classmethod
    def of(cls, sample_of: torch.Tensor) -> "Packing":
        changes = torch.ones_like(sample_of, dtype=torch.bool)  # each row begins a sample
        changes[:, 1:] = sample_of[:, 1:] != sample_of[:, :-1]
        starts = changes.flatten().nonzero().flatten()
        end = torch.tensor([sample_of.numel()], device=sample_of.device)
        boundaries = torch.cat([starts, end]).to(torch.int32)
        sizes = iter(boundaries.diff().tolist())
        lengths = [[next(sizes) for _ in range(samples)] for samples in changes.sum(1).tolist()]
        return cls(sample_of, boundaries, max(map(max, lengths)), lengths)


def _of_one_size(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Pad the last dimension with zeros to the largest: scores stay as they are, outputs get zeros to cut off."""
    largest = max(tensor.shape[-1] for tensor in tensors)
    return [F.pad(t, (0, largest - t.shape[-1])) if t.shape[-1] < largest else t for t in tensors]


def device_at_hand(accelerator: str) -> Device:
    """What decides about attention's kernel here.

    cuDNN counts only where it computes MLA's sizes, forward and backward: a refusal shows at start, not in a step.
    """
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if accelerator == "cpu":
        return Device(None, (version[0], version[1]), None)
    device = Device(torch.cuda.get_device_capability(), (version[0], version[1]), torch.backends.cudnn.version())
    if attention_choice.cudnn_takes(device, attention_choice.CUDNN_SIZES) and not _cudnn_computes():
        return Device(device.capability, device.torch, None)
    return device


_device = functools.cache(device_at_hand)


def _cudnn_computes() -> bool:
    """Whether cuDNN takes a small causal product of MLA's sizes and its gradient."""
    query_size, value_size = attention_choice.CUDNN_SIZES
    tensors = [
        torch.randn(1, 128, 2, size, device="cuda", dtype=torch.bfloat16).transpose(1, 2).requires_grad_()
        for size in (query_size, query_size, value_size)
    ]
    try:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            F.scaled_dot_product_attention(*tensors, is_causal=True).sum().backward()
    except RuntimeError as error:
        print(f"attention: cuDNN does not take heads of {query_size} and {value_size}: {error}", flush=True)
        return False
    return True


def describe(requested: str, accelerator: str, sizes: tuple[int, int]) -> str:
    """Which kernels compute attention on this device: for rows of one sample, and for packed short and long ones."""
    device = _device(accelerator)
    kinds = {"one sample a row": (False, ()), "packed short": (True, (1,)), "packed long": (True, (1 << 20,))}
    chosen = {
        name: attention_choice.choose(requested, device, sizes, packed, lengths)
        for name, (packed, lengths) in kinds.items()
    }
    return "attention: " + "; ".join(f"{name}: {kernel}" for name, kernel in chosen.items())


@sequence_parallel_wrapper
def _on_gpu(query, key, value, scaling: float, packing: Packing | None, requested: str, kept: KeptAttention | None):
    """[rows, length, heads, size] each, by the kernel that is chosen for these rows."""
    function = functools.partial(_chosen, scaling=scaling, packing=packing, requested=requested)
    return kept(function, query, key, value) if kept else function(query, key, value)


def _chosen(query, key, value, scaling: float, packing: Packing | None, requested: str):
    lengths = [length for row in packing.lengths for length in row] if packing else []
    sizes = (query.shape[-1], value.shape[-1])
    kernel = attention_choice.choose(requested, _device(query.device.type), sizes, packing is not None, lengths)
    if query.dtype == torch.float32:
        kernel = attention_choice.PADDED  # neither cuDNN nor the variable-length kernel computes in float32
    if kernel == VARLEN and packing is not None:
        return varlen(query, key, value, scaling, packing)
    if kernel == UNPADDED:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):  # else torch may write out all scores without a word
            return by_sample(query, key, value, scaling, packing, padded=False)
    return by_sample(query, key, value, scaling, packing)


def varlen(query, key, value, scaling: float, packing: Packing):
    """Packed rows laid end to end, by torch's variable-length kernel, which wants one head size."""
    from torch.nn.attention.varlen import varlen_attn

    size, rows = value.shape[-1], query.shape[0]
    tensors = [tensor.flatten(0, 1) for tensor in _of_one_size(query, key, value)]
    ends, longest = packing.boundaries, packing.longest
    output = varlen_attn(*tensors, ends, ends, longest, longest, scale=scaling, window_size=(-1, 0))
    return output.unflatten(0, (rows, -1))[..., :size]


@sequence_parallel_wrapper
def _sdpa(query, key, value, scaling: float, packing: Packing | None, kept: KeptAttention | None):
    function = functools.partial(by_sample, scaling=scaling, packing=packing)
    return kept(function, query, key, value) if kept else function(query, key, value)


def by_sample(query, key, value, scaling: float, packing: Packing | None, padded: bool = True):
    """[rows, length, heads, size] each; the value's size may differ.

    Packed samples are computed one by one: no mask of length × length, and nothing computed only to be masked. With
    one size torch takes its flash kernel on CPU, else it writes out all scores.
    """
    size = value.shape[-1]
    tensors = [
        tensor.transpose(1, 2) for tensor in (_of_one_size(query, key, value) if padded else (query, key, value))
    ]
    if packing is None:
        return F.scaled_dot_product_attention(*tensors, is_causal=True, scale=scaling)[..., :size].transpose(1, 2)
    rows = []
    for row, lengths in enumerate(packing.lengths):
        samples = zip(*(tensor[row : row + 1].split(lengths, dim=2) for tensor in tensors), strict=True)
        outputs = [F.scaled_dot_product_attention(*sample, is_causal=True, scale=scaling) for sample in samples]
        rows.append(torch.cat(outputs, dim=2))
    return torch.cat(rows)[..., :size].transpose(1, 2)


@sequence_parallel_wrapper
def _flash(query, key, value, scaling: float, packing: Packing | None, kept: None):
    """The same with flash-attn 2, which wants one head size (MLA has 192 and 128)."""
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    size = value.shape[-1]
    query, key, value = _of_one_size(query, key, value)
    if packing is None:
        output = flash_attn_func(query, key, value, softmax_scale=scaling, causal=True)
    else:
        rows = query.shape[0]
        output = flash_attn_varlen_func(
            *(tensor.flatten(0, 1) for tensor in (query, key, value)),
            cu_seqlens_q=packing.boundaries,
            cu_seqlens_k=packing.boundaries,
            max_seqlen_q=packing.longest,
            max_seqlen_k=packing.longest,
            softmax_scale=scaling,
            causal=True,
        ).unflatten(0, (rows, -1))
    return output[..., :size]


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float,
    packing: Packing | None = None,
    **unused: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: [rows, heads, length / sp, size] in, [rows, length / sp, heads, size] out."""
    name = module.config._attn_implementation
    if query.is_cuda and name != FLASH:
        function = functools.partial(_on_gpu, requested="auto" if name == AUTO else "sdpa")
    else:
        function = _flash if name == FLASH else _sdpa
    kept = getattr(module, "kept_attention", None) if module.training else None
    turned = (tensor.transpose(1, 2) for tensor in (query, key, value))
    output = function(*turned, scaling=scaling, packing=packing, kept=kept)
    return output, None


def choose(requested: str, accelerator: str) -> str:
    """Name of the attention function for ``auto``, ``sdpa`` or ``flash``.

    Raises:
        ImportError: flash attention is asked for and flash-attn is not installed.
    """
    if requested == "auto":
        return SDPA if accelerator == "cpu" else AUTO
    if requested == "flash":
        import flash_attn  # noqa: F401
    return FLASH if requested == "flash" else SDPA


for _name in (AUTO, SDPA, FLASH):
    AttentionInterface.register(_name, attention_forward)
    AttentionMaskInterface.register(_name, lambda *arguments, **options: None)
