"""What happens around each step, in this order: learning rate; metrics; first-loss gate; checkpoint."""

import json
import os
import resource
from collections import deque
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from mmengine.hooks import Hook

from ...cli import say
from ...errors import GateError
from .. import checkpoints, run_folder
from ..schedule import Schedule
from .loop import StepResult

RECENT = 10  # steps whose mean loss is reported as the last loss
GIB = 1 << 30


class LearningRateHook(Hook):
    """Sets the learning rate of each step; a function of the step alone, so nothing of it is saved or resumed."""

    def __init__(self, schedule: dict[str, Any]):
        self.schedule = Schedule(**schedule)

    def before_train_iter(self, runner, batch_idx: int, data_batch: Any = None) -> None:
        rate = self.schedule.learning_rate(runner.iter + 1)
        for group in runner.optim_wrapper.optimizer.param_groups:
            group["lr"] = rate


class MetricsHook(Hook):
    """Keeps the run's progress; rank 0 writes a line to metrics.jsonl, TensorBoard and standard error."""

    def __init__(self, log_every_steps: int):
        self.log_every_steps = log_every_steps

    def before_train(self, runner) -> None:
        before = runner.cfg.progress
        self.progress = {
            "hosts": runner.cfg.hosts,
            "nodes": runner.cfg.nodes,
            "parameters": sum(p.ds_numel for p in runner.model.parameters()),
            "resumed_from_step": runner.iter or None,
            "first_loss": before.get("first_loss"),
            "tokens": before.get("tokens", 0),
            "trained_tokens": before.get("trained_tokens", 0),
            "seconds": before.get("seconds", 0.0),
            "peak_memory_gib": before.get("peak_memory_gib", 0.0),
        }
        self.recent = deque(before.get("recent_losses", []), maxlen=RECENT)
        self.schedule = Schedule(**runner.cfg.custom_hooks[0].schedule)
        if dist.get_rank() == 0:
            from torch.utils.tensorboard import SummaryWriter

            run = Path(runner.cfg.run)
            run_folder.cut_metrics(run, runner.iter)
            self.stream = open(run / run_folder.METRICS, "a", encoding="utf-8")  # noqa: SIM115  closed after training
            self.board = SummaryWriter(run / "tensorboard", purge_step=runner.iter + 1)

    def after_train_iter(
        self, runner, batch_idx: int, data_batch: Any = None, outputs: StepResult | None = None
    ) -> None:
        step, result = runner.iter + 1, outputs
        self.recent.append(result.loss)
        if step == 1:
            self.progress["first_loss"] = result.loss
        for key in ("tokens", "trained_tokens", "seconds"):
            self.progress[key] += getattr(result, key)
        if dist.get_rank() == 0 and (step == 1 or step % self.log_every_steps == 0 or step == runner.max_iters):
            self._write(step, result, runner.optim_wrapper.optimizer.param_groups[0]["lr"], runner.max_iters)

    def after_train(self, runner) -> None:
        if dist.get_rank() == 0:
            self.stream.close()
            self.board.close()

    def snapshot(self) -> dict[str, Any]:
        """Progress to keep with a checkpoint; a collective, since the peak memory is that of all ranks."""
        peak = torch.tensor([memory_gib()], dtype=torch.float64, device=_device())
        dist.all_reduce(peak, op=dist.ReduceOp.MAX)
        self.progress["peak_memory_gib"] = round(max(self.progress["peak_memory_gib"], peak.item()), 3)
        return self.progress | {"recent_losses": list(self.recent)}

    def _write(self, step: int, result: StepResult, rate: float, steps: int) -> None:
        line = {
            "step": step,
            "epoch": round(self.schedule.epoch(step), 6),
            "loss": result.loss,
            "learning_rate": rate,
            "grad_norm": result.gradient_norm,
            "tokens": result.tokens,
            "trained_tokens": result.trained_tokens,
            "tokens_per_second": round(result.tokens / result.seconds, 3),
            "seconds": round(result.seconds, 6),
            "memory_gib": round(memory_gib(), 3),
        }
        self.stream.write(json.dumps(line) + "\n")
        self.stream.flush()
        for key in line.keys() - {"step"}:
            self.board.add_scalar(f"train/{key}", line[key], step)
        say(
            f"step {step}/{steps}  loss {result.loss:.4f}  lr {rate:.3g}  grad {result.gradient_norm:.3g}  "
            f"{line['tokens_per_second']:.0f} tokens/s  {result.seconds:.2f} s"
        )


class FirstLossHook(Hook):
    """Gate: a base model that is loaded or computed wrongly shows in the first loss, before any GPU hours are spent."""

    def __init__(self, first_loss_max: float | None):
        self.first_loss_max = first_loss_max

    def after_train_iter(
        self, runner, batch_idx: int, data_batch: Any = None, outputs: StepResult | None = None
    ) -> None:
        if runner.iter == 0 and self.first_loss_max is not None and outputs.loss > self.first_loss_max:
            message = f"the first loss is {outputs.loss:.4f}, above train.first_loss_max {self.first_loss_max}"
            if dist.get_rank() == 0:
                run_folder.write_gate(Path(runner.cfg.run), "first_loss", message, outputs.loss)
            raise GateError(message, "check the base model and its config, or raise train.first_loss_max")


class CheckpointHook(Hook):
    """Saves every so many steps, at the last step, and on a stop request; commits; then removes old checkpoints."""

    def __init__(self, save_every_steps: int, keep_checkpoints: int):
        self.save_every_steps, self.keep_checkpoints = save_every_steps, keep_checkpoints

    def after_train_iter(
        self, runner, batch_idx: int, data_batch: Any = None, outputs: StepResult | None = None
    ) -> None:
        step = runner.iter + 1
        if step % self.save_every_steps == 0 or step == runner.max_iters or outputs.stop_requested:
            self.save(runner, step)

    def save(self, runner, step: int) -> None:
        run, rank = Path(runner.cfg.run), dist.get_rank()
        folder = checkpoints.folder_of(run, step)
        runner.save_checkpoint(str(run), folder.name, by_epoch=False)
        for path in folder.glob(f"*zero_pp_rank_{rank}_mp_rank_*"):
            with open(path, "rb") as stream:
                os.fsync(stream.fileno())
        metrics = next(hook for hook in runner.hooks if isinstance(hook, MetricsHook))
        progress = metrics.snapshot()  # waits for all ranks, so their files are down
        failure = None
        if rank == 0:
            try:
                checkpoints.commit(folder, marker_of(runner, step, progress))
                checkpoints.prune(run, runner.cfg.run_id, self.keep_checkpoints)
                say(f"checkpoint {folder.name} committed")
            except Exception as error:
                failure = error
        outcome = [str(failure) if failure else None]
        dist.broadcast_object_list(outcome, device=_device())
        if outcome[0]:
            raise RuntimeError(f"checkpoint of step {step} was not committed: {outcome[0]}") from failure


def marker_of(runner, step: int, progress: dict[str, Any]) -> dict[str, Any]:
    """The commit marker; docs/training.md specifies it."""
    return {
        "run_id": runner.cfg.run_id,
        "step": step,
        "steps": runner.max_iters,
        "world_size": dist.get_world_size(),
        "engine": "xtuner",
        "zero_stage": 3,
        "parameter_prefix": "llm.",
        "experts": {"layout": "w1w3_w2", "experts_per_shard": runner.cfg.model.experts_per_shard},
        "dtype": runner.cfg.model.dtype,
        "progress": progress,
    }


def memory_gib() -> float:
    """Peak memory of this process: of the GPU's allocator, on CPU the resident set."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
