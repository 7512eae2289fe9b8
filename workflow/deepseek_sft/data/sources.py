"""Source files: finding them and reading their records one by one, in bounded memory.

A record beyond ``lines.LARGEST_RECORD`` bytes is not held: it is given as ``Oversized``, for its place to be named.
Damage to one line costs that record; damage to a container (compression, Parquet, the brackets of a JSON array) stops
the stage, because how many records it hides cannot be known.
"""

import codecs
import contextlib
import difflib
import gzip
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import cli
from ..errors import BadInputError, looked_for
from .formats import AUTO, FORMATS
from .json_array import ArrayError, sized_items
from .lines import CHUNK, LARGEST_RECORD, Oversized, split_lines

PARQUET_BATCH = 2 << 20  # bytes of rows decoded at once
SUFFIXES = (".json", ".jsonl", ".ndjson", ".parquet")
COMPRESSED = (".gz", ".zst")


@dataclass(frozen=True)
class Source:
    """One file, the format its records are in, and how often each record is used."""

    path: Path
    format: str
    weight: float = 1.0


@dataclass(frozen=True)
class RawRecord:
    """A record as read: undecoded bytes of a JSON line, or a decoded value.

    Args:
        source: path of the file.
        format: name of the format, or ``auto``.
        record: number of the record in the file, from 1; blank lines do not count.
        line: number of the line, from 1; None where the file has no lines of records.
        payload: ``bytes`` of a line, the decoded record, or ``Oversized``.
        weight: of its source.
        size: bytes, about.
    """

    source: str
    format: str
    record: int
    line: int | None
    payload: Any
    weight: float = 1.0
    size: int = 0


def find_sources(arguments: list[str], weights: list[float] | None = None) -> list[Source]:
    """Resolve ``[FORMAT=]PATH`` arguments, globs included, to files; each file once, in the order given.

    Args:
        arguments: the sources.
        weights: one per argument; 1 each if not given.

    Raises:
        BadInputError: unknown format, no such file (with near matches), a folder, an unknown kind of file.
    """
    found: dict[Path, Source] = {}
    if weights and len(weights) != len(arguments):
        raise BadInputError(f"{len(arguments)} sources, but {len(weights)} weights", "give one weight per source")
    for argument, weight in zip(arguments, weights or [1.0] * len(arguments), strict=True):
        if not 0 < weight < float("inf"):
            raise BadInputError(f"source {argument}: weight {weight} is not positive", "leave the source out instead")
        name, pattern = split_argument(argument)
        for path in expand(pattern):
            if kind_of(path) is None:
                raise BadInputError(
                    f"source {path} is of no known kind",
                    f"files end in one of {', '.join(SUFFIXES)}, the JSON ones optionally followed by .gz or .zst"
                    + ("; write Arrow files of datasets as Parquet (to_parquet)" if path.suffix == ".arrow" else ""),
                )
            first = found.setdefault(path.resolve(), Source(path, name, weight))
            if (first.format, first.weight) != (name, weight):
                cli.say(
                    f"warning: {path} is named twice; it is read once, as it was first: "
                    f"format {first.format}, weight {first.weight:g} (not {name}, {weight:g})"
                )
    return list(found.values())


def first_bytes(path: Path, count: int) -> bytes:
    """The first bytes of a file, decompressed.

    Raises:
        BadInputError: the container is damaged.
    """
    begin = b""
    for block in chunks(path):
        begin += block
        if len(begin) >= count:
            break
    return begin[:count]


def read_source(source: Source) -> Iterator[RawRecord]:
    """Records of one file, in order.

    Raises:
        BadInputError: the container is damaged.
    """
    place, name, weight = str(source.path), source.format, source.weight
    if kind_of(source.path) == ".parquet":
        rows = enumerate(_parquet_rows(source.path), 1)
        yield from (RawRecord(place, name, number, None, row, weight, size) for number, (row, size) in rows)
    elif kind_of(source.path) == ".json" and _starts_with_bracket(source.path):
        items = enumerate(_array_items(source.path), 1)
        yield from (RawRecord(place, name, number, None, item, weight, size) for number, (item, size) in items)
    else:
        record = 0
        for number, line in enumerate(split_lines(chunks(source.path)), 1):
            if isinstance(line, Oversized) or line.strip():
                record += 1
                size = len(line.head if isinstance(line, Oversized) else line)
                yield RawRecord(place, name, record, number, line, weight, size)


def split_argument(argument: str) -> tuple[str, str]:
    """Format and path or pattern of ``[FORMAT=]PATH``.

    An equals sign may also belong to the path: what stands before it and is no format, nor nearly one, is path, and so
    is what names files as it stands.

    Raises:
        BadInputError: nearly the name of a format.
    """
    head, separator, tail = argument.partition("=")
    known = [AUTO, *FORMATS]
    if separator and head in known:
        return head, tail
    near = difflib.get_close_matches(head, known, 1) if separator else []
    if near and not _matches(argument):
        raise BadInputError(
            f"source {argument!r}: no format is named {head!r}",
            f"did you mean {near[0]}? known: {', '.join(known)}; if it belongs to the path, write ./{argument}",
        )
    return AUTO, argument


def _matches(pattern: str) -> list[Path]:
    """Files and folders of a path or pattern."""
    path = Path(pattern)
    if path.exists():
        return [path]
    if not any(character in pattern for character in "*?["):
        return []
    root = Path(path.anchor) if path.is_absolute() else Path()
    return sorted(root.glob(str(path.relative_to(path.anchor))))


def expand(pattern: str, what: str = "source") -> list[Path]:
    """Files of a path or pattern; raises BadInputError, calling it ``what``."""
    path = Path(pattern)
    if path.is_file():
        return [path]
    if path.is_dir():
        fix = folder_hint(path) or f"name its files, for example '{pattern.rstrip('/')}/*.jsonl'"
        raise BadInputError(f"{what} {pattern} is a folder", fix)
    if any(character in pattern for character in "*?["):
        matches = _matches(pattern)
        files = [match for match in matches if match.is_file()]
        above = {folder for file in files for folder in file.parents}
        for folder in (match for match in matches if match.is_dir() and match not in above):
            cli.say(f"warning: {folder} matches {pattern}, but is a folder: nothing of it is read")
        if files:
            return files
        raise BadInputError(
            f"{what} {pattern} matches no file",
            f"check the path; a pattern must match at least one file ({looked_for(pattern)})",
        )
    near = []
    if path.parent.is_dir():
        files = sorted(p.name for p in path.parent.iterdir())
        near = difflib.get_close_matches(path.name, files, 3, 0.5)
    hint = f"did you mean {' or '.join(str(path.parent / name) for name in near)}?" if near else "check the path"
    if "=" in pattern:
        hint += f"; formats that may stand before the equals sign: {', '.join([AUTO, *FORMATS])}"
    elif not path.parent.is_dir():
        hint = f"its folder {path.parent} does not exist either; check the path"
    raise BadInputError(f"{what} {pattern} does not exist", f"{hint} ({looked_for(pattern)})")


def folder_hint(path: Path) -> str:
    """What to do about a folder given as a source, where it is one that `datasets` saved; otherwise empty."""
    if any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        splits = "[split]" if (path / "dataset_dict.json").is_file() else ""
        return (
            "save_to_disk of datasets wrote it; write it as Parquet instead: "
            f'datasets.load_from_disk("{path}"){splits}.to_parquet("{path.name}.parquet")'
        )
    return ""


def kind_of(path: Path) -> str | None:
    """The suffix that says how a file is read, without that of compression; None where none does."""
    name = path.with_suffix("").name if path.suffix in COMPRESSED else path.name
    suffix = Path(name).suffix
    if suffix not in SUFFIXES or (suffix == ".parquet" and path.suffix != suffix):
        return None
    return suffix


def chunks(path: Path) -> Iterator[bytes]:
    """Decompressed contents, block by block; raises BadInputError."""
    try:
        if path.suffix == ".gz":
            with gzip.open(path) as stream:
                while block := stream.read(CHUNK):
                    yield block
        elif path.suffix == ".zst":
            yield from _zstandard_chunks(path)
        else:
            with open(path, "rb") as stream:
                while block := stream.read(CHUNK):
                    yield block
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise BadInputError(f"source {path} is damaged: {error}", "copy or compress the file again") from None
    except OSError as error:
        raise BadInputError(f"source {path} cannot be read: {error}") from None


def _zstandard_chunks(path: Path) -> Iterator[bytes]:
    # The library's stream reader takes a cut file for a finished one; frame objects tell the two apart.
    import zstandard

    again = "copy or compress the file again"
    frame = None
    with open(path, "rb") as stream:
        while block := stream.read(CHUNK):
            while block:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                try:
                    yield frame.decompress(block)
                except zstandard.ZstdError as error:
                    raise BadInputError(f"source {path} is damaged: {error}", again) from None
                block, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    if frame is not None:
        raise BadInputError(f"source {path} is cut off in the middle", again)


def _starts_with_bracket(path: Path) -> bool:
    for block in chunks(path):
        if text := block.removeprefix(codecs.BOM_UTF8).lstrip():
            return text.startswith(b"[")
    return False


def _array_items(path: Path) -> Iterator[tuple[Any, int]]:
    try:
        yield from sized_items(chunks(path))
    except ArrayError as error:
        raise BadInputError(
            f"source {path} is not a whole JSON array: after record {error.items}: {error}",
            "repair the file, or write it as JSON Lines, where damage costs one record only",
        ) from None


def _parquet_rows(path: Path) -> Iterator[tuple[Any, int]]:
    """Rows with their sizes. Pages are read as they are needed, never a whole row group."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=CHUNK) as file:
            groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
            for number, group in enumerate(groups):
                row = group.total_byte_size // max(1, group.num_rows) + 1
                rows = max(1, min(256, PARQUET_BATCH // row))
                for batch in file.iter_batches(rows, row_groups=[number], use_threads=False):
                    yield from _batch_rows(batch)
    except (pyarrow.ArrowException, OSError) as error:
        raise BadInputError(f"source {path} is not a whole Parquet file: {error}", "copy the file again") from None
    except (ValueError, OverflowError) as error:  # a date beyond the year 9999
        raise BadInputError(
            f"source {path} holds a value that Python has no form for: {error}",
            "write the file without that column, or with the column as text",
        ) from None


def _batch_rows(batch: Any) -> Iterator[tuple[Any, int]]:
    if batch.nbytes <= LARGEST_RECORD:
        size = batch.nbytes // max(1, batch.num_rows)
        with contextlib.suppress(UnicodeDecodeError):
            yield from [(row, size) for row in batch.to_pylist()]
            return
    for number in range(batch.num_rows):  # one of the rows is large, or has a text that is none
        row = batch.slice(number, 1)
        large = row.nbytes > LARGEST_RECORD
        yield (Oversized(b"", row.nbytes), 0) if large else (_row(row), row.nbytes)


def _row(row: Any) -> Any:
    """A row's record; where a text in it is no UTF-8, its bytes, which whoever decodes records refuses."""
    try:
        return row.to_pylist()[0]
    except UnicodeDecodeError as error:
        return bytes(error.object)
