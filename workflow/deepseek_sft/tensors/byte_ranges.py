"""Reading byte ranges from many files at once, from several threads, without ever holding a file."""

import collections
import contextlib
import os
import resource
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from ..errors import BadInputError

RESERVE = 64  # descriptors for everything that is not read here: output files, pipes, libraries
SMALLEST_LIMIT = 8  # files kept open; with fewer every range would cost an open
LARGEST_LIMIT = 4096
SMALLEST_ADVICE = 1 << 17  # bytes; for less a hint costs more than it saves


class OpenFiles:
    """Descriptors of the files read last, at most ``limit`` and never more than this process may have open.

    ``pread`` needs no lock and no position. Files in use are never closed: with more threads than ``limit`` there are
    as many descriptors as threads.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit or file_limit()
        self._descriptors: collections.OrderedDict[Path, list[int]] = collections.OrderedDict()  # [descriptor, users]
        self._lock = threading.Lock()

    def __enter__(self) -> "OpenFiles":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        for descriptor, _ in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def __len__(self) -> int:
        return len(self._descriptors)

    @contextlib.contextmanager
    def descriptor(self, path: Path) -> Iterator[int]:
        """A descriptor of ``path`` that stays open inside the block.

        Raises:
            BadInputError: the file cannot be opened.
        """
        with self._lock:
            entry = self._descriptors.get(path)
            if entry is None:
                self._close_idle()
                try:
                    entry = [os.open(path, os.O_RDONLY), 0]
                except OSError as error:
                    raise BadInputError(f"{path} cannot be opened: {error.strerror}") from None
                self._descriptors[path] = entry
            self._descriptors.move_to_end(path)
            entry[1] += 1
        try:
            yield entry[0]
        finally:
            with self._lock:
                entry[1] -= 1

    def _close_idle(self) -> None:
        if len(self._descriptors) < self.limit:
            return
        for path, (descriptor, users) in self._descriptors.items():
            if not users:
                os.close(descriptor)
                del self._descriptors[path]
                return

    def read_into(self, path: Path, offset: int, target: NDArray) -> None:
        """Fill ``target`` (contiguous) with the bytes of ``path`` from ``offset`` on.

        Raises:
            BadInputError: the file ends early or cannot be read.
        """
        view = memoryview(target).cast("B")
        with self.descriptor(path) as descriptor:
            while view:
                try:
                    count = os.preadv(descriptor, [view], offset)
                except OSError as error:
                    raise BadInputError(f"{path} cannot be read at byte {offset}: {error.strerror}") from None
                if count == 0:
                    raise BadInputError(f"{path} ends before byte {offset + len(view)}", "the file was cut; restore it")
                view, offset = view[count:], offset + count

    def read(self, path: Path, offset: int, dtype: type[np.generic], count: int) -> NDArray:
        """``count`` little-endian elements of ``dtype`` from byte ``offset`` on."""
        target = np.empty(count, dtype)
        self.read_into(path, offset, target)
        return target

    def expect(self, path: Path, offset: int, size: int) -> None:
        """Let the kernel begin to read these bytes, which will be asked for soon."""
        if size >= SMALLEST_ADVICE:
            with self.descriptor(path) as descriptor:
                os.posix_fadvise(descriptor, offset, size, os.POSIX_FADV_WILLNEED)

    def forget(self, path: Path, offset: int, size: int) -> None:
        """Let the kernel give up its copy of these bytes, which will not be asked for again."""
        if size >= SMALLEST_ADVICE:
            with self.descriptor(path) as descriptor:
                os.posix_fadvise(descriptor, offset, size, os.POSIX_FADV_DONTNEED)


def file_limit() -> int:
    """How many files to keep open for reading: half of what this process may open beyond the reserve."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return LARGEST_LIMIT
    return max(SMALLEST_LIMIT, min(LARGEST_LIMIT, (soft - RESERVE) // 2))


def allow_open_files(count: int) -> None:
    """Raise this process's limit of open files towards ``count`` files kept open, as far as it may.

    With a lower limit files are closed and opened again in between; nothing fails.
    """
    wanted = 2 * count + RESERVE
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
