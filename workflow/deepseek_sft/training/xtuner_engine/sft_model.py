"""xtuner's SupervisedFinetune around the training model, with a loss that sequence parallelism does not change."""

from collections.abc import Collection
from pathlib import Path

import torch
from xtuner.model import SupervisedFinetune
from xtuner.parallel.sequence import (
    get_sequence_parallel_group,
    get_sequence_parallel_world_size,
    split_for_sequence_parallel,
)

from ... import families
from ...model import attention as attention_functions
from ...model.balance_bias import BalanceBias
from ...model.router import AuxiliaryLoss
from ...model.training_model import TrainingModel, build
from .expert_load import ExpertLoad
from .memory import rank_device
from .micro_batches import NO_LOSS, MicroBatch


class DeepseekSFT(SupervisedFinetune):
    """Returns the summed loss of this rank's part of a micro batch.

    xtuner's own loss splits labels before shifting them and weighs each rank's part alike; xtuner's own model builder
    rewrites rope_scaling. Both are replaced.
    """

    def __init__(
        self,
        base: str,
        experts_per_shard: int,
        attention: str,
        accelerator: str,
        dtype: str,
        auxiliary_loss_weight: float,
        activation_checkpointing: bool,
        expert_products: str = "auto",
        balance_bias_speed: float = 0.0,
        read_weights: bool = True,
        keep_attention: bool = False,
        expert_parallel_size: int = 1,
        exchange_rows: int | None = None,
        ranks_per_node: int = 1 << 30,
        keep_experts: bool = False,
        freeze: Collection[str] = (),
    ):
        config = families.read_config(Path(base))
        sizes = (config["qk_nope_head_dim"] + config["qk_rope_head_dim"], config["v_head_dim"])
        if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
            print(attention_functions.describe(attention, accelerator, sizes), flush=True)
        llm = build(
            Path(base),
            experts_per_shard=experts_per_shard,
            attention=attention_functions.choose(attention, accelerator),
            dtype=getattr(torch, dtype),
            products=expert_products,
            device=accelerator,
            read_weights=read_weights,
            keep_attention=keep_attention,
            expert_parallel_size=expert_parallel_size,
            exchange_rows=exchange_rows,
            ranks_per_node=ranks_per_node,
            keep_experts=keep_experts,
            freeze=freeze,
        )
        super().__init__(llm=llm, use_activation_checkpointing=activation_checkpointing)
        self.auxiliary_loss_weight = auxiliary_loss_weight
        self.balance_bias = BalanceBias(llm.routers(), balance_bias_speed) if balance_bias_speed > 0 else None
        self._expert_load: ExpertLoad | None = None

    def count_experts(self) -> ExpertLoad:
        """From now on count the tokens that each router sends to each expert."""
        self._expert_load = ExpertLoad(self.llm.routers(), rank_device())
        return self._expert_load

    def move_balance_bias(self, applied: bool) -> None:
        """After a step, where the run moves biases; a step that was not applied moves nothing. A collective."""
        if self.balance_bias is None:
            return
        if applied:
            self.balance_bias.apply()
        else:
            self.balance_bias.load = []

    def build_llm_from_cfg(
        self, llm: TrainingModel, use_varlen_attn: bool, max_position_embeddings: None
    ) -> TrainingModel:
        return llm

    def forward(self, batch: MicroBatch, micro_batches: int = 1, of_each_token: bool = False) -> torch.Tensor:
        """Summed cross-entropy, fp32 scalar, over the targets in this rank's part of the rows.

        Args:
            batch: whole rows, the same on all ranks of the sequence-parallel group.
            micro_batches: forward passes of the step, over which the balance loss is averaged.
            of_each_token: instead of the sum, the loss of each of these targets, without gradient.
        """
        packing = attention_functions.Packing.of(batch.sample_of) if batch.packed else None
        targets = self._part(batch.targets)
        if self.auxiliary_loss_weight > 0:
            auxiliary = AuxiliaryLoss(self.auxiliary_loss_weight / micro_batches, self._part(batch.valid))
            for router in self.llm.routers():
                router.auxiliary = auxiliary
        if self.balance_bias is not None:
            self.balance_bias.begin(self._part(batch.valid))
        if self._expert_load is not None:
            self._expert_load.valid = self._part(batch.valid)
        hidden = self.llm.model(
            input_ids=self._part(batch.input_ids), position_ids=self._part(batch.position_ids), packing=packing
        ).last_hidden_state
        if self.balance_bias is not None and self.training:
            self.balance_bias.count()
        learned = targets != NO_LOSS
        return self.llm.lm_head(hidden[learned], targets[learned], summed=not of_each_token)

    @staticmethod
    def _part(tensor: torch.Tensor) -> torch.Tensor:
        """This rank's columns of a [rows, length] tensor."""
        if get_sequence_parallel_world_size() == 1:
            return tensor
        return split_for_sequence_parallel(tensor, dim=1, sp_group=get_sequence_parallel_group())
