"""What attention's kernel gave in the forward pass, kept so that activation checkpointing need not compute it again.

A recomputed layer needs its projections again, but of attention only what its kernel returned: output and logarithms of
the sums, from which the backward pass goes on. Both are kept where torch's fused kernels gave them, by torch's own
selective checkpointing, here around the kernel alone: the layer's checkpoint stays the one that lets go of what ZeRO-3
has gathered.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

# Fused kernels of torch 2.13, as their operators are called; others are computed again.
KERNELS = frozenset(
    {
        "aten::_scaled_dot_product_cudnn_attention",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "torch_attn::_varlen_attn",
    }
)


class KeptAttention:
    """Of one layer: what its kernel gave in the newest forward pass without gradient, until it is recomputed."""

    def __init__(self) -> None:
        self._recomputation: AbstractContextManager[Any] | None = None

    def __call__(self, kernel: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> torch.Tensor:
        """``kernel(*tensors)``: computed and kept without gradients, taken from what was kept with them.

        Args:
            tensors: the same values in both passes, as activation checkpointing sees to.
        """
        if torch.is_grad_enabled():
            recomputation, self._recomputation = self._recomputation, None
            if recomputation is None:
                return kernel(*tensors)
            with recomputation:
                return kernel(*tensors)
        forward, self._recomputation = create_selective_checkpoint_contexts(_policy)
        # With gradients, or the kernel would not give what only its backward pass needs, or another one be chosen.
        with torch.enable_grad(), forward:
            output = kernel(*(tensor.detach().requires_grad_() for tensor in tensors))
        return output.detach()


def _policy(context: Any, operator: Any, *arguments: Any, **named: Any) -> CheckpointPolicy:
    kept = operator.name().split(".")[0] in KERNELS
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
