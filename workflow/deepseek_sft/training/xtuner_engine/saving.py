"""When a checkpoint is saved, and how it is committed."""

import os
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist
from mmengine.hooks import Hook

from ...checkpoint import rank_state
from ...cli import say
from ...files import fsync_directory
from .. import checkpoints, lock, loss_rows
from . import final_losses
from .loop import StepResult
from .metrics import GIB, MetricsHook, rank_device
from .start_checks import bias_checksum


class CheckpointHook(Hook):
    """Saves every so many steps or minutes, at the end, and on a stop request; commits; then removes old checkpoints.

    Minutes are counted by rank 0 since the last checkpoint of whatever reason.
    """

    def __init__(self, save_every_steps: int, keep_checkpoints: int):
        self.save_every_steps, self.keep_checkpoints = save_every_steps, keep_checkpoints
        self.last_bytes = 0

    def after_train_iter(
        self, runner, batch_idx: int, data_batch: Any = None, outputs: StepResult | None = None
    ) -> None:
        step = runner.iter + 1
        last = step == runner.max_iters
        asked = outputs.stop_requested or outputs.save_due or outputs.time_is_up
        if asked or last or step % self.save_every_steps == 0:
            self.save(runner, step)
        if last or outputs.time_is_up:
            self.leave_losses(runner, step)

    def leave_losses(self, runner, step: int) -> None:
        """Add the losses of a few rows under the final weights to the marker of step ``step``; a collective.

        After the commit: should this fail, the checkpoint is there, and the smoke test says that it was not measured.
        """
        runner.watchdog.enter("save", step)
        started = time.monotonic()
        cfg = runner.cfg
        found = final_losses.measure(runner.model.model, Path(cfg.train_dataloader.dataset.path), cfg.model.dtype, step)
        if dist.get_rank() == 0:
            checkpoints.amend(checkpoints.folder_of(Path(cfg.run), step), {loss_rows.KEY: found})
            tokens = sum(len(row["losses"]) for row in found["rows"])
            say(f"losses of {len(found['rows'])} rows, {tokens} tokens, measured in {time.monotonic() - started:.1f} s")

    def save(self, runner, step: int) -> None:
        """Save step ``step`` and commit it; a collective.

        Raises:
            RuntimeError: on all ranks alike, the checkpoint was not committed.
        """
        runner.watchdog.enter("save", step)
        started = time.monotonic()
        run, rank = Path(runner.cfg.run), dist.get_rank()
        folder = checkpoints.folder_of(run, step)
        if rank == 0:
            checkpoints.make_room(run, self.last_bytes)
        runner.save_checkpoint(str(run), folder.name, by_epoch=False)
        own = checkpoints.files_of_rank(folder, rank)
        for name in own:
            with open(folder / name, "rb") as stream:
                os.fsync(stream.fileno())
        fsync_directory(folder)
        metrics = next(hook for hook in runner.hooks if isinstance(hook, MetricsHook))
        progress = metrics.snapshot(runner)
        told: list[Any] = [None] * dist.get_world_size()
        content = rank_state.digests_of(folder, own)
        dist.all_gather_object(told, (own, content, bias_checksum(runner.model.model.module.llm)))  # waits for all
        failure = None
        if rank == 0:
            try:
                self._commit(runner, folder, step, progress, told)
            except Exception as error:
                failure = error
        outcome = [str(failure) if failure else None]
        dist.broadcast_object_list(outcome, device=rank_device())
        if outcome[0]:
            raise RuntimeError(f"checkpoint of step {step} was not committed: {outcome[0]}") from failure
        seconds = time.monotonic() - started
        metrics.saved(seconds)
        runner.watchdog.took("save", seconds)
        runner.requests.saved = time.monotonic()
        if rank == 0:
            say(f"checkpoint {folder.name} committed: {self.last_bytes / GIB:.2f} GiB in {seconds:.1f} s")

    def _commit(self, runner, folder: Path, step: int, progress: dict[str, Any], told: list[Any]) -> None:
        other = [rank for rank, (_, _, checksum) in enumerate(told) if checksum != told[0][2]]
        if other:
            raise RuntimeError(f"the routers' correction biases of rank {other[0]} differ from rank 0's")
        written = {name: size for files, _, _ in told for name, size in files.items()}
        content = {name: digest for _, of_rank, _ in told for name, digest in of_rank.items()}
        # A start that Slurm took for dead must not commit beside the one that goes on elsewhere.
        lock.check_attempt(folder.parent, runner.cfg.attempt)
        checkpoints.commit(folder, marker_of(runner, step, progress) | {"checksums": content}, written)
        self.last_bytes = sum(written.values())
        checkpoints.prune(folder.parent, runner.cfg.run_id, self.keep_checkpoints)


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
