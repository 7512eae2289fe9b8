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

from ... import engines, saving_tiers
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
from .node_local import NodeLocal, gather
from .phases import WAITING
from .start_checks import bias_checksum
from .step_result import Due, StepResult


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
        files: what came of writing them: sizes and digests, or ``node_local.Written``.
        begun: monotonic time.
        where: it lies.
        copies: likewise, with what the next node has; None on the shared storage.
    """

    step: int
    folder: Path
    progress: dict[str, Any]
    biases: Any
    files: "Future[Any]"
    begun: float
    where: Due
    copies: "Future[Any] | None" = None


class Checkpoints:
    """Saves, commits, and then removes the checkpoints that are not kept. Every method is a collective."""

    def __init__(
        self,
        config: EngineConfig,
        attempt: Attempt,
        engine: XtunerEngine,
        watchdog: Watchdog,
        local: NodeLocal | None = None,
    ):
        self._config, self._attempt, self._engine, self._watchdog = config, attempt, engine, watchdog
        self._last_bytes = 0
        self._local = local
        self._beside = config.settings.async_save == "auto"
        self._writer = BackgroundWriter() if self._beside or local else None
        self._pending: _Pending | None = None

    @property
    def writing(self) -> Due:
        """Where a checkpoint is being written that ``finish`` has to commit; the same on all ranks.

        One on the nodes' own disks is none to stop with: the next start may be on other nodes.
        """
        return self._pending.where if self._pending else Due.NOWHERE

    def due(self, step: int, result: StepResult, ended: bool = False) -> Due:
        """Where step ``step`` is saved: by number, as the last one, or because it is asked for.

        What ends or stops the run lies on the shared storage, as does what can become its result.
        """
        asked = ended or result.stop_requested or result.time_is_up
        if asked or step == self._config.schedule.steps or step % self._config.settings.save_every_steps == 0:
            return Due.SHARED
        return result.save_due

    def save(
        self,
        step: int,
        result: StepResult,
        progress: Callable[[], dict[str, Any]],
        at_once: bool = False,
        where: Due = Due.SHARED,
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
        # What is still being copied from node to node; a save to stop with does not wait for it.
        drained = self.finish(step, wholly=True) if self._pending and goes_on else 0.0
        if where is Due.NODES:
            return drained + self._save_on_nodes(step, progress)
        if self._beside and goes_on and not at_once:
            return drained + self._begin(step, progress)
        return drained + self._save_at_once(step, progress)

    def _save_at_once(self, step: int, progress: Callable[[], dict[str, Any]]) -> float:
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
        self._pending = _Pending(step, folder, progress(), biases, written, started, Due.SHARED)
        return time.monotonic() - started

    def _save_on_nodes(self, step: int, progress: Callable[[], dict[str, Any]]) -> float:
        """Likewise on the nodes' own disks, by the same thread; without ``async_save`` to its end."""
        self._watchdog.enter("save", step)
        started = time.monotonic()
        self._writer.check()
        folder = self._local.begin(step)
        if folder is None:
            return time.monotonic() - started
        files = self._engine.describe(folder, step, alone=True)
        biases = bias_checksum(self._engine.model.llm)
        written = self._writer.submit(self._local.write, folder, self._writer.put, files)
        copied = self._writer.then(self._local.copy, folder, written)
        self._pending = _Pending(step, folder, progress(), biases, written, started, Due.NODES, copied)
        seconds = time.monotonic() - started
        return seconds if self._beside else seconds + self.finish(step, wholly=True)

    def finish(self, step: int, wholly: bool = False) -> float:
        """Wait until the checkpoint that ``save`` has begun is written, and commit it; returns the seconds it took.

        What is copied between nodes comes from files: states may change meanwhile, and the next call commits.

        Args:
            step: that waits.
            wholly: also for copies.

        Raises:
            OSError, RuntimeError: this rank could not write its files; or, on all ranks alike, it was not committed.
        """
        pending = self._pending
        if self._engine.device.type == "cuda":
            torch.cuda.synchronize(self._engine.device)  # what the step has queued is the step's time
        self._watchdog.enter("save", step)
        self._watchdog.place = WAITING
        started = time.monotonic()
        found = self._writer.result(pending.files, pending.folder.name, told=dist.get_rank() == 0)
        if pending.copies is not None:
            if not wholly and not all(gather(pending.copies.done())):
                self._watchdog.enter("step", step)
                return time.monotonic() - started
            found = self._writer.result(pending.copies, pending.folder.name, told=dist.get_rank() == 0)
        committed = self._committed(pending, found)
        self._pending = None
        ended = time.monotonic()
        if pending.where is Due.SHARED:
            self._watchdog.took("save", ended - pending.begun)
        self._watchdog.enter("step", step)
        if dist.get_rank() == 0 and committed is not None:
            beside = f" beside step {step}, which waited {ended - started:.1f} s" if step > pending.step else ""
            kind = "checkpoint" if pending.where is Due.SHARED else "node-local checkpoint"
            say(
                f"{kind} {pending.folder.name} committed: {committed / GIB:.2f} GiB in "
                f"{ended - pending.begun:.1f} s{beside}"
            )
        return ended - started

    def _committed(self, pending: _Pending, found: Any) -> int | None:
        """Bytes of a checkpoint that is committed now; None where the nodes' disks refused it."""
        if pending.where is Due.SHARED:
            self._agree(pending.step, pending.folder, pending.progress, Written(*found, pending.biases))
            return self._last_bytes
        marker = marker_of(self._config, pending.step, pending.progress)
        size = self._local.commit(pending.folder, marker, found, pending.biases)
        if size is not None:
            self._local.note(pending.step, size, time.monotonic() - pending.begun)
            self._writer.after(self._local.forget, pending.step)
        return size

    def close(self, finished: bool = False) -> None:
        """Training has ended: wait for what is still being removed.

        Args:
            finished: nothing of the run is left to train.

        Raises:
            OSError: it could not be removed.
        """
        if self._writer:
            self._writer.close()
        if self._local:
            self._local.close(finished)

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
        if self._local:
            self._writer.after(self._local.forget, step)

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
        checkpoints.prune(run, run_id, saving_tiers.shared_keep(chosen), best)


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
