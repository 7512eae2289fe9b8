"""Expert parallelism over nodes: a token travels once to each node that holds some of its experts, and is spread there.

A row goes over the network from its rank to the rank at the same place of the other node (its lane), with its experts
and their weights; the lane passes it on inside the node, gets the experts' outputs back, adds them up weighted, and
returns one row. Sums are in fp32 in a fixed order: a lane's over the token's experts, the token's own over nodes.
Group-limited routing bounds the nodes of a token.

As with ``expert_parallel`` everything is cut into chunks that bound what a rank receives, here blocks of tokens: all
ranks know how many rows every block of every rank sends, so that each computes all cuts, and no size is asked of the
device but once a layer.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from .expert_products import Counts, ParameterGradients, by_expert, inverse, products, products_backward
from .meanwhile import Meanwhile, Underway

BLOCKS = 16  # in which a rank's tokens are counted: the least that a chunk holds
ROWS_AT_ONCE = 2048  # tokens summed in fp32 at once
_MADE: dict[tuple[int, int], tuple[Any, Any]] = {}


@dataclass(frozen=True)
class Nodes:
    """An expert-parallel group that lies over several nodes, as one of its ranks sees it.

    Attributes:
        count: nodes of the group.
        ranks: of it on each.
        node, lane: this rank's node, and its place there.
        across: the ranks of the same lane, one a node.
        inside: the ranks of this node.
    """

    count: int
    ranks: int
    node: int
    lane: int
    across: Any
    inside: Any

    @classmethod
    def of(cls, size: int, ranks_per_node: int) -> "Nodes | None":
        """Make the groups of all ranks, or find those of an earlier call; None within one node. A collective."""
        if size <= ranks_per_node:
            return None
        count, rank = size // ranks_per_node, dist.get_rank()
        if (size, ranks_per_node) not in _MADE:
            across = inside = None
            for first in range(0, dist.get_world_size(), size):
                for node in range(first, first + size, ranks_per_node):
                    members = list(range(node, node + ranks_per_node))
                    group = dist.new_group(members)
                    inside = group if rank in members else inside
                for lane in range(first, first + ranks_per_node):
                    members = list(range(lane, first + size, ranks_per_node))
                    group = dist.new_group(members)
                    across = group if rank in members else across
            _MADE[size, ranks_per_node] = across, inside
        node, lane = divmod(rank % size, ranks_per_node)
        return cls(count, ranks_per_node, node, lane, *_MADE[size, ranks_per_node])


def gathered_sums(rows: torch.Tensor, places: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Sums of rows in fp32, in the order of the columns.

    Args:
        rows: [n, size].
        places: int64 [m, columns], which row; -1 for none.
        weights: fp32 [m, columns]; None for 1.

    Returns:
        [m, size] in the rows' dtype.
    """
    total = rows.new_zeros(len(places), rows.shape[1])
    if not len(rows):
        return total
    for start in range(0, len(places), ROWS_AT_ONCE):
        part = slice(start, start + ROWS_AT_ONCE)
        summed = torch.zeros(total[part].shape, dtype=torch.float32, device=rows.device)
        for column in range(places.shape[1]):
            place = places[part, column]
            values = rows[place.clamp(min=0)].float()
            if weights is not None:
                values *= weights[part, column, None]
            summed += torch.where(place[:, None] >= 0, values, 0.0)
        total[part] = summed
    return total


def _first(flags: torch.Tensor, count: int) -> torch.Tensor:
    """Places of the ``count`` true entries, in their order; the host need not ask how many there are."""
    return (~flags).to(torch.uint8).argsort(stable=True)[:count]


class TokenExchange:
    """How one layer's tokens travel, chunk by chunk; kept for the backward pass. A collective of the group.

    Args:
        parallel: the group; a rank holds ``held`` experts in one shard.
        experts: int64 [tokens, top_k] of this rank's tokens.
        total: routed experts.
        most: rows that a rank may receive in a chunk, of other nodes or for its experts.
        grouped: experts' products are one product of all.
    """

    def __init__(self, parallel: Any, experts: torch.Tensor, total: int, most: int, grouped: bool):
        self.group, self.nodes, self.grouped = parallel.group, parallel.nodes, grouped
        self.experts, device = experts, experts.device
        self.held = total // parallel.size
        nodes, own = self.nodes, parallel.rank
        tokens, self.top_k = experts.shape
        self._on_node = torch.zeros(tokens, nodes.count, dtype=torch.bool, device=device)
        self._on_node.scatter_(1, experts // (self.held * nodes.ranks), True)
        bounds = [tokens * block // BLOCKS for block in range(BLOCKS + 1)]
        sizes = torch.tensor(np.diff(bounds), device=device)
        block = torch.repeat_interleave(torch.arange(BLOCKS, device=device), sizes, output_size=tokens)
        rows = torch.bincount((block[:, None] * total + experts).flatten(), minlength=BLOCKS * total)
        visits = torch.zeros(BLOCKS, nodes.count, dtype=torch.int64, device=device)
        visits.index_add_(0, block, self._on_node.long())
        counted = torch.cat([rows.view(BLOCKS, total), visits], dim=1)
        gathered = counted.new_empty(parallel.size, *counted.shape)
        dist.all_gather_into_tensor(gathered.view(-1), counted.view(-1), group=self.group)
        everyone = gathered.cpu().numpy()  # the host waits for the device this once
        by_source = (nodes.count, nodes.ranks, BLOCKS)
        pairs = everyone[..., :total].reshape(*by_source, parallel.size, self.held)  # [node, lane, block, rank, expert]
        moved = everyone[..., total:].reshape(*by_source, nodes.count)  # [node, lane, block, to node]
        cuts = _cuts(pairs, moved, most)
        starts = cuts[:-1]
        pairs = np.add.reduceat(pairs, starts, axis=2)
        moved = np.add.reduceat(moved, starts, axis=2)
        self.chunks = len(starts)
        self._tokens = [bounds[cut] for cut in cuts]
        node, lane = nodes.node, nodes.lane
        self.sent = moved[node, lane].tolist()  # [chunk, to node]
        self.came = moved[:, lane, :, node].T.tolist()  # [chunk, from node]
        here = pairs[..., node * nodes.ranks : (node + 1) * nodes.ranks, :].sum(0)  # [lane, chunk, rank here, expert]
        self.spread = here[lane].sum(2).tolist()  # [chunk, to rank]
        self._arrivals = here[:, :, lane].transpose(1, 0, 2)  # [chunk, from lane, expert]
        self.received = self._arrivals.sum(2).tolist()
        self.rows = sum(map(sum, self.spread))
        self.meanwhile = Meanwhile()
        self.pairs_held = int(pairs[..., own, :].sum())

    @property
    def from_other_nodes(self) -> int:
        """Rows that this rank receives of other nodes for one pass."""
        return sum(count for chunk in self.came for node, count in enumerate(chunk) if node != self.nodes.node)

    def _move(self, rows: torch.Tensor, there: list[int], here: list[int], group: Any) -> torch.Tensor:
        """Rows to the ranks of a group, ``there`` to each, of which ``here`` come from each."""
        arrived, handle = self._start(rows, there, here, group)
        handle.wait()
        return arrived

    def _start(self, rows: torch.Tensor, there: list[int], here: list[int], group: Any) -> tuple[torch.Tensor, Any]:
        arrived = rows.new_empty(sum(here), *rows.shape[1:])
        return arrived, dist.all_to_all_single(arrived, rows.contiguous(), here, there, group=group, async_op=True)

    def to_nodes(self, chunk: int, rows: torch.Tensor) -> torch.Tensor:
        return self._move(rows, self.sent[chunk], self.came[chunk], self.nodes.across)

    def start(self, tokens: torch.Tensor, chunk: int, leaving: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """Begin to send a chunk's rows to their nodes, and to receive in this lane."""
        return self._start(tokens[leaving], self.sent[chunk], self.came[chunk], self.nodes.across)

    def start_back(
        self, tokens: torch.Tensor, gradient: torch.Tensor, chunk: int, leaving: torch.Tensor | None = None
    ) -> Underway:
        """Likewise for the backward pass: tokens, and the gradients of what came of them."""
        leaving = self.leaving(chunk)[0] if leaving is None else leaving
        return [self.start(tokens, chunk, leaving), self.start(gradient, chunk, leaving)]

    def from_nodes(self, chunk: int, rows: torch.Tensor) -> torch.Tensor:
        return self._move(rows, self.came[chunk], self.sent[chunk], self.nodes.across)

    def to_experts(self, chunk: int, rows: torch.Tensor) -> torch.Tensor:
        if self.nodes.ranks == 1:
            return rows
        return self._move(rows, self.spread[chunk], self.received[chunk], self.nodes.inside)

    def from_experts(self, chunk: int, rows: torch.Tensor) -> torch.Tensor:
        if self.nodes.ranks == 1:
            return rows
        return self._move(rows, self.received[chunk], self.spread[chunk], self.nodes.inside)

    def leaving(self, chunk: int) -> tuple[torch.Tensor, torch.Tensor, slice]:
        """Tokens that leave, by node; where among them the chunk's stand, [tokens, nodes]; the chunk's tokens."""
        part = slice(self._tokens[chunk], self._tokens[chunk + 1])
        flags = self._on_node[part].T.flatten()
        size = part.stop - part.start
        places = _first(flags, sum(self.sent[chunk]))
        back = inverse(places, len(flags)).view(self.nodes.count, size).T
        return places % max(size, 1) + part.start, back, part

    def spreading(self, chunk: int, experts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Pairs of arrived row and expert, by (rank, expert), as places in ``experts`` [rows, top_k], and back."""
        local = experts - self.nodes.node * self.held * self.nodes.ranks
        last = self.held * self.nodes.ranks
        local = torch.where((local >= 0) & (local < last), local, last).flatten()
        pairs = local.argsort(stable=True)[: sum(self.spread[chunk])]
        return pairs, inverse(pairs, len(local)).view(experts.shape)

    def order(self, chunk: int) -> tuple[torch.Tensor, torch.Tensor, Counts]:
        """Which row of (lane, expert) stands where in (expert, lane), and back; rows of each expert."""
        arrivals = self._arrivals[chunk]
        sizes = torch.from_numpy(np.ascontiguousarray(arrivals)).to(self.experts.device, non_blocking=True)
        ends = sizes.sum(0).cumsum(0, dtype=torch.int32) if self.grouped else None
        return *by_expert(sizes, int(arrivals.sum())), Counts(arrivals.sum(0).tolist(), ends)


def _cuts(pairs: np.ndarray, moved: np.ndarray, most: int) -> np.ndarray:
    """Blocks at which chunks begin, and the end: as many blocks as keep what every rank receives within ``most``.

    Args:
        pairs: [node, lane, block, rank, expert of the rank], rows for each expert.
        moved: [node, lane, block, to node], rows that travel.
    """
    for_experts = pairs.sum((0, 1, 4))  # [block, rank]
    for_lanes = moved.sum(0).transpose(1, 0, 2).reshape(moved.shape[2], -1)  # [block, lane and node]
    load = np.concatenate([for_experts, for_lanes], axis=1)
    cuts, held = [0], np.zeros(load.shape[1], np.int64)
    for block, more in enumerate(load):
        if block > cuts[-1] and (held + more).max() > most:
            cuts.append(block)
            held = np.zeros_like(held)
        held = held + more
    return np.array([*cuts, len(load)])


class ProductsOverNodes(torch.autograd.Function):
    """The routed experts' weighted sum for each token, its rows exchanged over nodes; a collective, both ways.

    Kept for the backward pass are this rank's own tokens, weights and the parameters themselves.
    """

    @staticmethod
    def forward(
        ctx: Any,
        tokens: torch.Tensor,
        weights: torch.Tensor,
        w1w3: torch.Tensor,
        w2: torch.Tensor,
        exchange: TokenExchange,
        known: torch.Tensor | None,
    ) -> torch.Tensor:
        """tokens [n, hidden], fp32 weights [n, top_k] → [n, hidden].

        Args:
            known: the result, where the layer is recomputed and it was kept: nothing is exchanged then.
        """
        ctx.save_for_backward(tokens, weights, w1w3, w2)
        ctx.exchange = exchange
        if known is not None:
            exchange.meanwhile.compute()
            return known.view_as(known)
        result = torch.empty_like(tokens)
        for chunk in range(exchange.chunks):
            leaving, back, part = exchange.leaving(chunk)
            arrived, handle = exchange.start(tokens, chunk, leaving)
            exchange.meanwhile.compute()
            experts, of_lane = _with_experts(exchange, chunk, leaving, weights)
            handle.wait()
            pairs, places = exchange.spreading(chunk, experts)
            order, unsorted, counts = exchange.order(chunk)
            rows = exchange.to_experts(chunk, arrived[pairs // exchange.top_k])
            done, _ = products(rows[order], w1w3, w2, counts)
            returned = exchange.from_experts(chunk, done[unsorted])
            summed = gathered_sums(returned, places, of_lane)
            result[part] = gathered_sums(exchange.from_nodes(chunk, summed), back)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        tokens, weights, w1w3, w2 = ctx.saved_tensors
        exchange, gradient = ctx.exchange, gradient.contiguous()
        tokens_gradient, weights_gradient = torch.empty_like(tokens), torch.empty_like(weights)
        parameters = ParameterGradients(exchange.chunks)
        for chunk in range(exchange.chunks):
            leaving, back, part = exchange.leaving(chunk)
            underway = exchange.meanwhile.taken() or exchange.start_back(tokens, gradient, chunk, leaving)
            (arrived, first), (arrived_gradient, second) = underway
            del underway
            experts, of_lane = _with_experts(exchange, chunk, leaving, weights)
            first.wait()
            second.wait()
            pairs, places = exchange.spreading(chunk, experts)
            order, unsorted, counts = exchange.order(chunk)
            rows_of_pairs = pairs // exchange.top_k
            rows = exchange.to_experts(chunk, arrived[rows_of_pairs])[order]
            rows_gradient = exchange.to_experts(chunk, arrived_gradient[rows_of_pairs])[order]
            of_rows = exchange.to_experts(chunk, of_lane.flatten()[pairs])[order]
            del arrived, arrived_gradient
            _, gate_up = products(rows, w1w3, w2, counts, outputs=False)
            found = products_backward(rows, gate_up, w1w3, w2, rows_gradient, counts, of_rows)
            del rows, rows_gradient, gate_up
            summed = gathered_sums(exchange.from_experts(chunk, found.rows[unsorted]), places)
            of_pairs = exchange.from_experts(chunk, found.of_rows[unsorted])
            of_experts = torch.where(places >= 0, of_pairs[places.clamp(min=0)], 0.0) if len(of_pairs) else of_lane * 0
            tokens_gradient[part] = gathered_sums(exchange.from_nodes(chunk, summed), back)
            weights_gradient[part] = gathered_sums(exchange.from_nodes(chunk, of_experts), back)
            parameters.add(found)
            del found
        return tokens_gradient, weights_gradient, *parameters.of(w1w3, w2), None, None


def _with_experts(
    exchange: TokenExchange, chunk: int, leaving: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Experts and weights [rows, top_k] of the rows that arrive in this lane, sent as one tensor of 4-byte words."""
    both = torch.cat([exchange.experts[leaving].int(), weights[leaving].view(torch.int32)], dim=1)
    experts, of_lane = exchange.to_nodes(chunk, both).chunk(2, dim=1)
    return experts.long(), of_lane.contiguous().view(torch.float32)
