"""A ZeRO-3 checkpoint read by other ranks than wrote it: which byte ranges of the old files each new rank needs.

A parameter is split over the ranks of its partition group, which need not be all ranks, and its elements are known by a
key that does not depend on how it is fused: the experts of a layer follow one another through its shards, so that
another number of experts per shard only cuts the same row of elements elsewhere. Padding is never copied. No element is
read twice: the ranges of all new ranks together are the old partitions (``check_ranges`` joins their checksums).
Nothing here allocates by the size of the states: a rank holds descriptors, some hundred bytes for each copy.
"""

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import BadInputError
from ..tensors.safetensors_files import ITEM_SIZES, StoredTensor
from . import rank_state
from .rank_state import RankState
from .release_names import FUSED
from .zero_files import RANK_FILE


@dataclass(frozen=True)
class SubGroup:
    """Parameters that one flat tensor of each rank of a partition group holds.

    Attributes:
        index: of that flat tensor in those ranks' files.
        shapes: name → shape, in the order of the flat tensor.
        ranks: the partition group: ranks in the order of their parts.
    """

    index: int
    shapes: Mapping[str, tuple[int, ...]]
    ranks: Sequence[int]


@dataclass(frozen=True)
class Copy:
    """``count`` elements that go from an old rank's flat tensor to a new rank's; offsets are elements."""

    index: int
    offset: int
    from_rank: int
    from_index: int
    from_offset: int
    count: int


@dataclass(frozen=True)
class _Extent:
    """A parameter inside the row of elements of its key: its first one there, and where its parts lie."""

    first: int
    elements: int
    part: int
    group: SubGroup
    skip: int


def key_of(name: str, shape: tuple[int, ...]) -> tuple[str, int]:
    """What a parameter's elements are known by, and which of those elements is its first."""
    if match := FUSED.fullmatch(name):
        return f"{match[1]}.*.{match[3]}", int(match[2]) * math.prod(shape)
    return name, 0


def row_of(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """What of a shape stays however experts are fused."""
    return shape[1:] if FUSED.fullmatch(name) else shape


class Layout:
    """Where the elements of all parameters lie in the flat tensors of the ranks."""

    def __init__(self, groups: Sequence[SubGroup]):
        self.groups = groups
        self._extents: dict[str, list[_Extent]] = {}
        self._rows: dict[str, tuple[int, ...]] = {}
        for group in groups:
            skip = 0
            for name, shape in group.shapes.items():
                key, first = key_of(name, shape)
                part = -(-math.prod(shape) // len(group.ranks))
                self._extents.setdefault(key, []).append(_Extent(first, math.prod(shape), part, group, skip))
                self._rows[key] = row_of(name, shape)
                skip += part
        for extents in self._extents.values():
            extents.sort(key=lambda extent: extent.first)
        self._firsts = {key: [extent.first for extent in extents] for key, extents in self._extents.items()}

    def difference(self, other: "Layout") -> str:
        """The first key, by name, that another layout holds otherwise; empty where both hold the same elements."""
        own, others = self._contents, other._contents
        return min((key for key in own.keys() | others.keys() if own.get(key) != others.get(key)), default="")

    @cached_property
    def _contents(self) -> dict[str, tuple[tuple[int, ...], list[tuple[int, int]]]]:
        """Key → its row, and the elements that are there as ranges without gaps."""
        found = {}
        for key, extents in self._extents.items():
            ranges: list[tuple[int, int]] = []
            for extent in extents:
                end = extent.first + extent.elements
                if ranges and ranges[-1][1] == extent.first:
                    ranges[-1] = ranges[-1][0], end
                else:
                    ranges.append((extent.first, end))
            found[key] = self._rows[key], ranges
        return found

    def of_rank(self, rank: int) -> Iterator[tuple[int, int, str, int, int]]:
        """What a rank holds, padding left out: index and offset of its flat tensor, key, first element, elements."""
        for group in self.groups:
            if rank not in group.ranks:
                continue
            place, offset = list(group.ranks).index(rank), 0
            for name, shape in group.shapes.items():
                elements, (key, first) = math.prod(shape), key_of(name, shape)
                part = -(-elements // len(group.ranks))
                start = place * part
                if (count := min(part, elements - start)) > 0:
                    yield group.index, offset, key, first + start, count
                offset += part

    def pieces(self, key: str, start: int, count: int) -> Iterator[tuple[int, int, int, int]]:
        """Rank, index and offset of its flat tensor, and elements, of ``count`` elements of a key."""
        extents = self._extents[key]
        number = bisect_right(self._firsts[key], start) - 1
        while count:
            extent = extents[number]
            inside = start - extent.first
            if inside == extent.elements:
                number += 1
                continue
            place, within = divmod(inside, extent.part)
            length = min(count, extent.part - within, extent.elements - inside)
            yield extent.group.ranks[place], extent.group.index, extent.skip + within, length
            start, count = start + length, count - length

    @property
    def padding(self) -> int:
        """Most elements of padding that a flat tensor can hold."""
        return max(
            sum(
                -(-size // len(group.ranks))
                for size in map(math.prod, group.shapes.values())
                if size % len(group.ranks)
            )
            for group in self.groups
        )


def spread_over(
    shapes: Sequence[Mapping[str, tuple[int, ...]]], sharing: Sequence[Sequence[int]], world_size: int, parallel: int
) -> Layout:
    """The layout of all ranks from what one of them holds, with expert parallelism over neighbouring ranks.

    Args:
        shapes: of each sub-group of that rank.
        sharing: of each, the ranks that share its parameters; those of a group of ``parallel`` ranks differ by one.
    """
    groups = []
    for index, (group, ranks) in enumerate(zip(shapes, sharing, strict=True)):
        if len(ranks) == world_size:
            groups.append(SubGroup(index, group, ranks))
            continue
        own = min(ranks) % parallel
        held = {int(found[2]) for name in group if (found := FUSED.fullmatch(name))}
        for place in range(parallel):
            shift = (place - own) * len(held)
            moved = {_shard_after(name, shift): shape for name, shape in group.items()}
            groups.append(SubGroup(index, moved, range(place, world_size, parallel)))
    return Layout(groups)


def _shard_after(name: str, shift: int) -> str:
    """The name of the shard that many numbers further."""
    found = FUSED.fullmatch(name)
    if found is None:
        raise ValueError(f"{name} is no shard of experts")
    return f"{found[1]}.{int(found[2]) + shift}.{found[3]}"


def of_all_ranks(shapes: Sequence[Mapping[str, tuple[int, ...]]], world_size: int) -> Layout:
    """The layout without expert parallelism: all ranks are the partition group of every sub-group."""
    return Layout([SubGroup(index, group, range(world_size)) for index, group in enumerate(shapes)])


def copies(old: Layout, new: Layout, rank: int) -> Iterator[Copy]:
    """All that ``rank`` of the new layout takes from the old one; the layouts must hold the same elements."""
    for index, offset, key, start, count in new.of_rank(rank):
        for from_rank, from_index, from_offset, length in old.pieces(key, start, count):
            yield Copy(index, offset, from_rank, from_index, from_offset, length)
            offset += length


@dataclass
class Source:
    """A checkpoint folder whose ranks' descriptions are read when they are needed.

    Attributes:
        marker: content of its ``committed.json``.
    """

    folder: Path
    marker: Mapping[str, Any]
    _states: dict[int, RankState] = field(default_factory=dict)
    _groups: list[SubGroup] = field(default_factory=list)

    @property
    def world_size(self) -> int:
        return self.marker["world_size"]

    def state(self, rank: int) -> RankState:
        """What an old rank's two files say, once they are known to be those that were committed.

        Raises:
            BadInputError: see ``rank_state.read``; or the files of two ranks contradict each other.
        """
        if rank not in self._states:
            state = rank_state.read(self.folder, rank, self.marker)
            first = next(iter(self._states.values()), state)
            alike = state.shapes == first.shapes or state.sharing != first.sharing  # of other experts, by other names
            for what in ("shapes", "optimizer_steps", "hyperparameters", "skipped_steps"):
                if getattr(state, what) != getattr(first, what) and not (what == "shapes" and alike):
                    raise BadInputError(
                        f"{state.flat[0].file}: {what.replace('_', ' ')} are others than in {first.flat[0].file.name}",
                        "the folder holds files of two checkpoints: restore those of one",
                    )
            for group in self._groups:
                told = list(state.sharing[group.index]), state.shapes[group.index]
                if rank in group.ranks and told != (list(group.ranks), group.shapes):
                    raise _contradicts(state, group.index, first)
            self._states[rank] = state
        return self._states[rank]

    def layout(self, rank: int) -> Layout:
        """Where everything lies, as old ranks' files say, ``rank``'s first; the same in the files of all.

        With expert parallelism one file of each set of ranks that share experts is read.

        Raises:
            BadInputError: see ``state``; or no file tells of a rank's part.
        """
        groups: list[SubGroup] = []
        for index in range(len(self.state(rank).sharing)):
            told, other = set(), rank
            while True:
                ranks = self.state(other).sharing[index]
                groups.append(SubGroup(index, self.state(other).shapes[index], ranks))
                if not told.isdisjoint(ranks) or other not in ranks:
                    raise _contradicts(self.state(other), index, self.state(rank))
                told |= set(ranks)
                if (rest := set(range(self.world_size)) - told) == set():
                    break
                other = min(rest)
        self._groups = groups
        return Layout(groups)

    def place(self, copy: Copy, moment: str | None = None) -> tuple[StoredTensor, int]:
        """The tensor that a copy reads, master weights or a moment, and the byte of its file at which it begins.

        Raises:
            BadInputError: that rank's files are not sound.
        """
        state = self.state(copy.from_rank)
        stored = state.flat[copy.from_index] if moment is None else state.moments[copy.from_index][moment]
        return stored, stored.offset + copy.from_offset * ITEM_SIZES[stored.spec.dtype]


def _contradicts(state: RankState, index: int, first: RankState) -> BadInputError:
    return BadInputError(
        f"{state.flat[index].file} says of others than {first.flat[index].file} which ranks share its parameters",
        "the folder holds files of two checkpoints: restore those of one",
    )


def old_ranks_of(rank: int, new_world_size: int, old_world_size: int) -> range:
    """The old ranks whose model files ``rank`` reads, at least one; together the new ranks read every file."""
    return range(rank % old_world_size, old_world_size, new_world_size)


def rank_of_file(name: str) -> int:
    """The old rank that wrote a file of a checkpoint.

    Raises:
        ValueError: it is none of a rank.
    """
    if (match := RANK_FILE.fullmatch(name)) is None:
        raise ValueError(f"{name} is no file of a rank")
    return int(match[1])


def sub_group_gaps(wanted: Iterable[Copy], lengths: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Index, first element and the one after the last of what no copy fills: the padding of a new rank.

    Args:
        lengths: elements of the rank's flat tensors.
    """
    ends: Counter[int] = Counter()
    for copy in wanted:  # in the order of their offsets
        if copy.offset > ends[copy.index]:
            yield copy.index, ends[copy.index], copy.offset
        ends[copy.index] = copy.offset + copy.count
    for index, length in enumerate(lengths):
        if ends[index] < length:
            yield index, ends[index], length
