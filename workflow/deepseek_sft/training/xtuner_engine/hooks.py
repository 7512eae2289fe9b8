"""What happens around each step beside metrics and checkpoints: start checks, learning rate, first-loss gate."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
from mmengine.hooks import Hook

from ...cli import say
from ...errors import GateError
from .. import first_batch, run_folder
from ..health import StepHealth
from ..schedule import Schedule
from . import start_checks
from .data import NO_LOSS, MicroBatch
from .loop import Requests, StepResult
from .step_guard import StepGuard

CAUSES = f"""the usual causes, most frequent first:
  - the chat template or the base is not what the data was made for: read {first_batch.NAME} in the run folder
  - loss on the prompt or on nothing: the same file shows what is trained
  - another config.json than the release's: rope_scaling, routed_scaling_factor, norm_topk_prob, top-k
    ({start_checks.NAME} holds what was compared before this step)
  - a base whose weights were damaged on the way: verify its checksums, run prepare_model again
If the loss is right for this data, raise train.first_loss_max; the next start then goes on."""


class StartHook(Hook):
    """Runs the checks that come before the first step, and sets up what decides during the run.

    Args:
        on_not_finite, spike_factor, on_spike: settings of the same names.
        save_seconds, end_seconds: see ``Requests``.
    """

    def __init__(
        self,
        on_not_finite: str,
        spike_factor: float | None,
        on_spike: str,
        save_seconds: float | None,
        end_seconds: float | None,
    ):
        self.policy = on_not_finite, spike_factor, on_spike
        self.save_seconds, self.end_seconds = save_seconds, end_seconds

    def before_train(self, runner) -> None:
        cfg, engine = runner.cfg, runner.model.model
        start_checks.check(
            engine.module.llm, Path(cfg.model.base), Path(cfg.run), cfg.model.dtype, fresh=runner.iter == 0
        )
        before = cfg.progress
        runner.guard = StepGuard(engine, StepHealth(*self.policy, state=before.get("health")))
        runner.requests = Requests(cfg.stop_files, self.save_seconds, self.end_seconds, before.get("wall_seconds", 0.0))

    def before_train_iter(self, runner, batch_idx: int, data_batch: list[MicroBatch] | None = None) -> None:
        if runner.iter == 0 and dist.get_rank() == 0:
            tokenizer = first_batch.read_tokenizer(Path(runner.cfg.model.base))
            path = first_batch.write(Path(runner.cfg.run), shown_rows(data_batch), tokenizer)
            say(f"first batch, decoded: {path}")


class LearningRateHook(Hook):
    """Sets the learning rate of each step; a function of the step alone, so nothing of it is saved or resumed."""

    def __init__(self, schedule: dict[str, Any]):
        self.schedule = Schedule(**schedule)

    def before_train_iter(self, runner, batch_idx: int, data_batch: Any = None) -> None:
        rate = self.schedule.learning_rate(runner.iter + 1)
        for group in runner.optim_wrapper.optimizer.param_groups:
            group["lr"] = rate


class FirstLossHook(Hook):
    """Gate: a base model that is loaded or computed wrongly shows in the first loss, before any GPU hours are spent."""

    def __init__(self, first_loss_max: float | None):
        self.first_loss_max = first_loss_max

    def after_train_iter(
        self, runner, batch_idx: int, data_batch: Any = None, outputs: StepResult | None = None
    ) -> None:
        if runner.iter > 0:
            return
        if outputs.trained_tokens == 0:
            raise GateError("the first step trains on no token", f"read {first_batch.NAME} in {runner.cfg.run}")
        if self.first_loss_max is not None and not outputs.loss <= self.first_loss_max:
            message = f"the first loss is {outputs.loss:.4f}, above train.first_loss_max {self.first_loss_max}"
            if dist.get_rank() == 0:
                run_folder.write_gate(Path(runner.cfg.run), "first_loss", message, outputs.loss)
            raise GateError(message, CAUSES)


def shown_rows(batches: list[MicroBatch]) -> Iterator[tuple[str, list[int], list[bool]]]:
    """Samples of micro batches as they are trained on: name, tokens, and whether the position before learns each.

    Raises:
        RuntimeError: a target is not the token that follows.
    """
    for number, batch in enumerate(batches):
        for row in range(batch.input_ids.shape[0]):
            valid = int(batch.valid[row].sum())
            ids, targets = batch.input_ids[row, :valid], batch.targets[row, :valid]
            learned = targets != NO_LOSS
            following = ids.roll(-1)
            if bool((targets[learned] != following[learned]).any()):
                raise RuntimeError(f"micro batch {number}, row {row}: a target is not the token that follows")
            of_token = [False, *learned[:-1].tolist()]
            samples = batch.sample_of[row, :valid].tolist()
            for sample in sorted(set(samples)):
                start, end = samples.index(sample), valid - samples[::-1].index(sample)
                name = f"micro batch {number}, row {row}, sample {sample}"
                yield name, ids[start:end].tolist(), of_token[start:end]
