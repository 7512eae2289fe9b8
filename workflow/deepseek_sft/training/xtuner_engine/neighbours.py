"""Files that ranks of different nodes hand to each other in pieces, over gloo groups of their own.

A group holds the ranks of one place on all nodes, so that all ranks of a node hand over at once. Handing over is no
collective: a checkpoint's thread does it beside a step, whose collectives go over other groups. What fails on one side
is told to the other at the end; until then bytes go on, so that nobody waits for what never comes.
"""

import json
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
import torch.distributed as dist

from ... import json_files
from ...files import fsync_directory

PIECE = 1 << 26  # bytes on their way at once, one piece each way
LENGTH = 8  # bytes of the length before a message


@dataclass
class HandedOver:
    """What came of a transfer on this rank.

    Attributes:
        sent: name → CRC-32 of what was read and sent.
        received: name → size and CRC-32 of what came, written whole and synced.
        failure: why it did not succeed on this side or the other; None where it did.
    """

    sent: dict[str, int] = field(default_factory=dict)
    received: dict[str, tuple[int, int]] = field(default_factory=dict)
    failure: str | None = None


class Neighbours:
    """This rank's place among the nodes; made by all ranks together.

    Attributes:
        node, nodes, ranks_per_node: of this rank.
    """

    def __init__(self, nodes: int):
        world, rank = dist.get_world_size(), dist.get_rank()
        self.nodes, self.ranks_per_node = nodes, world // nodes
        self.node, self._place = divmod(rank, self.ranks_per_node)
        self._group = None
        for place in range(self.ranks_per_node if nodes > 1 else 0):
            members = [node * self.ranks_per_node + place for node in range(nodes)]
            group = dist.new_group(members, backend="gloo")
            if place == self._place:
                self._group = group

    @property
    def leads(self) -> bool:
        """Whether this rank makes and removes folders on its node."""
        return self._place == 0

    @property
    def next(self) -> int:
        return (self.node + 1) % self.nodes

    @property
    def before(self) -> int:
        return (self.node - 1) % self.nodes

    def hand_over(
        self,
        to: int | None = None,
        paths: Sequence[Path] = (),
        source: int | None = None,
        folder: Path | None = None,
        failed: str | None = None,
    ) -> HandedOver:
        """Send files to the rank of this place on node ``to``, and take those that node ``source`` sends, at once.

        Args:
            to: None sends nothing.
            source: None takes nothing.
            folder: for what comes; must be there.
            failed: send no files, and this as the reason.
        """
        found = HandedOver(failure=failed)
        sender = None if to is None else _Sender(self, self._rank_on(to), [] if failed else list(paths), found)
        taker = None if source is None else _Taker(self, self._rank_on(source), folder, found)
        sides = [side.pieces() for side in (sender, taker) if side]
        while sides:  # a piece each way at a time
            waiting, left = [], []
            for side in sides:
                works = next(side, None)
                if works is not None:
                    waiting.append(works)
                    left.append(side)
            for works in waiting:
                works.wait()
            sides = left
        return found

    def _rank_on(self, node: int) -> int:
        return node * self.ranks_per_node + self._place

    def send(self, content: torch.Tensor, to: int) -> Any:
        return dist.isend(content, dst=to, group=self._group)

    def take(self, content: torch.Tensor, source: int) -> Any:
        return dist.irecv(content, src=source, group=self._group)


class _Sender:
    """One side of a transfer: each ``next`` puts a piece on its way and gives what to wait for."""

    def __init__(self, neighbours: Neighbours, rank: int, paths: list[Path], found: HandedOver):
        self._neighbours, self._rank, self._paths, self._found = neighbours, rank, paths, found

    def pieces(self) -> Iterator[Any]:
        listed, failure = [], self._found.failure
        try:
            listed = [[path.name, path.stat().st_size] for path in self._paths]
        except OSError as error:
            failure = _words(error)
        yield from self._message({"files": listed})
        buffer = torch.empty(PIECE if listed else 0, dtype=torch.uint8)
        for path, (name, size) in zip(self._paths, listed, strict=False):
            crc, done = 0, 0
            stream = _Stream(path, "rb")
            while done < size:
                part = buffer[: min(PIECE, size - done)]
                failure = stream.fill(part.numpy()) or failure
                crc = zlib.crc32(part.numpy(), crc)
                yield self._neighbours.send(part, self._rank)
                done += part.numel()
            stream.close()
            self._found.sent[name] = crc
        self._found.failure = self._found.failure or failure
        yield from self._message({"failure": failure, "sums": self._found.sent})

    def _message(self, told: dict[str, Any]) -> Iterator[Any]:
        text = torch.frombuffer(bytearray(json.dumps(told).encode()), dtype=torch.uint8)
        yield self._neighbours.send(torch.tensor([text.numel()], dtype=torch.int64), self._rank)
        yield self._neighbours.send(text, self._rank)


class _Taker:
    """The other side."""

    def __init__(self, neighbours: Neighbours, rank: int, folder: Path, found: HandedOver):
        self._neighbours, self._rank, self._folder, self._found = neighbours, rank, folder, found

    def pieces(self) -> Iterator[Any]:
        found, told = self._found, {}
        yield from self._message(told)
        buffer = torch.empty(PIECE if told["files"] else 0, dtype=torch.uint8)
        failure, came = None, {}
        for name, size in told["files"]:
            crc, done = 0, 0
            stream = _Stream(self._folder / Path(name).name, "wb")
            while done < size:
                part = buffer[: min(PIECE, size - done)]
                yield self._neighbours.take(part, self._rank)
                crc = zlib.crc32(part.numpy(), crc)
                failure = stream.write(part.numpy()) or failure
                done += part.numel()
            failure = stream.close(synced=True) or failure
            came[name] = (size, crc)
        yield from self._message(told)
        failure = failure or told["failure"]
        differing = [name for name, (_, crc) in came.items() if told["sums"].get(name) != crc]
        if not failure and differing:
            failure = f"{self._folder / differing[0]} did not arrive as it was sent"
        try:
            fsync_directory(self._folder)
        except OSError as error:
            failure = failure or _words(error)
        found.received |= came
        found.failure = found.failure or failure

    def _message(self, told: dict[str, Any]) -> Iterator[Any]:
        size = torch.zeros(1, dtype=torch.int64)
        yield self._neighbours.take(size, self._rank)
        text = torch.empty(int(size.item()), dtype=torch.uint8)
        yield self._neighbours.take(text, self._rank)
        told |= json_files.parse(text.numpy().tobytes().decode())


class _Stream:
    """A file whose first failure is told, and which takes and gives no more bytes then."""

    def __init__(self, path: Path, mode: str):
        self._path, self._failed = path, None
        self._stream: IO[bytes] | None = None
        self._try(lambda: self._open(mode))

    def fill(self, part: np.ndarray) -> str | None:
        """Read so many bytes; zeros where they cannot be."""

        def read() -> None:
            rest = memoryview(part)
            while rest:
                if not (count := self._stream.readinto(rest)):
                    raise OSError(None, "is shorter than it was", str(self._path))
                rest = rest[count:]

        self._try(read)
        if self._failed:
            part[:] = 0
        return self._failed

    def write(self, part: np.ndarray) -> str | None:
        self._try(lambda: self._write(part))
        return self._failed

    def close(self, synced: bool = False) -> str | None:
        if self._stream is not None:
            if synced:
                self._try(self._sync)
            self._try(self._stream.close)
        return self._failed

    def _open(self, mode: str) -> None:
        self._stream = open(self._path, mode, buffering=0)  # noqa: SIM115  until ``close``

    def _write(self, part: np.ndarray) -> None:
        rest = memoryview(part)
        while rest:
            rest = rest[self._stream.write(rest) :]

    def _sync(self) -> None:
        os.fsync(self._stream.fileno())

    def _try(self, action: Any) -> None:
        if self._failed:
            return
        try:
            action()
        except OSError as error:
            self._failed = _words(error, self._path)


def _words(error: OSError, path: Path | None = None) -> str:
    return f"{error.filename or path}: {error.strerror or error}"
