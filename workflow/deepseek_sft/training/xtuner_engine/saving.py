"""How a checkpoint is saved and committed."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ... import engines
from ...cli import say
from ...convert import rank_state
from ...data import loss_rows
from ...files import fsync_directory
from .. import checkpoints, lock, validation
from ..watchdog import Watchdog
from . import final_losses
from .config import Attempt, EngineConfig
from .engine import XtunerEngine
from .memory import GIB, rank_device
from .start_checks import bias_checksum
from .step_result import StepResult


class Checkpoints:
    """Saves, commits, and then removes the checkpoints that are not kept. Every method is a collective."""

    def __init__(self, config: EngineConfig, attempt: Attempt, engine: XtunerEngine, watchdog: Watchdog):
        self._config, self._attempt, self._engine, self._watchdog = config, attempt, engine, watchdog
        self._last_bytes = 0

    def is_due(self, step: int, result: StepResult) -> bool:
        """Whether step ``step`` is saved: by number, as the last one, or because it is asked for."""
        asked = result.stop_requested or result.save_due or result.time_is_up
        return asked or step == self._config.schedule.steps or step % self._config.settings.save_every_steps == 0

    def save(self, step: int, progress: Callable[[], dict[str, Any]]) -> float:
        """Save step ``step`` and commit it; returns the seconds that it took.

        Args:
            progress: asked for, on all ranks, once the files are written; kept in the marker.

        Raises:
            RuntimeError: on all ranks alike, the checkpoint was not committed.
        """
        self._watchdog.enter("save", step)
        started = time.monotonic()
        run, rank = self._attempt.run, dist.get_rank()
        folder = checkpoints.folder_of(run, step)
        if rank == 0:
            checkpoints.make_room(run, self._last_bytes)
        self._engine.save(folder, step)
        own = checkpoints.files_of_rank(folder, rank)
        for name in own:
            with open(folder / name, "rb") as stream:
                os.fsync(stream.fileno())
        fsync_directory(folder)
        kept = progress()
        told: list[Any] = [None] * dist.get_world_size()
        content = rank_state.digests_of(folder, own)
        dist.all_gather_object(told, (own, content, bias_checksum(self._engine.model.llm)))  # waits for all
        failure = None
        if rank == 0:
            try:
                self._commit(folder, step, kept, told)
            except Exception as error:
                failure = error
        outcome = [str(failure) if failure else None]
        dist.broadcast_object_list(outcome, device=rank_device())
        if outcome[0]:
            raise RuntimeError(f"checkpoint of step {step} was not committed: {outcome[0]}") from failure
        seconds = time.monotonic() - started
        self._watchdog.took("save", seconds)
        if rank == 0:
            say(f"checkpoint {folder.name} committed: {self._last_bytes / GIB:.2f} GiB in {seconds:.1f} s")
        return seconds

    def leave_losses(self, step: int) -> None:
        """Add the losses of a few rows under the final weights to the marker of step ``step``.

        After the commit: should this fail, the checkpoint is there, and the smoke test says that it was not measured.
        """
        self._watchdog.enter("save", step)
        started = time.monotonic()
        config = self._config
        found = final_losses.measure(self._engine.deepspeed, Path(config.tokens), config.settings.dtype, step)
        if dist.get_rank() == 0:
            checkpoints.amend(checkpoints.folder_of(self._attempt.run, step), {loss_rows.KEY: found})
            tokens = sum(len(row["losses"]) for row in found["rows"])
            say(f"losses of {len(found['rows'])} rows, {tokens} tokens, measured in {time.monotonic() - started:.1f} s")

    def _commit(self, folder: Path, step: int, progress: dict[str, Any], told: list[Any]) -> None:
        other = [rank for rank, (_, _, checksum) in enumerate(told) if checksum != told[0][2]]
        if other:
            raise RuntimeError(f"the routers' correction biases of rank {other[0]} differ from rank 0's")
        written = {name: size for files, _, _ in told for name, size in files.items()}
        content = {name: digest for _, of_rank, _ in told for name, digest in of_rank.items()}
        # A start that Slurm took for dead must not commit beside the one that goes on elsewhere.
        lock.check_attempt(folder.parent, self._attempt.name)
        marker = marker_of(self._config, step, progress)
        checkpoints.commit(folder, marker | {"checksums": content}, written)
        self._last_bytes = sum(written.values())
        run, run_id, chosen = folder.parent, self._config.run_id, self._config.settings
        best = validation.result(checkpoints.committed(run, run_id), chosen.validation)
        checkpoints.prune(run, run_id, chosen.keep_checkpoints, best)


def marker_of(config: EngineConfig, step: int, progress: dict[str, Any]) -> dict[str, Any]:
    """The commit marker; docs/training.md specifies it."""
    return {
        "run_id": config.run_id,
        "step": step,
        "steps": config.schedule.steps,
        "schedule": config.schedule.told_after(step),
        "world_size": dist.get_world_size(),
        "engine": engines.XTUNER.name,
        **engines.XTUNER.checkpoint.marker(config.settings.experts_per_shard, config.settings.expert_parallel_size),
        "dtype": config.settings.dtype,
        "progress": progress,
    }
