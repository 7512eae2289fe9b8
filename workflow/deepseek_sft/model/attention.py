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
    """

    sample_of: torch.Tensor
    boundaries: torch.Tensor
    longest: int

    @classmethod
    def of(cls, sample_of: torch.Tensor) -> "Packing":
        changes = torch.ones_like(sample_of, dtype=torch.bool)  # each row begins a sample
        changes[:, 1:] = sample_of[:, 1:] != sample_of[:, :-1]
        starts = changes.flatten().nonzero().flatten()
        end = torch.tensor([sample_of.numel()], device=sample_of.device)
        boundaries = torch.cat([starts, end]).to(torch.int32)
        return cls(sample_of, boundaries, int(boundaries.diff().max()))


@sequence_parallel_wrapper
def _sdpa(query, key, value, scaling: float, packing: Packing | None):
    """[rows, length, heads, size] each; the value's size may differ."""
    mask = None
    if packing is not None:
        same = packing.sample_of[:, None, :, None] == packing.sample_of[:, None, None, :]
        mask = same.tril()
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling)
    return output.transpose(1, 2)


@sequence_parallel_wrapper
def _flash(query, key, value, scaling: float, packing: Packing | None):
    """The same with flash-attn 2, which wants one head size: the value is padded with zeros."""
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    size = value.shape[-1]
    value = F.pad(value, (0, query.shape[-1] - size))
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
