"""How fast this machine reads the checkpoint and writes the output, measured in seconds, and what follows from it."""

import concurrent.futures
import os
import random
import tempfile
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..tensors import number_formats
from ..tensors.byte_ranges import OpenFiles

SECONDS = 2.0  # of each probe
BLOCK = 8 << 20  # bytes
MOST_WRITTEN = 256 << 20
SLOWER = 1.5  # a shared file system under others' load, against a probe that had it for two seconds


@dataclass(frozen=True)
class Bandwidth:
    """Bytes per second; None where it could not be measured."""

    read: float | None
    write: float | None
    convert: float

    def seconds(self, bytes_to_read: int, bytes_to_write: int) -> tuple[float, float] | None:
        """Shortest and longest time: reading, rounding and writing all at once, or one after the other and slower."""
        if self.read is None or self.write is None:
            return None
        read, write, convert = bytes_to_read / self.read, bytes_to_write / self.write, bytes_to_read / self.convert
        return max(read, write, convert), (read + write + convert) * SLOWER


def _read_rate(ranges: Sequence[tuple[Path, int, int]], workers: int) -> float | None:
    """Blocks from all over the files, dropped from the cache before and after."""
    chance = random.Random(0)
    places = [
        (path, start + offset)
        for path, start, size in ranges
        for offset in range(0, size - BLOCK, max(BLOCK, size // 64))
    ]
    if not places:
        return None
    chance.shuffle(places)
    deadline = time.monotonic() + SECONDS

    def probe(worker: int) -> int:
        target, total = np.empty(BLOCK, np.uint8), 0
        for path, offset in places[worker::workers]:
            opened.forget(path, offset, BLOCK)
            opened.read_into(path, offset, target)
            opened.forget(path, offset, BLOCK)
            total += BLOCK
            if time.monotonic() > deadline:
                break
        return total

    started = time.monotonic()
    with OpenFiles() as opened, concurrent.futures.ThreadPoolExecutor(workers) as executor:
        total = sum(executor.map(probe, range(workers)))
    return total / (time.monotonic() - started)


def _write_rate(folder: Path, largest: int) -> float | None:
    """A file without a name, synced."""
    while not folder.is_dir():
        folder = folder.parent
    data = np.random.default_rng(0).integers(0, 256, BLOCK, np.uint8)
    try:
        with tempfile.TemporaryFile(dir=folder, buffering=0) as stream:
            started, written = time.monotonic(), 0
            while written < largest and time.monotonic() - started < SECONDS:
                written += stream.write(data.data)
            os.fdatasync(stream.fileno())
            return written / (time.monotonic() - started)
    except OSError:
        return None  # not writable from here: the plan goes without a time


def _convert_rate(workers: int) -> float:
    """Checksum and rounding, bytes of FP32."""
    values, rounds = np.ones(BLOCK // 4, np.float32), 8 * workers

    def work(_: int) -> None:
        zlib.crc32(values.view(np.uint8).data)
        number_formats.convert(values, "F32", "BF16")

    started = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(workers) as executor:
        list(executor.map(work, range(rounds)))
    return rounds * values.nbytes / (time.monotonic() - started)


def measure(ranges: Sequence[tuple[Path, int, int]], folder: Path, bytes_to_write: int, workers: int) -> Bandwidth:
    """Measure in about five seconds, with a few threads.

    Args:
        ranges: (file, first byte, bytes) of what will be read, a few of many.
        folder: where the output will be, or any folder above it.
        bytes_to_write: size of the output; the probe does not write more (but one block).
        workers: threads that the conversion will use.
    """
    return Bandwidth(
        _read_rate(ranges, workers), _write_rate(folder, min(MOST_WRITTEN, bytes_to_write)), _convert_rate(workers)
    )
