"""The thread of a rank that writes its checkpoint files beside the next step. It takes part in no collective."""

import concurrent.futures
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ... import environment_faults, formatting
from ...cli import say
from ...convert import rank_state
from ...files import fsync_directory
from .. import checkpoints
from .deferred_files import DeferredFile, Landing, write

TOLD_EVERY = 60.0  # seconds between two words on a step that waits
NICENESS = 19  # more than the process's: where cores are short, the thread that gives a GPU its work comes first


def _give_way() -> None:
    """Lower the priority of the calling thread alone: Linux takes its number for a process's here (setpriority(2))."""
    own = threading.get_native_id()
    os.setpriority(os.PRIO_PROCESS, own, min(19, os.getpriority(os.PRIO_PROCESS, own) + NICENESS))


class BackgroundWriter:
    """Does one thing after the other, in the order in which it was asked to."""

    def __init__(self) -> None:
        # A thread and no process: neither CUDA nor a communication library survives a fork.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint", initializer=_give_way)
        self._landing = Landing()
        self._after: list[Future[None]] = []
        self._written = self._to_write = 0

    def write(
        self, folder: Path, rank: int, files: list[DeferredFile]
    ) -> "Future[tuple[dict[str, int], dict[str, str]]]":
        """Begin to write a rank's files; the result holds their sizes and digests by name."""
        return self.submit(self._write, folder, rank, files)

    def submit(self, action: Callable[..., Any], folder: Path, *words: Any) -> "Future[Any]":
        """Begin ``action(folder, *words)``, whose last word are the files that it writes by ``put``."""
        self._written, self._to_write = 0, sum(file.bytes for file in words[-1])
        return self._thread.submit(action, folder, *words)

    def then(self, action: Callable[..., Any], *words: Any) -> "Future[Any]":
        """Begin ``action(*words)`` once what was asked for before is done."""
        return self._thread.submit(action, *words)

    def after(self, action: Callable[..., None], *words: Any) -> None:
        """Do something once what was asked for before is done; ``check`` and ``close`` raise what came of it."""
        self._after.append(self._thread.submit(action, *words))

    def result(self, files: "Future[Any]", name: str, told: bool) -> Any:
        """Wait for files.

        Args:
            name: of the checkpoint.
            told: say from time to time how far they are.

        Raises:
            OSError, RuntimeError: they could not be written.
        """
        began = time.monotonic()
        while True:
            try:
                return files.result(timeout=TOLD_EVERY)
            except concurrent.futures.TimeoutError:
                if files.done():  # the thread's own time-out, such as a file system's
                    raise
                if told:
                    say(
                        f"the update waits for {name} since {formatting.duration(time.monotonic() - began)}: rank 0 "
                        f"has written {self._written / 1e9:.1f} of {self._to_write / 1e9:.1f} GB"
                    )

    def check(self) -> None:
        """Wait for what was to be done between checkpoints.

        Raises:
            OSError: it failed.
        """
        while self._after:
            self._after.pop(0).result()

    def close(self) -> None:
        """Wait until everything is done.

        Raises:
            OSError: as ``check``.
        """
        self._thread.shutdown(wait=True)
        self.check()

    def _write(self, folder: Path, rank: int, files: list[DeferredFile]) -> tuple[dict[str, int], dict[str, str]]:
        try:
            self.put(folder, files)
            own = checkpoints.files_of_rank(folder, rank)
            return own, rank_state.digests_of(folder, own)
        except Exception as error:
            # torch's writer does not say what the file system told it.
            told = error if isinstance(error, OSError) else environment_faults.refusal(folder) or error
            # At once: the step that computes meanwhile ends before its rank does.
            say(
                f"warning: rank {rank} could not write its files of {folder.name}, training ends before the next "
                f"update: {environment_faults.in_words(told)}"
            )
            # Of this rank alone, whatever kind it is: no end that all ranks agree on.
            raise (told if isinstance(told, OSError) else RuntimeError(str(told))) from error

    def put(self, folder: Path, files: list[DeferredFile]) -> None:
        """Write files of a folder to its end and to the disk; by the thread.

        Raises:
            OSError, RuntimeError: they could not be written.
        """
        for file in files:
            write(file, self._landing, self._count)
        fsync_directory(folder)

    def _count(self, size: int) -> None:
        self._written += size
