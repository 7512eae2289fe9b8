"""The mixture-of-experts layer for training under ZeRO-3: fp32 routing, experts fused into a few large parameters."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
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


class _AddGradient(torch.autograd.Function):
    """Passes ``x`` on and gives ``loss`` the gradient 1: its value is not reported."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return gradient, torch.ones((), dtype=torch.float32, device=gradient.device)


class Router(KeepsFloat32Buffers, native.DeepseekV3TopkRouter):
    """DeepSeek-V3's router: sigmoid scores in fp32, group-limited top-k chosen with the correction bias.

    As in DeepSeek's inference code, experts of the groups left out can never win (-inf; transformers uses 0, which a
    negative biased score would lose to), and the scaling factor applies whether or not weights are normalised.
    """

    auxiliary: AuxiliaryLoss | None = None

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

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """hidden [rows, length, size] → experts and fp32 weights, both [tokens, top_k], and the balance loss."""
        rows, length, size = hidden.shape
        with torch.autocast(device_type=hidden.device.type, enabled=False):
            scores = F.linear(hidden.reshape(-1, size).float(), self.weight.float()).sigmoid()
        experts = self.choose(scores)
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


class ExpertShard(nn.Module):
    """``count`` experts in two parameters: w1w3 [count, 2·ffn, hidden] (gate, then up) and w2 [count, hidden, ffn]."""

    def __init__(self, config: Any, count: int):
        super().__init__()
        hidden, ffn = config.hidden_size, config.moe_intermediate_size
        self.w1w3 = nn.Parameter(torch.empty(count, 2 * ffn, hidden))
        self.w2 = nn.Parameter(torch.empty(count, hidden, ffn))

    def forward(self, hidden: torch.Tensor, counts: list[int]) -> torch.Tensor:
        """hidden [tokens of this shard sorted by expert, size] → the same shape; ``counts``: tokens per expert."""
        outputs = []
        for tokens, w1w3, w2 in zip(hidden.split(counts), self.w1w3.unbind(), self.w2.unbind(), strict=True):
            gate, up = F.linear(tokens, w1w3).chunk(2, dim=-1)
            outputs.append(F.linear(F.silu(gate) * up, w2))
        return torch.cat(outputs)


class MixtureOfExperts(nn.Module):
    """Drop-in for transformers' DeepseekV3MoE.

    Every rank runs every shard, also with no token: under ZeRO-3 each shard's weights are gathered by a collective
    that all ranks must enter. A shard is what is gathered at once (8 experts of the 671B model: 0.7 GB in bf16; the
    whole layer: 22.5 GB).
    """

    def __init__(self, config: Any):
        super().__init__()
        self.experts_per_shard = config.experts_per_shard
        self.routed_experts = config.n_routed_experts
        shards = self.routed_experts // self.experts_per_shard
        self.experts = nn.ModuleList(ExpertShard(config, self.experts_per_shard) for _ in range(shards))
        self.gate = Router(config)
        self.shared_experts = native.DeepseekV3MLP(
            config, intermediate_size=config.moe_intermediate_size * config.n_shared_experts
        )

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        experts, weights, loss = self.gate(hidden_states)
        tokens = hidden_states.flatten(0, 1)
        order = experts.flatten().argsort(stable=True)
        token_of = order // experts.shape[1]
        counts = torch.bincount(experts.flatten(), minlength=self.routed_experts).tolist()
        n = self.experts_per_shard
        per_shard = [counts[start : start + n] for start in range(0, len(counts), n)]
        parts = tokens[token_of].split([sum(part) for part in per_shard])
        outputs = torch.cat([shard(x, c) for shard, x, c in zip(self.experts, parts, per_shard, strict=True)])
        weighted = outputs * weights.flatten()[order].unsqueeze(-1)  # fp32, as is the sum over a token's experts
        total = torch.zeros(tokens.shape, dtype=torch.float32, device=tokens.device)
        routed = total.index_add(0, token_of, weighted.float()).to(tokens.dtype).view_as(hidden_states)
        if loss is not None:
            routed = _AddGradient.apply(routed, loss)
        return routed + self.shared_experts(hidden_states)
