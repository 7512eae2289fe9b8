"""What a run tells while it trains: metrics.jsonl, TensorBoard, a line on standard error, and progress to keep."""

import json
import math
import resource
import statistics
from collections import deque
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from mmengine.hooks import Hook

from ...cli import say
from ...model import release
from ...report import formatting
from .. import flops, process_memory, run_folder
from ..schedule import Schedule
from .expert_load import ExpertLoad, LoadRecords, balance
from .loop import StepResult
from .rank_watch import RankWatch

RECENT = 10  # steps whose mean loss is reported as the last loss
STEADY = 20  # steps whose median time predicts the time left
GIB = 1 << 30


class MetricsHook(Hook):
    """Keeps the run's progress; rank 0 writes a line for each logged step.

    Args:
        gpu_tflops: peak of one GPU; None leaves the utilisation unknown.
        slow_rank_percent: see ``RankWatch``.
    """

    def __init__(self, log_every_steps: int, gpu_tflops: float | None, slow_rank_percent: float | None = None):
        self.log_every_steps, self.gpu_tflops, self.slow_rank_percent = log_every_steps, gpu_tflops, slow_rank_percent

    def before_train(self, runner) -> None:
        before = runner.cfg.progress
        config = release.read_config(Path(runner.cfg.model.base))
        self.flops = flops.StepFlops.of(config)
        self.progress = {
            "hosts": runner.cfg.hosts,
            "nodes": runner.cfg.nodes,
            "parameters": sum(p.ds_numel for p in runner.model.parameters()),
            "resumed_from_step": runner.iter or None,
            "first_loss": before.get("first_loss"),
            "tokens": before.get("tokens", 0),
            "trained_tokens": before.get("trained_tokens", 0),
            "flops": before.get("flops", 0.0),
            "seconds": before.get("seconds", 0.0),
            "save_seconds": before.get("save_seconds", 0.0),
            "peak_memory_gib": before.get("peak_memory_gib", 0.0),
            "memory_before_model_gib": runner.cfg.memory_before_model_gib,
            "kept_by_allocator_gib": before.get("kept_by_allocator_gib"),
        }
        self.recent = deque(before.get("recent_losses", []), maxlen=RECENT)
        self.steps = deque(maxlen=STEADY)
        self.unreported_save = 0.0
        self.schedule = Schedule(**runner.cfg.custom_hooks[0].schedule)
        wrapped = runner.model.model.module
        self.load = wrapped.expert_load = ExpertLoad(wrapped.llm.routers(), rank_device())
        folder = Path(runner.cfg.run).parent.parent  # <results>/train
        self.watch = RankWatch(wrapped.llm.model.layers, rank_device(), folder, self.slow_rank_percent, runner.iter)
        if dist.get_rank() == 0:
            from torch.utils.tensorboard import SummaryWriter

            run = Path(runner.cfg.run)
            run_folder.cut_metrics(run, runner.iter)
            self.stream = open(run / run_folder.METRICS, "a", encoding="utf-8")  # noqa: SIM115  closed after training
            self.board = SummaryWriter(run / "tensorboard", purge_step=runner.iter + 1)
            self.loads = LoadRecords(
                run / run_folder.EXPERT_LOAD, runner.iter, runner.max_iters, config.get("first_k_dense_replace", 0)
            )

    def after_train_iter(
        self, runner, batch_idx: int, data_batch: Any = None, outputs: StepResult | None = None
    ) -> None:
        step, result = runner.iter + 1, outputs
        if math.isfinite(result.loss):
            self.recent.append(result.loss)
        self.steps.append(result.seconds)
        self.watch.clock.collect()
        if step == 1 and math.isfinite(result.loss):
            self.progress["first_loss"] = result.loss
        for key in ("tokens", "trained_tokens", "seconds"):
            self.progress[key] += getattr(result, key)
        operations = self.flops.step(result.tokens, result.pairs)
        self.progress["flops"] += operations
        if result.verdict.message and dist.get_rank() == 0:
            say(f"warning: {result.verdict.message}" + ("" if result.verdict.apply else "; its update was skipped"))
        if step == 1 or step % self.log_every_steps == 0 or step == runner.max_iters:
            counts = self.load.take()  # a collective
            ranks = self.watch.told(step)  # a collective
            gpu, host, kept = _most_over_ranks(memory_gib(), resident_gib(), kept_gib())
            if dist.get_rank() == 0:
                rate = runner.optim_wrapper.optimizer.param_groups[0]["lr"]
                line = self._line(step, result, rate, operations) | {"memory_gib": gpu, "host_memory_gib": host}
                line["kept_by_allocator_gib"] = kept if kept >= 0 else None
                self._write(line | balance(counts) | ranks)
                self.loads.add(step, counts)
                self._tell(line, runner.max_iters)
            self.unreported_save = 0.0

    def after_train(self, runner) -> None:
        self.watch.close()
        if dist.get_rank() == 0:
            self.stream.close()
            self.loads.close()
            self.board.close()

    def saved(self, seconds: float) -> None:
        """A checkpoint took ``seconds``; the next line reports it."""
        self.unreported_save += seconds
        self.progress["save_seconds"] += seconds

    def snapshot(self, runner) -> dict[str, Any]:
        """Progress to keep with a checkpoint; a collective, since the peak memory is that of all ranks."""
        peak, kept = _most_over_ranks(memory_gib(), kept_gib())
        self.progress["peak_memory_gib"] = max(self.progress["peak_memory_gib"], peak)
        self.progress["kept_by_allocator_gib"] = kept if kept >= 0 else None
        done = self.progress
        rate, share = flops.utilisation(
            done["flops"], max(done["seconds"], 1e-9), dist.get_world_size(), self.gpu_tflops
        )
        return done | {
            "recent_losses": list(self.recent),
            "wall_seconds": runner.requests.wall_seconds(),
            "tflops_per_rank": rate,
            "mfu": share,
            "health": runner.guard.health.state(),
        }

    def _line(self, step: int, result: StepResult, learning_rate: float, operations: float) -> dict[str, Any]:
        ranks = dist.get_world_size()
        rate, share = flops.utilisation(operations, result.seconds, ranks, self.gpu_tflops)
        line = {
            "step": step,
            "epoch": round(self.schedule.epoch(step), 6),
            "loss": result.loss,
            "learning_rate": learning_rate,
            "grad_norm": result.gradient_norm,
            "tokens": result.tokens,
            "trained_tokens": result.trained_tokens,
            "tokens_per_second": round(result.tokens / result.seconds, 3),
            "tokens_per_second_per_rank": round(result.tokens / result.seconds / ranks, 3),
            "tflops_per_rank": round(rate, 6),
            "mfu": None if share is None else round(share, 4),
            "seconds": round(result.seconds, 6),
            **{f"seconds_{phase}": round(value, 6) for phase, value in result.phases.items()},
            "seconds_save": round(self.unreported_save, 6),
            "update": "applied" if result.verdict.apply else "skipped",
        }
        for key in ("loss", "grad_norm"):
            if not math.isfinite(line[key]):
                line[key] = None  # JSON has no NaN; ``update`` is "skipped" then
        return line

    def _write(self, line: dict[str, Any]) -> None:
        self.stream.write(json.dumps(line, allow_nan=False) + "\n")
        self.stream.flush()
        for key, value in line.items():
            if key in ("compute_seconds", "clock_mhz"):  # of each rank: how far the worst lies from the middle
                worst = max(value) if key == "compute_seconds" else min(value)
                self.board.add_scalar(f"train/{key}_worst", worst, line["step"])
                self.board.add_scalar(f"train/{key}_median", statistics.median(value), line["step"])
            elif isinstance(value, list):
                for layer, one in enumerate(value):
                    self.board.add_scalar(f"{key}/moe_layer_{layer:02d}", one, line["step"])
            elif isinstance(value, int | float) and key != "step":
                self.board.add_scalar(f"train/{key}", value, line["step"])
        self.board.flush()

    def _tell(self, line: dict[str, Any], steps: int) -> None:
        left = (steps - line["step"]) * statistics.median(self.steps)
        share = "" if line["mfu"] is None else f"  MFU {line['mfu']:.1%}"
        loss, norm = (float("nan") if line[key] is None else line[key] for key in ("loss", "grad_norm"))
        say(
            f"step {line['step']}/{steps}  loss {loss:.4f}  lr {line['learning_rate']:.3g}  grad {norm:.3g}  "
            f"{line['tokens_per_second']:.0f} tokens/s{share}  {line['seconds']:.2f} s  "
            + (f"{formatting.duration(left)} left" if left else "done")
        )


def memory_gib() -> float:
    """Peak memory of this process: of the GPU's allocator, on CPU the resident set."""
    return torch.cuda.max_memory_allocated() / GIB if torch.cuda.is_available() else resident_gib()


def resident_gib() -> float:
    """Peak resident set of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def kept_gib() -> float:
    """Freed memory that the C library keeps in this process; -1 where it does not tell."""
    kept = process_memory.kept_by_allocator()
    return -1.0 if kept is None else kept / GIB


def rank_device() -> torch.device:
    """Where this rank's tensors live."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def _most_over_ranks(*values: float) -> list[float]:
    together = torch.tensor(values, dtype=torch.float64, device=rank_device())
    dist.all_reduce(together, op=dist.ReduceOp.MAX)
    return [round(value, 3) for value in together.tolist()]
