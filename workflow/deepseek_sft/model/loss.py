"""Cross-entropy of the output layer without ever holding all logits."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

MAX_LOGITS = {"cuda": 1 << 27, "cpu": 1 << 23}  # elements held at once: 0.5 GiB in fp32; on CPU, what caches hold


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of the cross-entropy over tokens; gradients are computed on the way forward, chunk by chunk.

    So the weights, gathered by ZeRO-3 for the forward pass, are not needed again, and logits live for one chunk.
    The softmax is fp32; the matrix products have the dtype of the weights.
    """

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        rows = max(1, MAX_LOGITS[hidden.device.type] // weight.shape[0])
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        hidden_gradient = torch.empty_like(hidden)
        # Summed in fp32 over the chunks: bf16 sums would lose what later chunks add.
        weight_gradient = torch.zeros_like(weight, dtype=torch.float32)
        for start in range(0, hidden.shape[0], rows):
            part, target = hidden[start : start + rows], labels[start : start + rows]
            logarithms = torch.log_softmax(part @ weight.T, dim=-1, dtype=torch.float32)
            total -= logarithms.gather(1, target[:, None]).sum()
            gradient = logarithms.exp_()  # softmax, in place
            gradient.scatter_add_(1, target[:, None], torch.full_like(target[:, None], -1, dtype=gradient.dtype))
            gradient = gradient.to(weight.dtype)
            hidden_gradient[start : start + rows] = gradient @ weight
            weight_gradient += gradient.T @ part
        ctx.save_for_backward(hidden_gradient, weight_gradient)
        ctx.dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        hidden_gradient, weight_gradient = ctx.saved_tensors
        return hidden_gradient.mul_(gradient), weight_gradient.mul_(gradient).to(ctx.dtype), None


@torch.no_grad()
def token_losses(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """hidden [tokens, size], labels [tokens] → cross-entropy of each, fp32 [tokens], computed as in training."""
    rows = max(1, MAX_LOGITS[hidden.device.type] // weight.shape[0])
    losses = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
    for start in range(0, hidden.shape[0], rows):
        part, target = hidden[start : start + rows], labels[start : start + rows]
        logarithms = torch.log_softmax(part @ weight.T, dim=-1, dtype=torch.float32)
        losses[start : start + rows] = -logarithms.gather(1, target[:, None])[:, 0]
    return losses


class OutputLayer(nn.Linear):
    """``lm_head`` that can also return the loss of given tokens, summed or of each."""

    def forward(self, hidden: torch.Tensor, labels: torch.Tensor | None = None, summed: bool = True) -> torch.Tensor:
        """hidden [tokens, size], labels [tokens] → sum of their cross-entropy, fp32; without labels: logits.

        Not ``summed``: the cross-entropy of each, fp32 [tokens], without gradient.

        With no tokens the loss is 0 and its gradients are zeros: the layer must be called all the same, since its
        weights are gathered by all ranks together.
        """
        if labels is None:
            return F.linear(hidden, self.weight)
        if not summed:
            return token_losses(hidden, self.weight, labels)
        return _ChunkedCrossEntropy.apply(hidden, self.weight, labels)
