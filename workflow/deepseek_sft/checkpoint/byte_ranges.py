"""Reading byte ranges from many files at once, from several threads, without ever holding a file."""

import os
import resource
import threading
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from ..errors import BadInputError


class OpenFiles:
    """Descriptors of the files read so far, opened once each. ``pread`` needs no lock and no position."""

    def __init__(self) -> None:
        self._descriptors: dict[Path, int] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> "OpenFiles":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def _descriptor(self, path: Path) -> int:
        with self._lock:
            if path not in self._descriptors:
                try:
                    self._descriptors[path] = os.open(path, os.O_RDONLY)
                except OSError as error:
                    raise BadInputError(f"{path} cannot be opened: {error.strerror}") from None
            return self._descriptors[path]

    def read_into(self, path: Path, offset: int, target: NDArray) -> None:
        """Fill ``target`` (contiguous) with the bytes of ``path`` from ``offset`` on.

        Raises:
            BadInputError: the file ends early or cannot be read.
        """
        view = memoryview(target).cast("B")
        descriptor = self._descriptor(path)
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


def allow_open_files(count: int) -> None:
    """Raise this process's limit of open files to ``count`` plus a reserve.

    Raises:
        BadInputError: the hard limit is lower.
    """
    wanted = count + 64
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        if hard != resource.RLIM_INFINITY and hard < wanted:
            raise BadInputError(
                f"reading needs {wanted} open files, this process may open {hard}", f"raise it: ulimit -Hn {wanted}"
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
