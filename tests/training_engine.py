"""A training engine inside a probe's process, built as in training, many times in one launch.

For programs run by the train environment's Python under torchrun; they install the engine's shims first.
"""

import dataclasses
import gc
import tempfile
import time
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from mmengine.registry import OPTIMIZERS
from training_helpers import settings as make_settings
from xtuner.parallel.sequence import setup_distributed

from deepseek_sft.data.tokens import TokenDataset
from deepseek_sft.slurm import nodes as slurm_nodes
from deepseek_sft.training import schedule, stage
from deepseek_sft.training.health import StepHealth
from deepseek_sft.training.xtuner_engine import config, loop, micro_batches, phases, step_guard
from deepseek_sft.training.xtuner_engine.engine import XtunerEngine


class Engine:
    """One run of training in this process; all ranks make the same.

    Args:
        base, tokens: model folder and token dataset.
        zero: changes to DeepSpeed's ``zero_optimization``.
        nodes: as which the ranks count.
        changes: settings that differ from ``training_helpers.SETTINGS``.
    """

    def __init__(self, base: Path, tokens: Path, zero: dict[str, Any] | None = None, nodes: int = 1, **changes: Any):
        self.settings = make_settings(**({"deal_rows": "cost"} | changes))
        world = torch.distributed.get_world_size()
        plan = schedule.plan(self.settings, len(TokenDataset(tokens)), world)
        run = stage.Run("probe", tokens, tokens, base, tokens, self.settings, plan, {})
        self.told = told = dataclasses.replace(config.of(run, slurm_nodes.detect("cpu", world, {}), "cpu"), nodes=nodes)
        told.deepspeed["zero_optimization"].update(zero or {})
        self.rows = micro_batches.StepRows(tokens, self.settings, pairs_per_token=100)
        _split_sequences(self.settings.sequence_parallel_size)
        _forget_optimizers()
        self._log = tempfile.TemporaryDirectory()
        self.built = XtunerEngine(told, Path(self._log.name))
        self.engine = self.built.deepspeed
        self.engine.train()
        guard = step_guard.StepGuard(self.engine, StepHealth("stop", None, "warn"))
        clock = phases.PhaseClock(self.engine.device)
        self.tools = loop.StepTools(guard, loop.Requests([]), clock, types.SimpleNamespace(place=""))
        self.steps_done = 0
        self.result: loop.StepResult | None = None  # of the last step

    @property
    def model(self) -> torch.nn.Module:
        return self.engine.module

    def batches(self, step: int) -> list[micro_batches.MicroBatch]:
        """This rank's micro batches of a step (from 0)."""
        return self.rows.of_step(step + 1).batches

    def step(self) -> float:
        """Train one step; its loss."""
        result = loop.train_step(
            self.engine, self.batches(self.steps_done), self.steps_done + 1, self.tools, time.monotonic()
        )
        self.model.move_balance_bias(result.verdict.apply)
        self.steps_done += 1
        self.result = result
        return result.loss

    def first_moments(self) -> dict[str, torch.Tensor]:
        """Adam's first moment of every parameter, whole: after one step, its gradient times 1 - beta1."""
        from deepspeed.utils import safe_get_full_optimizer_state

        return {
            name.removeprefix("llm."): safe_get_full_optimizer_state(parameter, "exp_avg").clone()
            for name, parameter in self.model.named_parameters()
        }


@contextmanager
def engine(base: Path, tokens: Path, zero: dict[str, Any] | None = None, **changes: Any) -> Iterator[Engine]:
    """An engine that is gone afterwards, so that the next can be made."""
    made = Engine(base, tokens, zero, **changes)
    try:
        yield made
    finally:
        made.engine.destroy()
        del made.engine, made.built
        gc.collect()


def _split_sequences(size: int) -> None:
    """Make xtuner's groups anew; it keeps them in module globals and makes them once."""
    for name in vars(setup_distributed):
        if name.startswith("_") and name.endswith(("_GROUP", "_WORLD_SIZE", "_RANK")):
            setattr(setup_distributed, name, None)
    setup_distributed.init_sequence_parallel(size)


def _forget_optimizers() -> None:
    """Every strategy enters DeepSpeed's optimizers into mmengine's registry, which takes a name once."""
    entered = OPTIMIZERS.module_dict
    for name in [name for name, kind in entered.items() if kind.__module__.startswith("deepspeed.")]:
        del entered[name]
