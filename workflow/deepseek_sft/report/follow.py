"""Files of a run that grow while they are looked at: only what was added is read, and what is kept stays small.

Training appends whole lines, but a reader may see half of the last one; a start that resumes writes the file anew
without the lines after its checkpoint, and a killed one leaves a torn line.
"""

import os
import sys
from pathlib import Path
from typing import Any, BinaryIO

from .. import json_files
from .plots_experts import MOST_COLUMNS

CHECKED = 256  # bytes before the place where reading goes on, which tell that it is still the same file
TAILS = (1 << 20, 1 << 26)  # bytes from the end in which a last line is looked for
KEPT_LISTS = 2 * MOST_COLUMNS  # lines that keep what they say of each layer; a map of the layers has fewer columns


class Lines:
    """Lines of a file of metrics by step, as ``collect.metrics`` reads them, each read once.

    Of long runs, lists (one number for each layer) are kept in every second, fourth, … line alone.

    Attributes:
        version: grows when the lines have changed.
    """

    def __init__(self, path: Path):
        self.path = path
        self.version = 0
        self._forget()

    def _forget(self) -> None:
        self._file: tuple[int, int] | None = None
        self._offset, self._end = 0, b""
        self._by_step: dict[int, dict[str, Any]] = {}
        self._read, self._stride = 0, 1
        self._with_lists: dict[int, int] = {}  # step → number of the line

    def read(self) -> list[dict[str, Any]]:
        """All lines up to now; those of before where the file cannot be read at the moment."""
        try:
            with open(self.path, "rb") as stream:
                found = os.fstat(stream.fileno())
                if (found.st_dev, found.st_ino) != self._file or not self._is_continued(stream, found.st_size):
                    self.version += bool(self._read)
                    self._forget()
                    self._file = found.st_dev, found.st_ino
                self._take(stream)
        except FileNotFoundError:
            self.version += bool(self._read)
            self._forget()
        except OSError:
            pass  # a file system that does not answer: the lines of before are still true
        return [self._by_step[step] for step in sorted(self._by_step)]

    def _is_continued(self, stream: BinaryIO, size: int) -> bool:
        """Whether what was read still stands before the place where reading goes on."""
        if size < self._offset:
            return False
        stream.seek(self._offset - len(self._end))
        return stream.read(len(self._end)) == self._end

    def _take(self, stream: BinaryIO) -> None:
        """Read whole lines from where reading stopped; what follows the last newline is left for later."""
        stream.seek(self._offset)
        for line in stream:
            if not line.endswith(b"\n"):
                break
            self._offset += len(line)
            self._end = (self._end + line)[-CHECKED:]
            self._add(line)

    def _add(self, line: bytes) -> None:
        try:
            entry = json_files.parse(line)
        except ValueError:
            return  # torn
        step = entry.get("step")
        if not isinstance(step, int):
            return
        self.version += 1
        number, self._read = self._read, self._read + 1
        self._by_step[step] = {sys.intern(key): value for key, value in entry.items()}
        if any(isinstance(value, list) for value in entry.values()):
            self._with_lists[step] = number
            self._thin(step)

    def _thin(self, step: int) -> None:
        if self._with_lists[step] % self._stride:
            self._drop_lists(step)
        elif len(self._with_lists) > KEPT_LISTS:
            self._stride *= 2
            for other in [other for other, number in self._with_lists.items() if number % self._stride]:
                self._drop_lists(other)

    def _drop_lists(self, step: int) -> None:
        del self._with_lists[step]
        entry = self._by_step[step]
        self._by_step[step] = {key: value for key, value in entry.items() if not isinstance(value, list)}


class LastLine:
    """The last whole line of a file of large ones (the load of each expert), read anew where the file has changed."""

    def __init__(self, path: Path):
        self.path = path
        self._seen: tuple[int, ...] = ()
        self._found: list[dict[str, Any]] = []

    def read(self) -> list[dict[str, Any]]:
        """That line alone, parsed; empty where there is none."""
        try:
            with open(self.path, "rb") as stream:
                found = os.fstat(stream.fileno())
                seen = (found.st_ino, found.st_size, found.st_mtime_ns)
                if seen != self._seen:
                    self._found = self._last(stream, found.st_size)
                    self._seen = seen
        except FileNotFoundError:
            self._seen, self._found = (), []
        except OSError:
            pass  # as above
        return self._found

    @staticmethod
    def _last(stream: BinaryIO, size: int) -> list[dict[str, Any]]:
        for tail in TAILS:
            stream.seek(max(0, size - tail))
            lines = stream.read(tail).split(b"\n")[:-1]  # what follows the last newline is half a line, or nothing
            for line in reversed(lines if size <= tail else lines[1:]):
                try:
                    return [json_files.parse(line)]
                except ValueError:
                    continue
            if size <= tail:
                break
        return []
