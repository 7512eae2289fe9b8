"""The mixture-of-experts layer for training under ZeRO-3: experts fused into a few large parameters, sums in fp32."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as native

from .expert_parallel import Exchange, ExchangedProducts, ExpertParallel
from .expert_products import Counts, ExpertProducts, counts_of_shards, inverse
from .node_exchange import ProductsOverNodes, TokenExchange
from .router import AddGradient, Router

ROWS_AT_ONCE = 2048  # tokens summed in fp32 at once


class ExpertShard(nn.Module):
    """``count`` experts in two parameters: w1w3 [count, 2·ffn, hidden] (gate, then up) and w2 [count, hidden, ffn]."""

    def __init__(self, config: Any, count: int, parallel: ExpertParallel | None):
        super().__init__()
        hidden, ffn = config.hidden_size, config.moe_intermediate_size
        self.w1w3 = nn.Parameter(torch.empty(count, 2 * ffn, hidden))
        self.w2 = nn.Parameter(torch.empty(count, hidden, ffn))
        if parallel is not None:  # before zero.Init, which comes after this constructor, splits them
            for parameter in (self.w1w3, self.w2):
                parallel.place(parameter)

    def forward(self, hidden: torch.Tensor, work: Counts | Exchange | TokenExchange, *more: Any) -> torch.Tensor:
        """hidden [rows of this shard sorted by expert, size] → the same shape.

        Args:
            work: rows of each expert; or how they travel to the ranks that hold such a shard, rows of all of which
                ``hidden`` then has, sorted by (rank, expert); or how tokens do over nodes: ``hidden`` are all tokens
                then, and the result their experts' sums.
            more: over nodes, fp32 weights [tokens, top_k], and the result where it is known.
        """
        if isinstance(work, TokenExchange):
            weights, known = more
            sums = ProductsOverNodes.apply(hidden, weights, self.w1w3, self.w2, work, known)
            return work.meanwhile.sends_first(sums, hidden, work)
        if isinstance(work, Exchange):
            outputs = ExchangedProducts.apply(hidden, self.w1w3, self.w2, work)
            return work.meanwhile.sends_first(outputs, hidden, work)
        return ExpertProducts.apply(hidden, self.w1w3, self.w2, work)


def _token_ranges(tokens: int) -> Iterator[slice]:
    return (slice(start, start + ROWS_AT_ONCE) for start in range(0, tokens, ROWS_AT_ONCE))


class _Dispatch(torch.autograd.Function):
    """Each token's row once for each of its experts, in the order of the experts.

    The gradients of a token's rows are added up in fp32 in a fixed order (``index_add`` adds in any order on GPUs, and
    in bf16).
    """

    @staticmethod
    def forward(ctx: Any, tokens: torch.Tensor, token_of: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """tokens [n, size], token_of [n · top_k], places [n, top_k]: rows of each token in the result."""
        ctx.save_for_backward(places)
        return tokens[token_of]

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (places,) = ctx.saved_tensors
        total = gradient.new_empty(places.shape[0], gradient.shape[1])
        for part in _token_ranges(len(places)):
            summed = gradient[places[part, 0]].float()
            for column in range(1, places.shape[1]):
                summed += gradient[places[part, column]]
            total[part] = summed
        return total, None, None


class _Combine(torch.autograd.Function):
    """Weighted sum of the outputs of each token's experts, in fp32 and in a fixed order, a few tokens at a time."""

    @staticmethod
    def forward(ctx: Any, outputs: torch.Tensor, weights: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """outputs [n · top_k, size], fp32 weights [n, top_k], places [n, top_k] → [n, size] in the outputs' dtype."""
        ctx.save_for_backward(outputs, weights, places)
        total = outputs.new_empty(places.shape[0], outputs.shape[1])
        for part in _token_ranges(len(places)):
            summed = outputs[places[part, 0]].float().mul_(weights[part, :1])
            for column in range(1, places.shape[1]):
                summed += outputs[places[part, column]].float().mul_(weights[part, column, None])
            total[part] = summed
        return total

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        outputs, weights, places = ctx.saved_tensors
        outputs_gradient, weights_gradient = torch.empty_like(outputs), torch.empty_like(weights)
        for part in _token_ranges(len(places)):
            of_token = gradient[part].float()
            for column in range(places.shape[1]):
                rows = places[part, column]
                outputs_gradient[rows] = (of_token * weights[part, column, None]).to(outputs.dtype)
                weights_gradient[part, column] = torch.linalg.vecdot(of_token, outputs[rows].float())
        return outputs_gradient, weights_gradient, None


@dataclass(frozen=True)
class Kept:
    """What a layer's forward pass found: how its tokens travel, and what came of it."""

    exchange: TokenExchange
    result: torch.Tensor | None


class KeptExperts:
    """Of one layer: what its newest forward pass without gradient found, until it is recomputed."""

    def __init__(self) -> None:
        self._kept: Kept | None = None

    def put(self, found: Kept) -> None:
        if not torch.is_grad_enabled():
            self._kept = found

    def take(self) -> Kept | None:
        """In a pass with gradients what was kept, which is then gone; None in others."""
        if not torch.is_grad_enabled():
            return None
        kept, self._kept = self._kept, None
        return kept


class MixtureOfExperts(nn.Module):
    """Drop-in for transformers' DeepseekV3MoE.

    Every rank runs every shard that it holds, also with no token: under ZeRO-3 each shard's weights are gathered by a
    collective that all ranks which hold it must enter. A shard is what is gathered at once (8 experts of the 671B
    model: 0.7 GB in bf16; the whole layer: 22.5 GB). With expert parallelism a rank holds some of the shards, named by
    their numbers among all, and rows travel to them.
    """

    def __init__(self, config: Any, parallel: ExpertParallel | None = None):
        super().__init__()
        self.parallel = parallel
        self.experts_per_shard = config.experts_per_shard
        self.routed_experts, self.grouped = config.n_routed_experts, config.grouped_products
        shards = own = range(self.routed_experts // self.experts_per_shard)
        if parallel is not None:
            each = len(shards) // parallel.size
            own = shards[parallel.rank * each : (parallel.rank + 1) * each]
        self.experts = nn.ModuleDict(
            {str(shard): ExpertShard(config, self.experts_per_shard, parallel) for shard in own}
        )
        self._order: torch.Tensor | None = None
        self.kept: KeptExperts | None = None  # set where a recomputed layer takes over what its experts gave
        self.gate = Router(config)
        self.shared_experts = native.DeepseekV3MLP(
            config, intermediate_size=config.moe_intermediate_size * config.n_shared_experts
        )

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        kept = self.kept.take() if self.kept is not None else None
        experts, weights, loss = self.gate(hidden_states, kept.exchange.experts if kept else None)
        tokens = hidden_states.flatten(0, 1)
        shared = functools.partial(self.shared_experts, hidden_states)
        if self.parallel is not None and self.parallel.nodes is not None:
            routed, alike = self._over_nodes(tokens, experts, weights, kept, shared)
        else:
            routed, alike = self._by_rows(tokens, experts, weights, shared)
        routed = routed.view_as(hidden_states)
        if loss is not None:
            routed = AddGradient.apply(routed, loss)
        return routed + alike

    def _over_nodes(
        self,
        tokens: torch.Tensor,
        experts: torch.Tensor,
        weights: torch.Tensor,
        kept: "Kept | None",
        shared: Callable[[], torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Each token once to each node of its experts; the shared experts are computed while rows travel, both ways."""
        if kept is None:
            kept = Kept(
                TokenExchange(self.parallel, experts, self.routed_experts, self.parallel.chunk_rows, self.grouped), None
            )
        kept.exchange.meanwhile.give(shared)
        (shard,) = self.experts.values()
        routed = shard(tokens, kept.exchange, weights, kept.result)
        if self.kept is not None and self.training:
            self.kept.put(Kept(kept.exchange, routed))
        return routed, kept.exchange.meanwhile.result()

    def _by_rows(
        self, tokens: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor, shared: Callable[[], torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A row for each token and expert: to the experts of this rank, or of this group of ranks.

        Where rows travel the shared experts are computed meanwhile, both ways, else last; gradients are added up in the
        same order either way.
        """
        slots = experts.flatten()
        if self.parallel is not None:
            slots = self._sorted_by(slots.device)[slots]
        order = slots.argsort(stable=True)
        places = inverse(order, len(order)).view_as(experts)
        counted = torch.bincount(slots, minlength=self.routed_experts)
        rows = _Dispatch.apply(tokens, order // experts.shape[1], places)
        if self.parallel is None:
            per_shard = counts_of_shards(counted, self.experts_per_shard, self.grouped)
            sizes = [sum(counts.rows) for counts in per_shard]
        else:
            per_shard = self.parallel.exchanges(counted, self.experts_per_shard, self.grouped)
            sizes = [exchange.rows for exchange in per_shard]
            per_shard[0].meanwhile.give(shared)
        shards = zip(self.experts.values(), rows.split(sizes), per_shard, strict=True)
        outputs = torch.cat([shard(part, work) for shard, part, work in shards])
        routed = _Combine.apply(outputs, weights, places)
        return routed, shared() if self.parallel is None else per_shard[0].meanwhile.result()

    def _sorted_by(self, device: torch.device) -> torch.Tensor:
        """Place of each expert in the order in which rows travel; kept on the device."""
        if self._order is None or self._order.device != device:
            self._order = self.parallel.sorted_by(self.routed_experts, self.experts_per_shard).to(device)
        return self._order
