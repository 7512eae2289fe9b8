"""A training engine inside a probe's process, built from the rendered configuration, many times in one launch.

For programs run by the train environment's Python under torchrun; they install the engine's shims first.
"""

import gc
import time
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from training_helpers import settings as make_settings
from xtuner.parallel.sequence import setup_distributed

from deepseek_sft.training import nodes, schedule, stage
from deepseek_sft.training.health import StepHealth
from deepseek_sft.training.xtuner_engine import config, data, loop, phases, step_guard
from deepseek_sft.training.xtuner_engine.balance_bias import BalanceBiasHook


class Engine:
    """One run of training in this process; all ranks make the same.

    Args:
        base, tokens: model folder and token dataset.
        zero: changes to DeepSpeed's ``zero_optimization``.
        changes: settings that differ from ``training_helpers.SETTINGS``.
    """

    def __init__(self, base: Path, tokens: Path, zero: dict[str, Any] | None = None, **changes: Any):
        import deepspeed
        from mmengine.config import Config
        from transformers.integrations.deepspeed import HfDeepSpeedConfig

        from deepseek_sft.training.xtuner_engine.sft_model import DeepseekSFT

        self.settings = make_settings(**changes)
        self.rows = data.TokenRows(str(tokens))
        world = torch.distributed.get_world_size()
        plan = schedule.plan(self.settings, len(self.rows), world)
        run = stage.Run("probe", tokens, tokens, base, tokens, self.settings, plan, {})
        rendered = Config.fromstring(config.render(run, nodes.detect("cpu", world, {}), "cpu"), ".py")
        _split_sequences(self.settings.sequence_parallel_size)
        strategy = rendered.strategy.to_dict()
        deepspeed_config = strategy["config"] | {
            key: strategy[key]
            for key in ("gradient_clipping", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
        }
        deepspeed_config["zero_optimization"] |= zero or {}
        self._keep = HfDeepSpeedConfig(deepspeed_config)
        model = DeepseekSFT(**{key: value for key, value in rendered.model.to_dict().items() if key != "type"})
        options = rendered.optim_wrapper.to_dict()["optimizer"]
        kinds = {"AdamW": torch.optim.AdamW, "DeepSpeedCPUAdam": deepspeed.ops.adam.DeepSpeedCPUAdam}
        optimizer = kinds[options.pop("type")](model.parameters(), **options)
        self.engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=deepspeed_config)
        self.engine.train()
        guard = step_guard.StepGuard(self.engine, StepHealth("stop", None, "warn"))
        clock = phases.PhaseClock(self.engine.device)
        self.tools = loop.StepTools(guard, loop.Requests([]), clock, types.SimpleNamespace(place=""))
        self.steps_done = 0
        self.result: loop.StepResult | None = None  # of the last step

    @property
    def model(self) -> torch.nn.Module:
        return self.engine.module

    def batches(self, step: int) -> list[data.MicroBatch]:
        """This rank's micro batches of a step (from 0)."""
        chosen = self.settings
        rows = schedule.rows_of_step(
            len(self.rows),
            chosen.seed,
            step,
            micro_batch=chosen.micro_batch_size,
            accumulation=chosen.gradient_accumulation_steps,
            groups=setup_distributed.get_data_parallel_world_size(),
            group=setup_distributed.get_data_parallel_rank(),
        )
        return data.collate([self.rows[row] for row in rows], chosen.micro_batch_size, chosen.sequence_parallel_size)

    def step(self) -> float:
        """Train one step; its loss."""
        result = loop.train_step(
            self.engine, self.batches(self.steps_done), self.steps_done + 1, self.tools, time.monotonic()
        )
        if self.model.balance_bias is not None:
            runner = types.SimpleNamespace(model=types.SimpleNamespace(model=self.engine))
            BalanceBiasHook().after_train_iter(runner, self.steps_done, outputs=result)
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
def engine(base: Path, tokens: Path, **changes: Any) -> Iterator[Engine]:
    """An engine that is gone afterwards, so that the next can be made."""
    made = Engine(base, tokens, **changes)
    try:
        yield made
    finally:
        made.engine.destroy()
        del made.engine, made._keep
        gc.collect()


def _split_sequences(size: int) -> None:
    """Make xtuner's groups anew; it keeps them in module globals and makes them once."""
    for name in vars(setup_distributed):
        if name.startswith("_") and name.endswith(("_GROUP", "_WORLD_SIZE", "_RANK")):
            setattr(setup_distributed, name, None)
    setup_distributed.init_sequence_parallel(size)
