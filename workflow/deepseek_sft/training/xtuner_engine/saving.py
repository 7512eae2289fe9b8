"""How a checkpoint is saved and committed: at once, or written while the next step computes."""

import os
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ... import engines
from ...cli import say
from ...convert import rank_state
from ...data import loss_rows
from ...files import fsync_directory
from .. import checkpoints, lock, validation
from ..watchdog import Watchdog
from . import final_losses
from .background_writer import BackgroundWriter
from .config import Attempt, EngineConfig
from .engine import XtunerEngine
from .memory import GIB, rank_device
from .phases import WAITING
from .start_checks import bias_checksum
from .step_result import StepResult


@dataclass(frozen=True)
class Written:
    """What a rank tells of its files: name and size, name and digest, and the checksum of its routers' biases."""

    sizes: dict[str, int]
    digests: dict[str, str]
    biases: Any


@dataclass(frozen=True)
class _Pending:
    """A checkpoint that is being written.

    Attributes:
        progress: for its marker.
        begun: monotonic time.
    """

    step: int
    folder: Path
    progress: dict[str, Any]
    biases: Any
    files: "Future[tuple[dict[str, int], dict[str, str]]]"
    begun: float


class Checkpoints:
    """Saves, commits, and then removes the checkpoints that are not kept. Every method is a collective."""

    def __init__(self, config: EngineConfig, attempt: Attempt, engine: XtunerEngine, watchdog: Watchdog):
        self._config, self._attempt, self._engine, self._watchdog = config, attempt, engine, watchdog
        self._last_bytes = 0
        self._writer = BackgroundWriter() if config.settings.async_save == "auto" else None
        self._pending: _Pending | None = None

    @property
    def is_writing(self) -> bool:
        """Whether a checkpoint is being written that ``finish`` has to commit; the same on all ranks."""
        return self._pending is not None

    def is_due(self, step: int, result: StepResult) -> bool:
        """Whether step ``step`` is saved: by number, as the last one, or because it is asked for."""
        asked = result.stop_requested or result.save_due or result.time_is_up
        return asked or step == self._config.schedule.steps or step % self._config.settings.save_every_steps == 0

    def save(
        self, step: int, result: StepResult, progress: Callable[[], dict[str, Any]], at_once: bool = False
    ) -> float:
        """Save step ``step``; returns the seconds that it took here.

        With ``async_save: auto`` it is only begun, unless no step follows: ``finish`` must come before the next update.

        Args:
            progress: asked for on all ranks; kept in the marker.
            at_once: commit it now, whatever follows.

        Raises:
            RuntimeError: on all ranks alike, the checkpoint was not committed.
        """
        goes_on = step < self._config.schedule.steps and not (result.stop_requested or result.time_is_up)
        if self._writer and goes_on and not at_once:
            return self._begin(step, progress)
        self._watchdog.enter("save", step)
        started = time.monotonic()
        folder = self._folder(step)
        self._engine.save(folder, step)
        own = checkpoints.files_of_rank(folder, dist.get_rank())
        for name in own:
            with open(folder / name, "rb") as stream:
                os.fsync(stream.fileno())
        fsync_directory(folder)
        kept = progress()
        written = Written(own, rank_state.digests_of(folder, own), bias_checksum(self._engine.model.llm))
        self._agree(step, folder, kept, written)
        seconds = time.monotonic() - started
        self._watchdog.took("save", seconds)
        if dist.get_rank() == 0:
            say(f"checkpoint {folder.name} committed: {self._last_bytes / GIB:.2f} GiB in {seconds:.1f} s")
        return seconds

    def _begin(self, step: int, progress: Callable[[], dict[str, Any]]) -> float:
        self._watchdog.enter("save", step)
        started = time.monotonic()
        folder = self._folder(step)
        files = self._engine.describe(folder, step)
        biases = bias_checksum(self._engine.model.llm)
        written = self._writer.write(folder, dist.get_rank(), files)
        self._pending = _Pending(step, folder, progress(), biases, written, started)
        return time.monotonic() - started

    def finish(self, step: int) -> float:
        """Wait until the checkpoint that ``save`` has begun is written, and commit it; returns the seconds it took.

        Args:
            step: that waits.

        Raises:
            OSError, RuntimeError: this rank could not write its files; or, on all ranks alike, it was not committed.
        """
        pending = self._pending
        if self._engine.device.type == "cuda":
            torch.cuda.synchronize(self._engine.device)  # what the step has queued is the step's time
        self._watchdog.enter("save", step)
        self._watchdog.place = WAITING
        started = time.monotonic()
        sizes, digests = self._writer.result(pending.files, pending.folder.name, told=dist.get_rank() == 0)
        self._agree(pending.step, pending.folder, pending.progress, Written(sizes, digests, pending.biases))
        self._pending = None
        ended = time.monotonic()
        self._watchdog.took("save", ended - pending.begun)
        self._watchdog.enter("step", step)
        if dist.get_rank() == 0:
            say(
                f"checkpoint {pending.folder.name} committed: {self._last_bytes / GIB:.2f} GiB in "
                f"{ended - pending.begun:.1f} s beside step {step}, which waited {ended - started:.1f} s"
            )
        return ended - started

    def close(self) -> None:
        """Training has ended: wait for what is still being removed.

        Raises:
            OSError: it could not be removed.
        """
        if self._writer:
            self._writer.close()

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

    def _folder(self, step: int) -> Path:
        if self._writer:
            self._writer.check()  # older ones are gone
        if dist.get_rank() == 0:
            checkpoints.make_room(self._attempt.run, self._last_bytes)
        return checkpoints.folder_of(self._attempt.run, step)

    def _agree(self, step: int, folder: Path, progress: dict[str, Any], written: Written) -> None:
        """Commit once all ranks have written.

        Raises:
            RuntimeError: on all ranks alike, it was not committed.
        """
        told: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(told, written)  # waits for all
        failure = None
        if dist.get_rank() == 0:
            try:
                self._commit(folder, step, progress, told)
            except Exception as error:
                failure = error
        outcome = [str(failure) if failure else None]
        dist.broadcast_object_list(outcome, device=rank_device())
        if outcome[0]:
            raise RuntimeError(f"checkpoint of step {step} was not committed: {outcome[0]}") from failure

    def _commit(self, folder: Path, step: int, progress: dict[str, Any], told: list[Written]) -> None:
        other = [rank for rank, written in enumerate(told) if written.biases != told[0].biases]
        if other:
            raise RuntimeError(f"the routers' correction biases of rank {other[0]} differ from rank 0's")
        sizes = {name: size for written in told for name, size in written.sizes.items()}
        content = {name: digest for written in told for name, digest in written.digests.items()}
        # A start that Slurm took for dead must not commit beside the one that goes on elsewhere.
        lock.check_attempt(folder.parent, self._attempt.name)
        marker = marker_of(self._config, step, progress)
        checkpoints.commit(folder, marker | {"checksums": content}, sizes)
        self._last_bytes = sum(sizes.values())
        if self._pending:
            self._writer.after(self._prune, folder.parent)
        else:
            self._prune(folder.parent)

    def _prune(self, run: Path) -> None:
        """Remove what is not kept: neither the newest ones nor the one that would be converted."""
        run_id, chosen = self._config.run_id, self._config.settings
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
