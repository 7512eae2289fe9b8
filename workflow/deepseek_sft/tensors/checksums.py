"""CRC-32 of byte ranges that are read in any order, joined until they cover whole records.

``torch.save`` stores a CRC-32 with every record of its zip archive. The master weights are read in ranges, by several
threads, perhaps over several runs or nodes; the CRC of two neighbouring ranges follows from theirs and a length, so
that the records are checked without reading a byte twice. Only the padding that no tensor needs is read in addition.
"""

import functools
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import BadInputError
from . import torch_pickle
from .byte_ranges import OpenFiles

POLYNOMIAL = 0xEDB88320  # of zip's CRC-32, reflected
ONE = 1 << 31  # the polynomial 1 in that order of bits
GAP_BLOCK = 1 << 20  # bytes

# (first byte, byte after the last, CRC-32 of what lies between)
Range = tuple[int, int, int]


def _multiply(a: int, b: int) -> int:
    """Product of two polynomials over GF(2) modulo the CRC's."""
    product = 0
    while a:
        if a & ONE:
            product ^= b
        a = (a << 1) & 0xFFFFFFFF
        b = (b >> 1) ^ POLYNOMIAL if b & 1 else b >> 1
    return product


@functools.cache
def _power_of_two(exponent: int) -> int:
    """x to the power of 2**exponent."""
    return ONE >> 1 if exponent == 0 else _multiply(_power_of_two(exponent - 1), _power_of_two(exponent - 1))


@functools.lru_cache(maxsize=65536)
def _shift(length: int) -> int:
    """x to the power of 8 · length: what ``length`` more bytes do to a CRC."""
    result, exponent = ONE, 3
    while length:
        if length & 1:
            result = _multiply(result, _power_of_two(exponent))
        length >>= 1
        exponent += 1
    return result


def combine(first: int, second: int, second_length: int) -> int:
    """CRC-32 of two byte strings one after the other, from theirs (zlib's ``crc32_combine``)."""
    return _multiply(_shift(second_length), first) ^ second


def zeros(length: int) -> int:
    """CRC-32 of ``length`` zero bytes."""
    return _multiply(_shift(length), 0xFFFFFFFF) ^ 0xFFFFFFFF


def join(ranges: list[Range]) -> list[Range]:
    """Sort ranges and join neighbours. Of ranges that begin alike one is kept; overlaps are not joined."""
    joined: list[Range] = []
    for start, end, crc in sorted(ranges):
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], end, combine(joined[-1][2], crc, end - start))
        elif not joined or start >= joined[-1][1]:
            joined.append((start, end, crc))
    return joined


@dataclass(frozen=True)
class Damaged:
    """A record whose content is not what was written, and the bytes of its file that it takes (the last excluded)."""

    file: Path
    record: str
    start: int
    end: int

    def has_part_in(self, ranges: Iterable[Sequence[int]]) -> bool:
        """Whether one of these ranges of its file (first byte, byte after the last, …) lies partly in it."""
        return any(start < self.end and self.start < end for start, end, *_ in ranges)


@dataclass(frozen=True)
class Verdict:
    """How many records were compared and how many have no checksum, and which are damaged."""

    checked: int
    unchecked: int
    damaged: list[Damaged]


def _records(path: Path) -> dict[int, tuple[str, int, int]]:
    """First byte → (name, size, CRC-32) of the records of an archive that hold tensors."""
    archive = torch_pickle.open_archive(path)
    described = {name.rsplit("/data/", 1)[-1]: (name, size, crc) for name, size, crc in archive.directory}
    return {start: described[key] for key, (start, size) in archive.records.items() if size and key in described}


def _fill_gaps(opened: OpenFiles, path: Path, start: int, end: int, ranges: list[Range]) -> list[Range]:
    """Read what no range covers between ``start`` and ``end``."""
    gaps, position = [], start
    for first, last, _ in [*ranges, (end, end, 0)]:
        if first > position:
            gaps.append((position, first))
        position = max(position, last)
    filled = list(ranges)
    for first, last in gaps:
        for begin in range(first, last, GAP_BLOCK):
            stop = min(begin + GAP_BLOCK, last)
            filled.append((begin, stop, zlib.crc32(opened.read(path, begin, np.uint8, stop - begin))))
    return join(filled)


def check(opened: OpenFiles, path: Path, ranges: list[Range], largest_gap: int) -> Verdict:
    """Compare the records of one archive with the ranges that were read from it.

    Args:
        ranges: joined ranges of this file.
        largest_gap: bytes of a record that may be read in addition (padding). Records of which more is missing, and
            records without a CRC (torch can be told to leave it out), are not checked.

    Raises:
        BadInputError: the archive cannot be read any more.
    """
    checked, unchecked, damaged = 0, 0, []
    position = 0
    for start, (name, size, expected) in sorted(_records(path).items()):
        end = start + size
        while position < len(ranges) and ranges[position][1] <= start:
            position += 1
        inside = []
        while position < len(ranges) and ranges[position][1] <= end:
            inside.append(ranges[position])
            position += 1
        if not inside:
            continue
        missing = size - sum(last - first for first, last, _ in inside)
        if not expected or missing > largest_gap:
            unchecked += 1
            continue
        whole = _fill_gaps(opened, path, start, end, inside)
        checked += 1
        if whole != [(start, end, expected)]:
            damaged.append(Damaged(path, name, start, end))
    return Verdict(checked, unchecked, damaged)


def error_of(damaged: list[Damaged]) -> BadInputError | None:
    """The error that names the damaged files, if there are any."""
    if not damaged:
        return None
    first = damaged[0]
    more = f", and {len(damaged) - 1} more records" if len(damaged) > 1 else ""
    return BadInputError(
        f"{first.file}: the content of record {first.record} does not have the checksum it was written with{more}",
        "a disk or a copy damaged this file: restore it, or use an older checkpoint; then run the same command",
    )
