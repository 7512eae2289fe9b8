"""Causal attention over sequences split across a sequence-parallel group, as transformers attention functions.

Ulysses: an all-to-all turns each rank's part of the sequence with all heads into the whole sequence with a part of the
heads; attention runs there, a second all-to-all turns the result back. Rows are padded on the right, and no real
position attends to what is right of it, so padding needs no mask.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from xtuner.parallel.sequence import sequence_parallel_wrapper

SDPA, FLASH = "sequence_parallel_sdpa", "sequence_parallel_flash"


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


@sequence_parallel_wrapper
def _sdpa(query, key, value, scaling: float, packing: Packing | None):
    """[rows, length, heads, size] each; the value's size may differ.

    Packed samples are computed one by one: no mask of length × length, and nothing computed only to be masked. With
    one size torch takes its flash kernel on CPU, else it writes out all scores.
    """
    size = value.shape[-1]
    tensors = [tensor.transpose(1, 2) for tensor in _of_one_size(query, key, value)]
    if packing is None:
        return F.scaled_dot_product_attention(*tensors, is_causal=True, scale=scaling)[..., :size].transpose(1, 2)
    rows = []
    for row, lengths in enumerate(packing.lengths):
        samples = zip(*(tensor[row : row + 1].split(lengths, dim=2) for tensor in tensors), strict=True)
        outputs = [F.scaled_dot_product_attention(*sample, is_causal=True, scale=scaling) for sample in samples]
        rows.append(torch.cat(outputs, dim=2))
    return torch.cat(rows)[..., :size].transpose(1, 2)


@sequence_parallel_wrapper
def _flash(query, key, value, scaling: float, packing: Packing | None):
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
    function = _flash if module.config._attn_implementation == FLASH else _sdpa
    output = function(*(tensor.transpose(1, 2) for tensor in (query, key, value)), scaling=scaling, packing=packing)
    return output, None


def choose(requested: str, accelerator: str) -> str:
    """Name of the attention function for ``auto``, ``sdpa`` or ``flash``.

    Raises:
        ImportError: flash attention is asked for and flash-attn is not installed.
    """
    if requested == "auto":
        requested = "sdpa" if accelerator == "cpu" else "flash"
    if requested == "flash":
        import flash_attn  # noqa: F401
    return FLASH if requested == "flash" else SDPA


for _name in (SDPA, FLASH):
    AttentionInterface.register(_name, attention_forward)
    AttentionMaskInterface.register(_name, lambda *arguments, **options: None)
