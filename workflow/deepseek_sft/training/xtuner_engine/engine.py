"""xtuner's DeepSpeed strategy with our model in it: built once for a start, saved with every checkpoint."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from xtuner.engine import DeepSpeedStrategy

from . import deferred_files, lean_modules, sft_model, zero_calls
from .config import EngineConfig
from .deferred_files import DeferredFile


class XtunerEngine:
    """The model, its optimizer and DeepSpeed's engine around both; a collective.

    xtuner's strategy seeds random, numpy and torch, raises the limit of open files, makes DeepSpeed's configuration
    known to transformers before the model is built, calls ``deepspeed.initialize``, and saves. The groups of sequence
    parallelism (``init_sequence_parallel``) and the process group must be there.

    Args:
        work: folder for the strategy's own log.
        read_weights: False where a checkpoint is read afterwards, which holds them all.

    Attributes:
        deepspeed: DeepSpeed's engine.
        model: inside it.
    """

    def __init__(self, config: EngineConfig, work: Path, read_weights: bool = True):
        self._config = config
        deterministic = config.settings.deterministic
        if deterministic:  # cuBLAS reads it at its first product
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.utils.deterministic.fill_uninitialized_memory = False  # costs time, and no step reads such memory
        randomness = {"seed": config.settings.seed, "deterministic": deterministic}
        self._strategy = DeepSpeedStrategy(
            config=dict(config.deepspeed),
            steps_per_print=config.deepspeed["steps_per_print"],  # else xtuner's own, whatever the configuration says
            sequence_parallel_size=config.settings.sequence_parallel_size,
            exclude_frozen_parameters=True,
            work_dir=str(work),
            env_kwargs={"launcher": "pytorch", "randomness": randomness},
            log_kwargs={"log_level": "WARNING"},
        )
        self.model = _model(config, read_weights)
        wrapper = _optimizer_wrapper(_optimizer(config, self.model))
        self._strategy.prepare(self.model, optim_wrapper=wrapper, dispatch_kwargs={})
        self.deepspeed = self._strategy.model.model
        if zero_calls.install(self.deepspeed.module):
            lean_modules.install(self.deepspeed.optimizer)

    @property
    def device(self) -> torch.device:
        return self.deepspeed.device

    @property
    def parameters(self) -> int:
        """Number of all ranks' parameters together."""
        return sum(parameter.ds_numel for parameter in self.deepspeed.parameters())

    def set_learning_rate(self, rate: float) -> None:
        """For the next step; a function of the step alone, so nothing of it is saved or resumed."""
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = rate

    def describe(self, folder: Path, step: int, alone: bool = False) -> list[DeferredFile]:
        """This rank's files of a checkpoint, as ``save`` would write them now; a collective.

        Until they are written, master weights and moments must stay as they are.

        Args:
            alone: without DeepSpeed's scripts beside the folder: nothing at all is written now.
        """
        with deferred_files.collected(self.deepspeed, alone) as found:
            self.save(folder, step)
        return found

    def save(self, folder: Path, step: int) -> None:
        """Write this rank's files of a checkpoint; a collective.

        The client state has the keys that xtuner's own runner leaves (``meta``, ``message_hub``; the strategy adds
        ``optim_wrapper``), so that its ``resume`` finds them, and earlier versions of this workflow.
        """
        meta = {
            "epoch": 0,
            "iter": step,
            "cfg": json.dumps(self._config.as_json()),
            "experiment_name": self._strategy.experiment_name,
        }
        hub: dict[str, Any] = {"log_scalars": {}, "runtime_info": {}, "resumed_keys": {}}
        self._strategy.save_checkpoint(filename=str(folder), extra_ckpt={"meta": meta, "message_hub": hub})


def _model(config: EngineConfig, read_weights: bool) -> sft_model.DeepseekSFT:
    chosen = config.settings
    return sft_model.DeepseekSFT(
        base=config.base,
        experts_per_shard=chosen.experts_per_shard,
        attention=chosen.attention,
        accelerator=config.accelerator,
        dtype=chosen.dtype,
        auxiliary_loss_weight=chosen.auxiliary_loss_weight,
        activation_checkpointing=chosen.activation_checkpointing,
        expert_products=chosen.expert_products,
        balance_bias_speed=chosen.balance_bias_speed,
        read_weights=read_weights,
        keep_attention=chosen.recompute == "without_attention",
        expert_parallel_size=chosen.expert_parallel_size,
        exchange_rows=chosen.exchange_rows,
        ranks_per_node=torch.distributed.get_world_size() // config.nodes,
        keep_experts=chosen.activation_checkpointing and chosen.recompute == "without_experts",
        freeze=chosen.freeze,
    )


def _optimizer(config: EngineConfig, model: torch.nn.Module) -> torch.optim.Optimizer:
    chosen = config.settings
    options = {"lr": chosen.learning_rate, "betas": tuple(chosen.adam_betas), "weight_decay": chosen.weight_decay}
    if chosen.optimizer == "cpu_adam":
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(model.parameters(), **options)
    return torch.optim.AdamW(model.parameters(), fused=True, **options)


def _optimizer_wrapper(optimizer: torch.optim.Optimizer) -> Any:
    """As the strategy takes one."""
    from mmengine._strategy.deepspeed import DeepSpeedOptimWrapper

    return DeepSpeedOptimWrapper(optimizer)
