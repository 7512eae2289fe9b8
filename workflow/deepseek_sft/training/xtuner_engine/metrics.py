"""What a run tells while it trains: metrics.jsonl, TensorBoard, a line on standard error, and progress to keep."""

import datetime
import json
import math
import statistics
from collections import deque
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ... import families, formatting
from ...cli import say
from .. import flops, gpu_hours, run_folder, validation
from .config import Attempt, EngineConfig
from .engine import XtunerEngine
from .expert_load import LoadRecords, balance
from .memory import kept_gib, memory_gib, most_over_ranks, rank_device, resident_gib
from .rank_watch import RankWatch
from .step_result import StepResult
from .validation_loss import Measurement

RECENT = 10  # steps whose mean loss is reported as the last loss
MEASURED = 3  # steps of a start after which its end is told
STEADY = 20  # steps whose median time predicts the time left


class Metrics:
    """Keeps the run's progress; rank 0 writes a line for each logged step. Made once DeepSpeed has wrapped the model.

    Args:
        done: steps that are done: the one resumed from, or 0.
        before: progress up to then, see ``snapshot``.

    Attributes:
        operations: of the model, for a token and for a pair.
        left_behind: what earlier starts left that is trained again, see ``gpu_hours``; of rank 0.
    """

    def __init__(self, config: EngineConfig, attempt: Attempt, engine: XtunerEngine, done: int, before: dict[str, Any]):
        self._schedule, self._settings = config.schedule, config.settings
        base = families.read_config(Path(config.base))
        self.operations = flops.StepFlops.of(base)
        self.progress = {
            "hosts": attempt.hosts,
            "nodes": config.nodes,
            "parameters": engine.parameters,
            "resumed_from_step": done or None,
            "first_loss": before.get("first_loss"),
            "tokens": before.get("tokens", 0),
            "trained_tokens": before.get("trained_tokens", 0),
            "slots": before.get("slots", 0),
            "slots_tokens": before.get("slots_tokens", 0),
            "flops": before.get("flops", 0.0),
            "seconds": before.get("seconds", 0.0),
            "rank_seconds": before.get("rank_seconds", 0.0),
            "save_seconds": before.get("save_seconds", 0.0),
            "peak_memory_gib": before.get("peak_memory_gib", 0.0),
            "memory_before_model_gib": attempt.memory_before_model_gib,
            "kept_by_allocator_gib": before.get("kept_by_allocator_gib"),
            **{key: before[key] for key in validation.KEPT if key in before},  # also where this start measures nothing
        }
        self._recent = deque(before.get("recent_losses", []), maxlen=RECENT)
        self._seconds = deque(maxlen=STEADY)
        self._alone = deque(maxlen=STEADY)  # steps beside which no checkpoint was written
        self._unreported_save = 0.0
        self._validation_seconds = 0.0  # of the last one
        self._slowed: float | None = 0.0  # since the last line, by checkpoints written meanwhile; None: not known
        self._load = engine.model.count_experts()
        self._watch = RankWatch(
            engine.model.llm.model.layers, rank_device(), attempt.results, config.slow_rank_percent, done
        )
        if dist.get_rank() == 0:
            from torch.utils.tensorboard import SummaryWriter

            self.left_behind = gpu_hours.left_behind(attempt.run, done)
            run_folder.cut_metrics(attempt.run, done or -1)  # from the base on everything is measured again
            self._stream = open(attempt.run / run_folder.METRICS, "a", encoding="utf-8")  # noqa: SIM115  until ``close``
            self._board = SummaryWriter(attempt.run / "tensorboard", purge_step=done + 1)
            self._loads = LoadRecords(
                attempt.run / run_folder.EXPERT_LOAD, done, config.schedule.steps, base.get("first_k_dense_replace", 0)
            )

    def add(
        self, step: int, result: StepResult, learning_rate: float, slots: int, validated: Measurement | None = None
    ) -> None:
        """Count step ``step``, and log it where it is its turn; a collective.

        Args:
            slots: token slots that it took.
            validated: what was measured after it, which is always logged.
        """
        if math.isfinite(result.loss):
            self._recent.append(result.loss)
        self._seconds.append(result.seconds)
        self._count_save(result)
        self._watch.clock.collect()
        if step == 1 and math.isfinite(result.loss):
            self.progress["first_loss"] = result.loss
        for key in ("tokens", "trained_tokens", "seconds"):
            self.progress[key] += getattr(result, key)
        self.progress["rank_seconds"] += result.seconds * dist.get_world_size()  # of all starts, on however many ranks
        self.progress["slots"] += slots
        self.progress["slots_tokens"] += result.tokens  # those of runs that began before slots were counted are in none
        operations = self.operations.step(result.tokens, result.pairs)
        self.progress["flops"] += operations
        if len(self._seconds) == MEASURED and step < self._schedule.steps and dist.get_rank() == 0:
            self._tell_end(step)
        if result.verdict.message and dist.get_rank() == 0:
            say(f"warning: {result.verdict.message}" + ("" if result.verdict.apply else "; its update was skipped"))
        turn = step == 1 or step % self._settings.log_every_steps == 0 or step == self._schedule.steps
        if turn or validated:
            counts = self._load.take()  # a collective
            ranks = self._watch.told(step)  # a collective
            gpu, host, kept = most_over_ranks(memory_gib(), resident_gib(), kept_gib())
            if dist.get_rank() == 0:
                line = self._line(step, result, learning_rate, operations) | {
                    "useful_slots": round(result.tokens / slots, 4),
                    "memory_gib": gpu,
                    "host_memory_gib": host,
                    "kept_by_allocator_gib": kept if kept >= 0 else None,
                }
                line |= self._of_validation(validated) if validated else {}
                self._write(line | balance(counts) | ranks)
                self._loads.add(step, counts)
                self._tell(line)
            self._unreported_save, self._slowed = 0.0, 0.0

    def tell_base(self, validated: Measurement) -> None:
        """Log what was measured before the first step, as step 0, which has nothing else."""
        if dist.get_rank() == 0:
            line = {"step": 0} | self._of_validation(validated)
            self._write(line)
            say(f"before the first step  {_validated(line)}".rstrip())

    def _of_validation(self, validated: Measurement) -> dict[str, Any]:
        self._validation_seconds = validated.seconds
        return {
            "validation_loss": validated.loss,
            "validation_tokens": validated.tokens,
            "seconds_validation": round(validated.seconds, 6),
        }

    def _count_save(self, result: StepResult) -> None:
        """The wait for a checkpoint, and how much slower the step was than those beside which nothing was written."""
        if not result.beside_save:
            self._alone.append(result.seconds)
            return
        self.saved(result.waited)
        known = self._slowed is not None and self._alone
        self._slowed = self._slowed + max(0.0, result.seconds - statistics.median(self._alone)) if known else None

    def saved(self, seconds: float) -> None:
        """A checkpoint took ``seconds``; the next line reports it."""
        self._unreported_save += seconds
        self.progress["save_seconds"] += seconds

    def snapshot(self, wall_seconds: float, health: dict[str, Any]) -> dict[str, Any]:
        """Progress to keep with a checkpoint; a collective, since the peak memory is that of all ranks.

        Args:
            wall_seconds: of training in all starts.
            health: ``StepHealth.state``.
        """
        peak, kept = most_over_ranks(memory_gib(), kept_gib())
        self.progress["peak_memory_gib"] = max(self.progress["peak_memory_gib"], peak)
        self.progress["kept_by_allocator_gib"] = kept if kept >= 0 else None
        seconds = max(self.progress["rank_seconds"], 1e-9)
        rate, share = flops.utilisation(self.progress["flops"], seconds, 1, self._settings.gpu_tflops)
        return self.progress | {
            "recent_losses": list(self._recent),
            "wall_seconds": wall_seconds,
            "tflops_per_rank": rate,
            "mfu": share,
            "health": health,
        }

    def close(self) -> None:
        """Training has ended."""
        self._watch.close()
        if dist.get_rank() == 0:
            self._stream.close()
            self._loads.close()
            self._board.close()

    def _utilisation(self, operations: float, seconds: float) -> tuple[float, float | None]:
        return flops.utilisation(operations, seconds, dist.get_world_size(), self._settings.gpu_tflops)

    def _line(self, step: int, result: StepResult, learning_rate: float, operations: float) -> dict[str, Any]:
        rate, share = self._utilisation(operations, result.seconds)
        line = {
            "step": step,
            "epoch": round(self._schedule.epoch(step), 6),
            "loss": result.loss,
            "learning_rate": learning_rate,
            "grad_norm": result.gradient_norm,
            "tokens": result.tokens,
            "trained_tokens": result.trained_tokens,
            "tokens_per_second": round(result.tokens / result.seconds, 3),
            "tokens_per_second_per_rank": round(result.tokens / result.seconds / dist.get_world_size(), 3),
            "tflops_per_rank": round(rate, 6),
            "mfu": None if share is None else round(share, 4),
            "seconds": round(result.seconds, 6),
            **{f"seconds_{phase}": round(value, 6) for phase, value in result.phases.items()},
            "seconds_save": round(self._unreported_save, 6),
            "seconds_slowed": None if self._slowed is None else round(self._slowed, 6),
            "update": "applied" if result.verdict.apply else "skipped",
        }
        for key in ("loss", "grad_norm"):
            if not math.isfinite(line[key]):
                line[key] = None  # JSON has no NaN; ``update`` is "skipped" then
        return line

    def _write(self, line: dict[str, Any]) -> None:
        self._stream.write(json.dumps(line, allow_nan=False) + "\n")
        self._stream.flush()
        for key, value in line.items():
            if key in ("compute_seconds", "clock_mhz"):  # of each rank: how far the worst lies from the middle
                worst = max(value) if key == "compute_seconds" else min(value)
                self._board.add_scalar(f"train/{key}_worst", worst, line["step"])
                self._board.add_scalar(f"train/{key}_median", statistics.median(value), line["step"])
            elif isinstance(value, list):
                for layer, one in enumerate(value):
                    self._board.add_scalar(f"{key}/moe_layer_{layer:02d}", one, line["step"])
            elif isinstance(value, int | float) and key != "step":
                self._board.add_scalar(f"train/{key}", value, line["step"])
        self._board.flush()

    def _tell_end(self, step: int) -> None:
        """What the plan could only estimate, from the first steps of this start."""
        each, left = statistics.median(self._seconds), self._schedule.steps - step
        end = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=left * each)
        say(
            f"measured over {MEASURED} steps: {formatting.duration(each)} a step; the other {left:,} take "
            f"{formatting.duration(left * each)}, to {end:%Y-%m-%d %H:%M} UTC, saves and new starts not counted"
        )

    def _tell(self, line: dict[str, Any]) -> None:
        steps = self._schedule.steps
        left = (steps - line["step"]) * statistics.median(self._seconds)
        if chosen := self._settings.validation:
            left += -(-(steps - line["step"]) // chosen.every_steps) * self._validation_seconds
        share = "" if line["mfu"] is None else f"  MFU {line['mfu']:.1%}"
        loss, norm = (float("nan") if line[key] is None else line[key] for key in ("loss", "grad_norm"))
        say(
            f"step {line['step']}/{steps}  loss {loss:.4f}  lr {line['learning_rate']:.3g}  grad {norm:.3g}  "
            f"{line['tokens_per_second']:.0f} tokens/s{share}  {line['useful_slots']:.0%} of slots  "
            f"{line['seconds']:.2f} s  {_validated(line)}" + (f"{formatting.duration(left)} left" if left else "done")
        )


def _validated(line: dict[str, Any]) -> str:
    if "validation_loss" not in line:
        return ""
    loss = line["validation_loss"]
    shown = "not finite" if loss is None else f"{loss:.4f}"
    return f"validation loss {shown} in {line['seconds_validation']:.1f} s  "
