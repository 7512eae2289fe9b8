"""One start of a run on one rank, from top to bottom: what comes before the first step, a step, and what follows it."""

import dataclasses
import gc
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from xtuner.parallel.sequence import get_sequence_parallel_rank, init_sequence_parallel

from ...cli import say
from .. import first_batch, gpu_hours, same_training
from ..health import StepHealth
from ..watchdog import Watchdog
from . import base_check, gates, micro_batches, node_local_resume, resuming, start_checks, validation_loss
from .config import Attempt, EngineConfig
from .engine import XtunerEngine
from .metrics import Metrics
from .micro_batches import MicroBatch
from .phases import WAITING, PhaseClock
from .saving import Checkpoints
from .step_guard import StepGuard
from .step_result import Due, Requests, StepResult, requests_of


@dataclass(frozen=True)
class Ending:
    """How a start ended by itself.

    Attributes:
        step: the last that is done.
        stopped: on request, with steps left.
        began: when its first step began, seconds since the epoch.
    """

    step: int
    stopped: bool
    began: float


@dataclass(frozen=True)
class StepTools:
    """What watches over a step."""

    guard: StepGuard
    requests: Requests
    clock: PhaseClock
    watchdog: Watchdog
    saves: Checkpoints | None = None

    @property
    def beside_save(self) -> Due:
        """Where a checkpoint is being written; the same on all ranks."""
        return self.saves.writing if self.saves else Due.NOWHERE

    def begin(self, phase: str) -> None:
        """A phase of the step begins."""
        self.watchdog.place = phase
        self.clock.mark(phase)


def run(config: EngineConfig, attempt: Attempt, watchdog: Watchdog) -> Ending:
    """Train from the newest checkpoint, or from the base, to the last step, a stop, or the end of the time.

    Raises:
        GateError, BadInputError: on all ranks alike.
    """
    settings, schedule, rank = config.settings, config.schedule, dist.get_rank()
    candidates = resuming.candidates_of(attempt.run, config.run_id)
    on_nodes = node_local_resume.look(config, attempt, alone=not candidates)
    begun = bool(candidates or on_nodes.choices)
    init_sequence_parallel(settings.sequence_parallel_size)
    if not begun:
        base_check.check(Path(config.base), config.base_sums, settings.check_base)
    # What the strategy logs goes to a folder of this start.
    engine = XtunerEngine(config, attempt.logs / "mmengine", read_weights=not begun)
    done, before = 0, {}
    if begun:
        resumed = resuming.resume_newest(engine.deepspeed, candidates, on_nodes)
        done, before = resumed.step, resumed.progress
        on_ranks = before.get("seconds", 0.0) * resumed.marker["world_size"]
        before = {"rank_seconds": on_ranks} | before  # earlier versions did not change their ranks
        # Of the checkpoint that was sound, perhaps not the one that the start was planned from.
        schedule = same_training.schedule_from(schedule, settings, resumed, config.begun)
        config = dataclasses.replace(config, schedule=schedule)
    start_checks.check(engine.model.llm, Path(config.base), attempt.run, settings.dtype, fresh=done == 0)

    health = StepHealth(settings.on_not_finite, settings.spike_factor, settings.on_spike, before.get("health"))
    requests = requests_of(settings, attempt.stop_files, before.get("wall_seconds", 0.0), bool(on_nodes.tier))
    guard, clock = StepGuard(engine.deepspeed, health), PhaseClock(engine.device)
    saved = Checkpoints(config, attempt, engine, watchdog, on_nodes.tier)
    tools = StepTools(guard, requests, clock, watchdog, saved)
    metrics = Metrics(config, attempt, engine, done, before)
    validation = validation_loss.of_run(config, before, watchdog, guard)
    rows = micro_batches.StepRows(config.tokens, settings, metrics.operations.pairs_per_token, schedule.rows_after)

    # What is built stays: Python's collector need not walk through it again and again in each step.
    gc.collect()
    gc.freeze()
    engine.deepspeed.train()
    began, stopped = time.time(), False
    if rank == 0:
        gpu_hours.note_start(
            attempt.run, attempt.name, dist.get_world_size(), attempt.began, began, done, metrics.left_behind
        )
    if validation and not done:  # of the base; a run that is gone on with does not make it up
        metrics.tell_base(validation.measure(engine.deepspeed, done))
    step, end = done, min(schedule.steps, attempt.end_after or schedule.steps)
    while step < end:
        step += 1
        last = step == schedule.steps
        watchdog.enter("step", step)
        started = time.monotonic()
        tools.begin("data")
        rows_of_all = rows.of_step(step)
        batches = rows_of_all.batches
        # Random numbers, where a layer draws any, are a function of the step: a resumed run draws the same.
        torch.manual_seed(settings.seed * 1_000_003 + step)
        learning_rate = schedule.learning_rate(step)
        engine.set_learning_rate(learning_rate)
        if step == 1 and rank == 0:
            _show_first_batch(Path(config.base), attempt.run, batches)

        result = train_step(engine.deepspeed, batches, step, tools, started)
        if result is None:
            if saved.writing:
                metrics.saved(saved.finish(step))
            step, stopped = step - 1, True
            break
        gates.check_health(attempt.run, result)
        watchdog.took("step", result.seconds)

        engine.model.move_balance_bias(result.verdict.apply)  # before the step's checkpoint, of which biases are a part
        validated = None
        if validation and validation.is_due(step, result.time_is_up):
            validated = validation.measure(engine.deepspeed, step)
        metrics.add(step, result, learning_rate, rows_of_all.slots, validated)
        if step == 1:
            gates.check_first_loss(attempt.run, result, settings.first_loss_max)
        ended = bool(validation and validated and validation.ends())
        if where := saved.due(step, result, ended):
            metrics.progress |= validation.kept() if validation else {}
            # Of each checkpoint that can become the result; its marker must be there to hold them.
            best = bool(validated and settings.validation.early_stop)
            leaves = where is Due.SHARED and (last or result.time_is_up or ended or best)
            metrics.saved(
                saved.save(
                    step, result, lambda: metrics.snapshot(requests.wall_seconds(), health.state()), leaves, where
                )
            )
            requests.saved(where)
            if leaves:
                saved.leave_losses(step)
        if ended and not last and rank == 0:
            validation.tell_end(step)
        stopped = result.stop_requested and not (last or ended)
        if stopped or result.time_is_up or ended:
            break
    if saved.writing:  # a rehearsal ends without a last checkpoint
        metrics.saved(saved.finish(step))
    saved.close(finished=not stopped)
    metrics.close()
    return Ending(step, stopped, began)


def train_step(engine, batches: list[MicroBatch], step: int, tools: StepTools, started: float) -> StepResult | None:
    """One optimizer step over ``batches``, this rank's micro batches.

    DeepSpeed averages gradients over all ranks. Each rank's summed loss is scaled by ranks / trained tokens of the
    global batch, so that the average is exactly the gradient of the mean over all trained tokens, however they are
    spread over ranks and micro batches. The guard decides whether the gradient is applied.

    Args:
        engine: DeepSpeed's.
        started: monotonic time at which the step began to read its data.

    Returns:
        None where a stop is asked for while the step before is being saved: that checkpoint is the one to stop with.
        Nothing was updated, so that a stop takes no second checkpoint's time.
    """
    device = engine.device
    tools.begin("forward")
    counted = batches if get_sequence_parallel_rank() == 0 else []
    flags = tools.requests.flags() if dist.get_rank() == 0 else (False, 0, False)
    tokens, trained, pairs, stop, save, end = _sum_over_ranks(
        sum(b.tokens for b in counted),
        sum(b.trained_tokens for b in counted),
        sum(b.attention_pairs for b in counted),
        *flags,
        device=device,
    )
    beside_save = tools.beside_save
    if stop and beside_save is Due.SHARED:
        tools.clock.seconds()
        return None
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
        if number == len(batches) and beside_save:
            tools.clock.mark(WAITING)
            tools.saves.finish(step)  # the update changes what is being written
            asked = dist.get_rank() == 0 and tools.requests.flags()[0]
            if beside_save is Due.SHARED and _sum_over_ranks(float(asked), device=device)[0]:
                tools.clock.seconds()
                return None
        tools.begin("update")
        engine.step()
    phases = tools.clock.seconds()
    waited = phases.pop(WAITING)
    seconds = time.monotonic() - started - waited
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
        save_due=Due(int(save)),
        time_is_up=end > 0,
        beside_save=bool(beside_save),
        waited=waited,
    )


def _show_first_batch(base: Path, run: Path, batches: list[MicroBatch]) -> None:
    path = first_batch.write(run, micro_batches.shown_rows(batches), first_batch.read_tokenizer(base))
    say(f"first batch, decoded: {path}")


def _sum_over_ranks(*values: float, device: torch.device) -> list[float]:
    together = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(together)
    return together.tolist()
