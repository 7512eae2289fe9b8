"""How the bytes of a checkpoint are read while it is converted: ahead of time, once, and with their checksums."""

import threading
import zlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from ..tensors import checksums
from ..tensors.byte_ranges import OpenFiles
from ..tensors.checksums import Range
from ..tensors.model_writer import Checked
from ..tensors.safetensors_files import ITEM_SIZES, Shard

Note = dict[str, list[list[int]]]  # file name → joined ranges


class CheckedFiles(OpenFiles):
    """Files of which everything read is counted and, for those of ``checked``, remembered with its CRC-32.

    Args:
        checked: files whose ranges are remembered.
        drop: give up the kernel's copy of what was read; for more data than memory.
    """

    def __init__(self, checked: Collection[Path], drop: bool, limit: int | None = None) -> None:
        super().__init__(limit)
        self.bytes_read = 0
        self._checked, self._drop = set(checked), drop
        self._ranges: dict[str, dict[Path, list[Range]]] = {}
        self._counting = threading.Lock()
        self._current = threading.local()

    def reading(self, tensor: str) -> None:
        """What this thread reads from now on is for ``tensor``."""
        self._current.tensor = tensor

    def read_into(self, path: Path, offset: int, target: NDArray) -> None:
        super().read_into(path, offset, target)
        if self._drop:
            self.forget(path, offset, target.nbytes)
        crc = zlib.crc32(memoryview(target).cast("B")) if path in self._checked else None
        with self._counting:
            self.bytes_read += target.nbytes
            if crc is not None:
                ranges = self._ranges.setdefault(self._current.tensor, {}).setdefault(path, [])
                ranges.append((offset, offset + target.nbytes, crc))

    def note(self, shard: Shard) -> Note:
        """The joined ranges that were read for a file's tensors; they are forgotten here."""
        found: dict[Path, list[Range]] = {}
        for tensor in shard.tensors:
            with self._counting:
                ranges = self._ranges.pop(tensor, {})
            for path, some in ranges.items():
                found.setdefault(path, []).extend(some)
        return {path.name: [list(part) for part in checksums.join(some)] for path, some in sorted(found.items())}


def expect(opened: OpenFiles, pieces: Any, dtype: str) -> None:
    """Have the kernel begin to read pieces of a partitioned parameter."""
    for file, offset, length in pieces:
        opened.expect(file, offset, length * ITEM_SIZES[dtype])


def check_notes(folder: Path, notes: dict[str, Any], largest_gap: int) -> Checked:
    """Compare what was read, by all runs together, with the checksums in the checkpoint.

    Args:
        folder: of the checkpoint.
        notes: output file → what ``CheckedFiles.note`` said.
        largest_gap: bytes of padding that a record may hold.
    """
    by_file: dict[str, list[Range]] = {}
    for note in notes.values():
        for name, ranges in (note or {}).items():
            by_file.setdefault(name, []).extend((start, end, crc) for start, end, crc in ranges)
    checked, unchecked, damaged = 0, 0, []
    with OpenFiles() as opened:
        for name, ranges in sorted(by_file.items()):
            verdict = checksums.check(opened, folder / name, checksums.join(ranges), largest_gap)
            checked, unchecked = checked + verdict.checked, unchecked + verdict.unchecked
            damaged += verdict.damaged
    figures = {"records_checked": checked, "records_without_checksum": unchecked}
    useless = {
        output
        for output, note in notes.items()
        if any(record.has_part_in((note or {}).get(record.file.name, ())) for record in damaged)
    }
    return Checked(figures, useless, checksums.error_of(damaged))
