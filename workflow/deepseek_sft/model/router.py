"""DeepSeek-V3's router for training: scores in fp32, balance loss and balance bias exact however tokens are spread."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as native
from xtuner.parallel.sequence import get_sequence_parallel_group, get_sequence_parallel_world_size


class KeepsFloat32Buffers:
    """Mixin: buffers that are fp32 stay so when DeepSpeed casts the whole module to bf16."""

    def _apply(self, function, recurse: bool = True):
        before = {name: b for name, b in self._buffers.items() if b is not None and b.dtype == torch.float32}
        super()._apply(function, recurse)
        for name, buffer in before.items():
            if self._buffers[name].dtype != torch.float32:
                self._buffers[name] = buffer.to(self._buffers[name].device)
        return self


@dataclass(frozen=True)
class AuxiliaryLoss:
    """What the router needs for the sequence-wise balance loss of one micro batch.

    Attributes:
        weight: the loss's weight divided by the micro batches of the step.
        valid: bool [rows, length / sp], False on padding.
    """

    weight: float
    valid: torch.Tensor


class AddGradient(torch.autograd.Function):
    """Passes ``x`` on and gives ``loss`` the gradient 1: its value is not reported."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return gradient, torch.ones((), dtype=torch.float32, device=gradient.device)


class Unmoved(torch.autograd.Function):
    """Passes a parameter on and gives it a gradient of zeros, with which AdamW leaves it and its moments as they are.

    A parameter without any gradient would be missing in DeepSpeed's sums, and in checkpoints were it not trained.
    """

    @staticmethod
    def forward(ctx: Any, parameter: torch.Tensor) -> torch.Tensor:
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(gradient)


class Router(KeepsFloat32Buffers, native.DeepseekV3TopkRouter):
    """DeepSeek-V3's router: sigmoid scores in fp32, group-limited top-k chosen with the correction bias.

    As in DeepSeek's inference code, experts of the groups left out can never win (-inf; transformers uses 0, which a
    negative biased score would lose to), and the scaling factor applies whether or not weights are normalised.
    """

    frozen = False  # whether the weights stay as they are
    auxiliary: AuxiliaryLoss | None = None
    counted: torch.Tensor | None = None  # bool [rows, length / sp], positions whose experts are counted
    load: torch.Tensor | None = None  # int64 [experts], counts of the last forward pass

    @torch.no_grad()
    def choose(self, scores: torch.Tensor) -> torch.Tensor:
        """Indices [tokens, top_k] of the experts of each token; scores fp32 [tokens, experts]."""
        biased = scores + self.e_score_correction_bias
        grouped = biased.view(-1, self.n_group, self.n_routed_experts // self.n_group)
        group_scores = grouped.topk(2, dim=-1).values.sum(-1)
        best = group_scores.topk(self.topk_group, dim=-1, sorted=False).indices
        kept = torch.zeros_like(group_scores, dtype=torch.bool).scatter_(1, best, True)
        limited = grouped.masked_fill(~kept.unsqueeze(-1), float("-inf")).flatten(1)
        return limited.topk(self.top_k, dim=-1, sorted=False).indices

    def forward(
        self, hidden: torch.Tensor, chosen: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """hidden [rows, length, size] → experts and fp32 weights, both [tokens, top_k], and the balance loss.

        Args:
            chosen: the experts, where an earlier pass over the same tokens chose them.
        """
        rows, length, size = hidden.shape
        weight = Unmoved.apply(self.weight) if self.frozen else self.weight
        with torch.autocast(device_type=hidden.device.type, enabled=False):
            scores = F.linear(hidden.reshape(-1, size).float(), weight.float()).sigmoid()
        experts = self.choose(scores) if chosen is None else chosen
        if self.training and self.counted is not None:
            # Set anew, not added to: activation checkpointing runs this twice for a micro batch.
            self.load = torch.bincount(experts[self.counted.flatten()].flatten(), minlength=self.n_routed_experts)
        weights = scores.gather(1, experts)
        if self.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        weights = weights * self.routed_scaling_factor
        loss = None
        if self.training and self.auxiliary is not None:
            loss = self._balance(scores.view(rows, length, -1), experts.view(rows, length, -1), self.auxiliary)
        return experts, weights, loss

    def _balance(self, scores: torch.Tensor, experts: torch.Tensor, auxiliary: AuxiliaryLoss) -> torch.Tensor:
        """Equations 17 to 20 of the DeepSeek-V3 report, per row, over the row's real tokens on all its ranks.

        Each rank holds its own part of the sum over tokens; DeepSpeed's mean over ranks divides by the
        sequence-parallel size once too often, which the factor undoes.
        """
        ranks = get_sequence_parallel_world_size()
        valid = auxiliary.valid.float()
        load = torch.zeros(scores.shape[0], self.n_routed_experts, device=scores.device)
        load.scatter_add_(1, experts.flatten(1), valid.repeat_interleave(experts.shape[-1], dim=1))
        tokens = valid.sum(1, keepdim=True)
        if ranks > 1:
            together = torch.cat([load, tokens], dim=1)
            dist.all_reduce(together, group=get_sequence_parallel_group())
            load, tokens = together[:, :-1], together[:, -1:]
        tokens = tokens.clamp(min=1)
        frequency = load * self.n_routed_experts / (self.top_k * tokens)
        shares = scores / (scores.sum(-1, keepdim=True) + 1e-20)
        probability = (shares * valid.unsqueeze(-1)).sum(1) / tokens
        return (frequency * probability).sum(1).mean() * auxiliary.weight * ranks
