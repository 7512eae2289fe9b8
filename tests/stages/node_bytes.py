"""Bytes that a rank's collectives bring into its node, counted as the plan counts them (docs/planning.md)."""

from collections import defaultdict
from typing import Any

import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

GATHER, SCATTER = "c10d::_allgather_base_", "c10d::_reduce_scatter_base_"
EXCHANGE, SUM, SPREAD = "c10d::alltoall_base_", "c10d::allreduce_", "c10d::broadcast_"


class IntoNode(TorchDispatchMode):
    """Counts what each collective of this rank brings into its node; summed over the node's ranks, all that comes.

    What is exchanged counts for the rank that receives it. Of a gather every part of another node comes once into a
    node, whichever of its ranks receive it; of a sum that is scattered each other node sends one partial sum of each
    element. What stays inside a node counts nowhere.

    Attributes:
        bytes: kind → bytes: ``rows`` and their gradients; ``routes``, experts and weights of rows and their gradients;
            ``counts``; ``experts`` and ``others``, weights and gradients; ``scalars``.
    """

    def __init__(self, ranks_per_node: int, hidden: int):
        super().__init__()
        self._ranks_per_node, self._hidden = ranks_per_node, hidden
        self._node = dist.get_rank() // ranks_per_node
        self.bytes: dict[str, float] = defaultdict(float)

    def __torch_dispatch__(self, function: Any, kinds: Any, arguments: Any = (), options: Any = None) -> Any:
        name = function.name()
        if name.startswith("c10d::") and name != "c10d::barrier":
            self._count(name, function, arguments)
        return function(*arguments, **(options or {}))

    def _count(self, name: str, function: Any, arguments: tuple[Any, ...]) -> None:
        places = [argument.name for argument in function._schema.arguments]
        group = dist.ProcessGroup.unbox(arguments[places.index("process_group")])
        ranks = dist.get_process_group_ranks(group)
        nodes = [rank // self._ranks_per_node for rank in ranks]
        here, others = nodes.count(self._node), len(set(nodes)) - 1
        weights = "others" if len(ranks) == dist.get_world_size() else "experts"
        if name == EXCHANGE:
            output, received = arguments[0], arguments[places.index("output_split_sizes")]
            each = output.element_size() * output[0:1].numel() if len(output) else 0
            rows = sum(count for count, node in zip(received, nodes, strict=True) if node != self._node)
            self.bytes["rows" if output.dim() == 2 and output.shape[1] == self._hidden else "routes"] += rows * each
        elif name == GATHER:
            part = arguments[1]
            kind = weights if part.is_floating_point() else "counts"
            self.bytes[kind] += part.nbytes * (len(ranks) - here) / here
        elif name == SCATTER:
            self.bytes[weights] += arguments[0].nbytes * others
        elif name == SUM:
            self.bytes["scalars"] += sum(tensor.nbytes for tensor in arguments[0]) * 2 * others / (others + 1) / here
        elif name == SPREAD:
            from_here = nodes[arguments[places.index("root_rank")]] == self._node
            self.bytes["scalars"] += 0 if from_here else sum(tensor.nbytes for tensor in arguments[0]) / here
        else:
            raise NotImplementedError(f"how {name} crosses nodes is not known")
