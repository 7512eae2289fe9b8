"""Lines of JSON in bounded memory: a line beyond a limit is counted, not held."""

import codecs
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

CHUNK = 1 << 20  # bytes read at once
LARGEST_RECORD = 16 << 20  # bytes; above what 163,840 tokens hold but for text of white space alone
HEAD = 4096  # bytes kept of a larger one, to name it by


@dataclass(frozen=True)
class Oversized:
    """A record of more than ``LARGEST_RECORD`` bytes.

    Args:
        head: its first bytes, where it has any.
        size: number of its bytes.
    """

    head: bytes
    size: int

    def __len__(self) -> int:
        return self.size

    @property
    def message(self) -> str:
        """What is wrong with it."""
        return f"{self.size:,} bytes, more than the {LARGEST_RECORD:,} that a record may have"


def split_lines(blocks: Iterable[bytes]) -> Iterator[bytes | Oversized]:
    """Lines split at line feeds only (other separators are legal inside JSON strings), without a byte-order mark."""
    rest: list[bytes] = []
    held = size = 0
    first = True
    for block in blocks:
        head, *others = block.split(b"\n")
        for number, part in enumerate((head, *others)):
            if number:  # a line feed stands before it
                yield _line(rest, size, first)
                rest, held, size, first = [], 0, 0, False
            size += len(part)
            if size <= LARGEST_RECORD:
                rest.append(part)
                held = size
            elif held > HEAD:
                rest = [b"".join(rest)[:HEAD]]
                held = len(rest[0])
            elif held < HEAD:
                rest.append(part[: HEAD - held])
                held += len(rest[-1])
    if size:
        yield _line(rest, size, first)


def file_lines(path: Path) -> Iterator[bytes | Oversized]:
    """The same of a plain file.

    Raises:
        OSError: it cannot be read.
    """
    with open(path, "rb") as stream:
        yield from split_lines(iter(lambda: stream.read(CHUNK), b""))


def _line(parts: list[bytes], size: int, first: bool) -> bytes | Oversized:
    line = b"".join(parts)
    line = line.removeprefix(codecs.BOM_UTF8) if first else line
    return line if size <= LARGEST_RECORD else Oversized(line, size)
