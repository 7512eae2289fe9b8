"""Expert parallelism: each rank of a group holds other experts, and rows travel to the ranks of their experts.

Groups are DeepSpeed's: consecutive ranks are one expert-parallel group, inside a node first; ranks of all groups that
hold the same experts share their parameters' partitions, which ZeRO-3 (DeepSpeed 0.19) takes from the parameter itself.

Which experts get how many rows decides how much a rank receives, and no row is dropped: so rows travel and are
multiplied in chunks of bounded size. All ranks of a group know all counts, so that each computes all cuts; chunks run
inside one call of a shard, and the calls of modules, which DeepSpeed traces, never depend on the data.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from ..expert_shards import CHUNK_ROWS
from .expert_products import Counts, ParameterGradients, by_expert, products, products_backward
from .meanwhile import Meanwhile, Underway
from .node_exchange import Nodes


@dataclass(frozen=True)
class ExpertParallel:
    """An expert-parallel group as one of its ranks sees it.

    Attributes:
        size: ranks of the group; each holds ``experts / size`` experts, the first rank the first ones.
        rank: of this process in it.
        group: the ranks among which rows travel.
        sharing: the ranks, one of each group, that hold the same experts, over which ZeRO-3 splits them.
        name: of both kinds of groups in DeepSpeed.
        nodes: where the group lies over several nodes, how; rows then travel as ``node_exchange`` says.
        chunk_rows: that a rank receives at once.
    """

    size: int
    rank: int
    group: Any
    sharing: Any
    name: str
    nodes: Nodes | None = None
    chunk_rows: int = CHUNK_ROWS

    @classmethod
    def of_size(cls, size: int, ranks_per_node: int, chunk_rows: int | None = None) -> "ExpertParallel | None":
        """Make the groups of all ranks, or find those of an earlier call; None for a size of 1. A collective."""
        if size == 1:
            return None
        from deepspeed.utils import groups

        name = f"ep_size_{size}"
        if name not in groups._get_expert_parallel_group_dict():
            groups._create_expert_and_data_parallel(size)
        return cls(
            size,
            groups._get_expert_parallel_rank(name),
            groups._get_expert_parallel_group(name),
            groups._get_expert_data_parallel_group(name),
            name,
            Nodes.of(size, ranks_per_node),
            chunk_rows or CHUNK_ROWS,
        )

    def place(self, parameter: torch.nn.Parameter) -> None:
        """Have ZeRO-3 split a parameter over the ranks that hold the same experts, and average it over all."""
        parameter.ds_zero_placement_family = "autoep_expert"  # type: ignore[attr-defined]
        parameter.ds_zero_partition_group_name = self.name  # type: ignore[attr-defined]
        parameter.ds_zero_partition_process_group = self.sharing  # type: ignore[attr-defined]

    def sorted_by(self, experts: int, experts_per_shard: int) -> torch.Tensor:
        """int64 [experts]: place of each expert in the order (shard on its rank, rank, expert in the shard)."""
        of_expert = torch.arange(experts).view(self.size, -1, experts_per_shard)
        order = of_expert.transpose(0, 1).flatten()
        return torch.empty_like(order).scatter_(0, order, torch.arange(experts))

    def exchanges(self, counted: torch.Tensor, experts_per_shard: int, grouped: bool) -> list["Exchange"]:
        """How the rows of each shard travel; the host waits for the device this once. A collective of the group.

        Args:
            counted: int64 [experts], this rank's rows of each expert, in the order of ``sorted_by``.
        """
        gathered = counted.new_empty(self.size, counted.numel())
        dist.all_gather_into_tensor(gathered.view(-1), counted.contiguous(), group=self.group)
        there = gathered.view(self.size, -1, self.size, experts_per_shard)
        counts = there.cpu().numpy()
        arriving = there[:, :, self.rank]
        return [
            Exchange(self, counts[:, shard], arriving[:, shard], self.chunk_rows, grouped)
            for shard in range(counts.shape[1])
        ]


class Exchange:
    """One shard's rows on their way to the ranks of its experts, chunk by chunk, and back.

    A receiving rank's rows stand in the order (expert, source); a chunk is a run of them, and so of each source's rows,
    which are sorted by (rank, expert).

    Args:
        counts: int64 [source, rank, expert of the shard], rows.
        arriving: int64 [source, expert] on the rows' device, those for this rank.
        most: that a rank receives in a chunk.
        grouped: experts' products are one product of all.
    """

    def __init__(
        self, parallel: ExpertParallel, counts: NDArray[np.int64], arriving: torch.Tensor, most: int, grouped: bool
    ):
        self.group, self.grouped, self._arriving = parallel.group, grouped, arriving
        own = parallel.rank
        of_ranks = counts.sum(2)  # [source, rank]
        longest = int(of_ranks.sum(0).max())
        self.chunks = max(1, -(-longest // most))
        self.rows = int(of_ranks[own].sum())
        self._orders: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.meanwhile = Meanwhile()
        if self.chunks == 1:
            self.sent: list[list[int]] = [of_ranks[own].tolist()]
            self.received: list[list[int]] = [of_ranks[:, own].tolist()]
            self._arrivals = counts[None, :, own]  # [chunk, source, expert]
            return
        queues = counts.transpose(1, 2, 0)  # [rank, expert, source]
        flat = queues.reshape(len(queues), -1)
        before = (flat.cumsum(1) - flat).reshape(queues.shape)
        cuts = -(-longest // self.chunks) * np.arange(self.chunks + 1)
        taken = np.minimum(np.maximum(cuts[:, None, None, None] - before, 0), queues)  # [cut, rank, expert, source]
        sends = taken[:, :, :, own].sum(2)  # [cut, rank], of this rank's rows to each
        self.sent = np.diff(sends, axis=0).tolist()
        self._starts: list[list[int]] = (of_ranks[own].cumsum() - of_ranks[own] + sends).tolist()
        self._arrivals = np.diff(taken[:, own], axis=0).transpose(0, 2, 1)
        self.received = self._arrivals.sum(2).tolist()

    def _arriving_in(self, chunk: int) -> torch.Tensor:
        """int64 [source, expert] on the device."""
        if self.chunks == 1:
            return self._arriving
        return torch.from_numpy(np.ascontiguousarray(self._arrivals[chunk])).to(self._arriving.device)

    def counts(self, chunk: int) -> Counts:
        """Rows of each expert that arrive in a chunk."""
        ends = self._arriving_in(chunk).sum(0).cumsum(0, dtype=torch.int32) if self.grouped else None
        return Counts(self._arrivals[chunk].sum(0).tolist(), ends)

    def start(self, rows: torch.Tensor, chunk: int) -> tuple[torch.Tensor, Any]:
        """Begin to send a chunk of this rank's rows [rows, size] and to receive others'; a collective of the group."""
        there = rows.new_empty(sum(self.received[chunk]), rows.shape[1])
        sent = rows
        if self.chunks > 1:
            places = zip(self._starts[chunk], self.sent[chunk], strict=True)
            sent = torch.cat([rows[start : start + count] for start, count in places])
        handle = dist.all_to_all_single(
            there, sent, self.received[chunk], self.sent[chunk], group=self.group, async_op=True
        )
        return there, handle

    def start_back(self, rows: torch.Tensor, gradient: torch.Tensor, chunk: int) -> Underway:
        """Likewise for the backward pass: rows, and the gradients of what came of them."""
        return [self.start(rows, chunk), self.start(gradient, chunk)]

    def give_back(self, rows: torch.Tensor, chunk: int, target: torch.Tensor) -> None:
        """Send what came of a chunk's rows to where they came from, and put it into ``target`` [rows, size]."""
        whole = self.chunks == 1
        here = target if whole else rows.new_empty(sum(self.sent[chunk]), rows.shape[1])
        dist.all_to_all_single(here, rows, self.sent[chunk], self.received[chunk], group=self.group)
        if whole:
            return
        first = 0
        for start, count in zip(self._starts[chunk], self.sent[chunk], strict=True):
            target[start : start + count] = here[first : first + count]
            first += count

    def order(self, chunk: int) -> tuple[torch.Tensor, torch.Tensor]:
        """int64: which arrived row, in the order (source, expert), stands where in (expert, source), and back."""
        if chunk not in self._orders:
            self._orders[chunk] = by_expert(self._arriving_in(chunk), sum(self.received[chunk]))
        return self._orders[chunk]


class ExchangedProducts(torch.autograd.Function):
    """``ExpertProducts`` of rows that travel to the ranks of their experts; a collective of the group, both ways.

    Kept for the backward pass are this rank's own rows and the parameters themselves: rows travel again there, and what
    a chunk needs is computed again, so that what is kept does not grow with what others send.
    """

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, w1w3: torch.Tensor, w2: torch.Tensor, exchange: Exchange) -> torch.Tensor:
        """rows [n, hidden] sorted by (rank, expert), w1w3 [experts, 2·ffn, hidden], w2 [experts, hidden, ffn]."""
        ctx.save_for_backward(rows, w1w3, w2)
        ctx.exchange = exchange
        outputs = torch.empty_like(rows)
        underway = exchange.start(rows, 0)
        exchange.meanwhile.compute()
        for chunk in range(exchange.chunks):
            (arrived, handle), last = underway, chunk + 1 == exchange.chunks
            handle.wait()
            if not last:  # the next chunk travels while this one is computed
                underway = exchange.start(rows, chunk + 1)
            order, places = exchange.order(chunk)
            done, _ = products(arrived[order], w1w3, w2, exchange.counts(chunk))
            exchange.give_back(done[places], chunk, outputs)
        return outputs

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
        rows, w1w3, w2 = ctx.saved_tensors
        exchange, gradient = ctx.exchange, gradient.contiguous()
        rows_gradient, parameters = torch.empty_like(rows), ParameterGradients(exchange.chunks)
        for chunk in range(exchange.chunks):
            underway = exchange.meanwhile.taken() or exchange.start_back(rows, gradient, chunk)
            (arrived, first), (arrived_gradient, second) = underway
            del underway
            order, places = exchange.order(chunk)
            counts = exchange.counts(chunk)
            first.wait()
            arrived = arrived[order]
            _, gate_up = products(arrived, w1w3, w2, counts, outputs=False)
            second.wait()
            found = products_backward(arrived, gate_up, w1w3, w2, arrived_gradient[order], counts)
            del arrived, arrived_gradient, gate_up
            exchange.give_back(found.rows[places], chunk, rows_gradient)
            parameters.add(found)
            del found
        return rows_gradient, *parameters.of(w1w3, w2), None
