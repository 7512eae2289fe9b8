"""What expert parallelism moves and holds: weights into a node, rows between ranks, buffers of a chunk.

An all-gather brings each byte into a node once, whatever the number of its ranks: so what counts for the network are
the different weights that a node needs, and the rows that leave it. docs/planning.md has the reasons.
"""

import math
from dataclasses import dataclass

from ..expert_shards import CHUNK_ROWS
from . import zero_thresholds
from .counting import Model
from .settings import Cluster, Training
from .terms import Term

HOST_SECONDS = 1.5e-3  # of Python for a shard that exchanges rows, all passes: `benchmarks/train.py scale`


@dataclass(frozen=True)
class Exchange:
    """Expert parallelism of one plan."""

    model: Model
    training: Training
    cluster: Cluster

    @property
    def size(self) -> int:
        return self.training.expert_parallel_size

    @property
    def over_nodes(self) -> int:
        """Nodes that one group lies over."""
        return max(1, self.size // self.cluster.ranks_per_node)

    def experts_into_node(self) -> float:
        """Elements of experts that a node gets of others each time all of a rank's experts are gathered."""
        experts = self.model.parameters["routed experts"]
        ranks, nodes = self.cluster.ranks_per_node, self.cluster.nodes
        sharing = nodes // self.over_nodes  # nodes that hold the same experts
        return min(self.size, ranks) / self.size * experts * (sharing - 1) / sharing

    def others_into_node(self) -> float:
        """The same of all other parameters."""
        nodes = self.cluster.nodes
        return (self.model.trained - self.model.parameters["routed experts"]) * (nodes - 1) / nodes

    def gathers(self) -> tuple[float, float]:
        """How often a micro batch gathers a rank's routed experts, and all else.

        Recomputation makes two of three, but what it gathers may stay for the backward pass: DeepSpeed leaves a module
        gathered where less than ``reuse`` elements are used until its next use, or where what it prefetches reaches
        that. Of a layer's experts so many shards stay, the last ones; of the rest all or nothing. As counted with
        DeepSpeed itself (``benchmarks/train.py exchange``), but for the last layers' forward pass and the dense layers.
        """
        training, model = self.training, self.model
        if not training.activation_checkpointing or training.keep_layer_gathered:
            return 2, 2
        each = training.experts_per_shard
        limits = zero_thresholds.of_model(model.config, each, training.thresholds_by_shard, False)
        held = max(1, model["n_routed_experts"] // each // self.size)
        shard, shared = each * model.expert_parameters, model.shared_experts * model.expert_parameters
        after = [index * shard for index in range(held)]  # elements used after a shard, from the last one on
        stay = sum(2 * elements < limits.reuse or elements < limits.prefetched for elements in after)
        alike = sum(model.parameters[part] for part in ("attention", "norms")) / model.layers
        layer = alike + model.parameters["router"] / max(1, model.moe_layers) + shared + held * shard
        return 3 - stay / held, 2 if 2 * layer < limits.reuse else 3

    def weights_into_node(self) -> float:
        """Bytes of weights and gradients that a node gets of others in a micro batch."""
        training = self.training
        experts, others = (each * training.width + training.communication_width for each in self.gathers())
        return experts * self.experts_into_node() + others * self.others_into_node()

    @property
    def visits(self) -> float:
        """Other nodes that a token travels to: of evenly used experts, bounded by group-limited routing."""
        nodes, chosen = self.over_nodes, self.model["num_experts_per_tok"]
        if nodes == 1:
            return 0.0
        groups, limit = self.model.config.get("n_group") or 1, self.model.config.get("topk_group") or 1
        reached = nodes * (1 - (1 - 1 / nodes) ** chosen)
        if groups > 1:
            reached = min(reached, limit * max(1, math.ceil(nodes / groups)))
        return reached * (nodes - 1) / nodes

    @property
    def passes(self) -> int:
        """Times that a token's rows travel in a micro batch: to the experts and back in the forward pass and in its
        recomputation, and in the backward pass rows and gradients to them and gradients back."""
        again = self.training.activation_checkpointing and not self.training.keeps_experts
        return 7 if again else 5

    def rows_into_node(self, tokens: float) -> float:
        """Bytes of rows that a node gets of others in a micro batch of ``tokens`` a rank."""
        row = self.training.width * self.model["hidden_size"]
        return self.model.moe_layers * self.passes * tokens * self.cluster.ranks_per_node * self.visits * row

    def rows_inside(self, tokens: float) -> float:
        """Bytes that a rank sends inside its node in a micro batch: a row for each expert of a token."""
        if self.size == 1:
            return 0.0
        row = self.training.width * self.model["hidden_size"]
        ranks = min(self.size, self.cluster.ranks_per_node)
        copies = self.model["num_experts_per_tok"] * (ranks - 1) / ranks
        return self.model.moe_layers * self.passes * tokens * copies * row

    def hosting(self) -> float:
        """Seconds of Python a micro batch for exchanges."""
        if self.size == 1:
            return 0.0
        shards = self.model.moe_layers * self.model["n_routed_experts"] // self.training.experts_per_shard
        return HOST_SECONDS * shards / self.size

    def buffers(self) -> list[Term]:
        """What a rank holds of the rows of one chunk, in the backward pass of a layer."""
        if self.size == 1:
            return []
        rows, width = self.training.exchange_rows or CHUNK_ROWS, self.training.width
        hidden, ffn = self.model["hidden_size"], self.model["moe_intermediate_size"]
        each = width * (6 * hidden + 8 * ffn)
        shard = self.training.experts_per_shard * self.model.expert_parameters
        return [
            Term(
                "rows of a chunk of other ranks",
                rows * each,
                f"{rows:,} rows × {width} × (6 × {hidden:,} + 8 × {ffn:,}): sent, arrived, in order, and gradients",
            ),
            Term("sums of a shard's gradients over chunks", 4 * shard, f"4 × {shard:,}"),
        ]

    def kept(self, held: int) -> list[Term]:
        """Results of experts that recomputation takes over."""
        if not self.training.keeps_experts:
            return []
        each = self.training.width * self.model["hidden_size"] + 8 * self.model["num_experts_per_tok"]
        layers = self.model.moe_layers
        formula = (
            f"({self.training.width} × {self.model['hidden_size']:,} + experts) × {layers} layers × {held:,} tokens"
        )
        return [Term("results of experts kept", each * layers * held, formula)]
