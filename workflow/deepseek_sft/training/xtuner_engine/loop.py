"""The training loop: one iteration is one optimizer step, with its loss normalised over the whole global batch."""

import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from xtuner.engine.runner import TrainLoop as XtunerTrainLoop
from xtuner.parallel.sequence import get_sequence_parallel_rank

from ...errors import GateError
from .. import run_folder
from ..health import Verdict
from ..watchdog import Watchdog
from .data import MicroBatch
from .phases import PhaseClock
from .step_guard import StepGuard


@dataclass(frozen=True)
class StepResult:
    """What a step did, summed over all ranks.

    Attributes:
        loss: mean cross-entropy over the step's trained tokens.
        gradient_norm: before clipping.
        tokens, trained_tokens: without padding; with loss.
        pairs: queries and the keys before them in their sample: what causal attention computes.
        seconds: wall time of the step, data included.
        phases: this rank's seconds by phase.
        verdict: whether the update was applied, and why not.
        stop_requested: someone asked to save and stop.
        save_due: so many minutes have passed since the last checkpoint.
        time_is_up: the run has trained as long as it may.
    """

    loss: float
    gradient_norm: float
    tokens: int
    trained_tokens: int
    pairs: int
    seconds: float
    phases: dict[str, float] = field(default_factory=dict)
    verdict: Verdict = field(default_factory=Verdict)
    stop_requested: bool = False
    save_due: bool = False
    time_is_up: bool = False


class Requests:
    """What rank 0 alone decides, from files and clocks, before each step; all ranks learn it with the step's counts.

    Args:
        stop_files: files whose existence asks for a stop.
        save_seconds: between checkpoints; None saves by steps alone.
        end_seconds: of training in all starts, after which the run ends; None for no limit.
        trained_seconds: of earlier starts.
    """

    def __init__(
        self,
        stop_files: list[Path],
        save_seconds: float | None = None,
        end_seconds: float | None = None,
        trained_seconds: float = 0.0,
    ):
        self.stop_files, self.save_seconds, self.end_seconds = stop_files, save_seconds, end_seconds
        self.started = self.saved = time.monotonic()
        self.trained_seconds = trained_seconds

    def wall_seconds(self) -> float:
        """Seconds of training up to now: this start's, and what the earlier ones kept."""
        return self.trained_seconds + time.monotonic() - self.started

    def flags(self) -> tuple[bool, bool, bool]:
        """Stop, save, end."""
        return (
            any(Path(file).exists() for file in self.stop_files),
            self.save_seconds is not None and time.monotonic() - self.saved >= self.save_seconds,
            self.end_seconds is not None and self.wall_seconds() >= self.end_seconds,
        )


class TrainLoop(XtunerTrainLoop):
    """xtuner's iteration-based loop with gradient accumulation inside an iteration and resume at any step."""

    stopped = False  # ended early on request
    timed_out = False  # ended early by time
    began: float | None = None  # when the first step of this start began, seconds since the epoch

    def run(self) -> None:
        self.runner.call_hook("before_train")
        self.dataloader.sampler.start_step = self._iter
        self.clock = PhaseClock(self.runner.model.model.device)
        batches = iter(self.dataloader)
        self.runner.model.train()
        self.began = time.time()
        end = min(self._max_iters, self.runner.cfg.get("end_after") or self._max_iters)
        while self._iter < end and not (self.stopped or self.timed_out):
            self.runner.watchdog.enter("step", self._iter + 1)
            started = time.monotonic()
            self.clock.mark("data")
            self.runner.watchdog.place = "data"
            self.run_iter(next(batches), started)
        self.runner.call_hook("after_train")

    def run_iter(self, data_batch: list[MicroBatch], started: float) -> None:
        step = self._iter + 1
        # Random numbers, where a layer draws any, are a function of the step: a resumed run draws the same.
        torch.manual_seed(self.runner.seed * 1_000_003 + step)
        self.runner.call_hook("before_train_iter", batch_idx=self._iter, data_batch=data_batch)
        runner = self.runner
        tools = StepTools(runner.guard, runner.requests, self.clock, runner.watchdog)
        result = train_step(runner.model.model, data_batch, step, tools, started)
        if result.verdict.stop:
            if dist.get_rank() == 0:
                value = result.loss if result.verdict.kind == "spike" else None
                run_folder.write_gate(Path(self.runner.cfg.run), result.verdict.kind, result.verdict.message, value)
            raise GateError(result.verdict.message, CAUSES[result.verdict.kind])
        runner.watchdog.took("step", result.seconds)
        last = step == self._max_iters
        self.stopped = result.stop_requested and not last
        self.timed_out = result.time_is_up and not last and not self.stopped
        self.runner.call_hook("after_train_iter", batch_idx=self._iter, data_batch=data_batch, outputs=result)
        self._iter += 1


CAUSES = {
    "not_finite": (
        "the weights are as before this step, and the last checkpoint is kept. Lower train.learning_rate, look at the "
        "step's rows, or set train.on_not_finite: skip to go on without such steps"
    ),
    "spike": (
        "the weights are as before this step, and the last checkpoint is kept. Look at the step's rows, raise "
        "train.spike_factor, or set train.on_spike: skip"
    ),
}


@dataclass(frozen=True)
class StepTools:
    """What watches over a step."""

    guard: StepGuard
    requests: Requests
    clock: PhaseClock
    watchdog: Watchdog

    def begin(self, phase: str) -> None:
        """A phase of the step begins."""
        self.watchdog.place = phase
        self.clock.mark(phase)


def train_step(engine, batches: list[MicroBatch], step: int, tools: StepTools, started: float) -> StepResult:
    """One optimizer step over ``batches``, this rank's micro batches.

    DeepSpeed averages gradients over all ranks. Each rank's summed loss is scaled by ranks / trained tokens of the
    global batch, so that the average is exactly the gradient of the mean over all trained tokens, however they are
    spread over ranks and micro batches. The guard decides whether the gradient is applied.

    Args:
        started: monotonic time at which the step began to read its data.
    """
    device = engine.device
    tools.begin("forward")
    counted = batches if get_sequence_parallel_rank() == 0 else []
    flags = tools.requests.flags() if dist.get_rank() == 0 else (False, False, False)
    tokens, trained, pairs, stop, save, end = _sum_over_ranks(
        sum(b.tokens for b in counted),
        sum(b.trained_tokens for b in counted),
        sum(b.attention_pairs for b in counted),
        *flags,
        device=device,
    )
    scale = dist.get_world_size() / max(trained, 1)
    summed = torch.zeros((), dtype=torch.float64, device=device)
    mean = 0.0
    for number, batch in enumerate(batches, 1):
        tools.begin("forward")
        loss = engine(batch.to(device), micro_batches=len(batches))
        summed += loss.detach()
        if number == len(batches):
            mean = _sum_over_ranks(summed.item(), device=device)[0] / max(trained, 1)
            tools.guard.step, tools.guard.loss = step, mean
        tools.begin("backward")
        engine.backward(loss * scale, scale_wrt_gas=False)
        tools.begin("update")
        engine.step()
    phases = tools.clock.seconds()
    seconds = time.monotonic() - started
    return StepResult(
        loss=mean,
        gradient_norm=tools.guard.norm,
        tokens=int(tokens),
        trained_tokens=int(trained),
        pairs=int(pairs),
        seconds=seconds,
        phases=phases,
        verdict=tools.guard.verdict,
        stop_requested=stop > 0,
        save_due=save > 0,
        time_is_up=end > 0,
    )


def stop_files(run: Path, stop_file: str | None) -> list[Path]:
    """Files whose existence asks for a stop: the run's own, made by a signal, and the user's."""
    return [run / run_folder.STOP] + ([Path(stop_file)] if stop_file else [])


def _sum_over_ranks(*values: float, device: torch.device) -> list[float]:
    together = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(together)
    return together.tolist()
