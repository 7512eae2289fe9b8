"""Token files: samples on disk as memory-mapped Arrow, and the small JSON file that describes them.

A folder holds ``shard-00000.arrow`` … (Arrow IPC *file* format, uncompressed) and, written last, ``tokens.json`` with
their sha256.
Columns: ``id`` string; ``input_ids`` list<int32>; ``labels`` list<int32>, unshifted, -100 where not trained;
``sample_lengths`` list<int32>, the lengths of the samples that a row holds one after the other (one, unless packed).

Imports pyarrow and numpy alone: the training environment reads with the same module.
"""

import bisect
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from numpy.typing import NDArray

from .. import files, json_files
from ..errors import BadInputError
from .chat_templates import NO_LOSS as NO_LOSS  # part of what readers of token files need
from .dealing import Rows, rows_of

FORMAT = 1
INDEX = "tokens.json"
SCHEMA = pyarrow.schema(
    [
        ("id", pyarrow.string()),
        ("input_ids", pyarrow.list_(pyarrow.int32())),
        ("labels", pyarrow.list_(pyarrow.int32())),
        ("sample_lengths", pyarrow.list_(pyarrow.int32())),
    ]
)
BATCH_ROWS = 1024
BATCH_TOKENS = 1 << 22  # 32 MiB of ids and labels
SHARD_TOKENS = 1 << 26  # 512 MiB of ids and labels
Ids = NDArray[np.int32]


class TokenWriter:
    """Write rows to the shards of a folder; ``close`` returns their names. The caller writes ``tokens.json`` after."""

    def __init__(self, folder: Path, shard_tokens: int = SHARD_TOKENS, batch_tokens: int = BATCH_TOKENS):
        self.folder = folder
        self.shard_tokens = shard_tokens
        self.batch_tokens = batch_tokens
        self.shards: list[str] = []
        self._rows: list[tuple[str, Ids, Ids, Ids]] = []
        self._batch = 0
        self._shard = 0
        self._file: Any = None
        self._writer: Any = None

    def add(self, name: str, input_ids: Ids, labels: Ids, sample_lengths: Ids) -> None:
        """Append a row."""
        self._rows.append((name, input_ids, labels, sample_lengths))
        self._batch += len(input_ids)
        if len(self._rows) >= BATCH_ROWS or self._batch >= self.batch_tokens:
            self._flush()
            if self._shard >= self.shard_tokens:
                self._end_shard()

    def close(self) -> list[str]:
        """Finish the last shard."""
        self._flush()
        self._end_shard()
        return self.shards

    def _flush(self) -> None:
        if not self._rows:
            return
        if self._writer is None:
            self.shards.append(f"shard-{len(self.shards):05d}.arrow")
            self._file = (self.folder / self.shards[-1]).open("wb")
            self._writer = pyarrow.ipc.new_file(self._file, SCHEMA)
        names, *columns = zip(*self._rows, strict=True)
        arrays = [pyarrow.array(names, pyarrow.string()), *(_list_array(column) for column in columns)]
        self._writer.write_batch(pyarrow.record_batch(arrays, schema=SCHEMA))
        self._shard += self._batch
        self._rows, self._batch = [], 0

    def _end_shard(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        self._file = self._writer = None
        self._shard = 0


class TokenDataset:
    """Read-only view of a token folder. Items are dicts of arrays over the mapped files, nothing is copied.

    ``info`` is the content of ``tokens.json``. Pickles to its path, so data-loader workers map the files themselves.

    Args:
        path: folder with ``tokens.json``.

    Raises:
        BadInputError: no token folder, a shard is missing or damaged, or its rows are not those of ``tokens.json``.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.info = _read_index(self.path)
        self._batches: list[pyarrow.RecordBatch] = []
        self._shards: list[str] = []  # of each batch
        self._starts = [0]
        for shard in self.info["shards"]:
            for batch in read_batches(self.path / shard):
                self._batches.append(batch)
                self._shards.append(shard)
                self._starts.append(self._starts[-1] + batch.num_rows)
        if self._starts[-1] != self.info["rows"]:
            raise BadInputError(
                f"{self.path} holds {self._starts[-1]} rows, but {INDEX} speaks of {self.info['rows']}", _AGAIN
            )

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Row ``index``: ``id`` str; ``input_ids``, ``labels``, ``sample_lengths`` int32 arrays (read-only)."""
        if index < 0:
            index += len(self)
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        number = bisect.bisect_right(self._starts, index) - 1
        batch, row = self._batches[number], index - self._starts[number]
        item: dict[str, Any] = {"id": batch.column(0)[row].as_py()}
        for column, name in enumerate(SCHEMA.names[1:], 1):
            item[name] = batch.column(column)[row].values.to_numpy()
        ids, lengths = item["input_ids"], item["sample_lengths"]
        if len(item["labels"]) != len(ids) or lengths.sum() != len(ids) or lengths.min(initial=1) < 1:
            raise BadInputError(
                f"{self.path / self._shards[number]} is damaged: row {index} has {len(ids)} tokens, "
                f"{len(item['labels'])} labels and samples of {lengths.tolist()[:8]} tokens",
                _AGAIN,
            )
        if ids.size and not 0 <= ids.min() <= ids.max() < self.info.get("vocab_size", 1 << 31):
            # On a GPU this would end in an assertion of the embedding's kernel, which names nothing.
            raise BadInputError(
                f"{self.path / self._shards[number]} is damaged: row {index} holds token {max(ids.max(), -ids.min())}, "
                f"the vocabulary has {self.info['vocab_size']}",
                _AGAIN,
            )
        return item

    def lengths(self) -> Ids:
        """Length in tokens of every row."""
        parts = [np.diff(batch.column(1).offsets.to_numpy()) for batch in self._batches]
        return np.concatenate(parts).astype(np.int32) if parts else np.zeros(0, np.int32)

    def rows(self) -> Rows:
        """Length and pairs of every row; tokens are not read."""
        lists = [batch.column(3) for batch in self._batches]
        counts = [np.diff(one.offsets.to_numpy()) for one in lists]
        offsets = np.concatenate(([0], np.cumsum(np.concatenate(counts)))) if counts else np.zeros(1, np.int64)
        parts = [one.values.to_numpy()[one.offsets[0].as_py() : one.offsets[-1].as_py()] for one in lists]
        return rows_of(np.concatenate(parts) if parts else np.zeros(0, np.int32), offsets)

    def names_and_lengths(self) -> Iterator[tuple[str, Ids]]:
        """Name of every row, and the lengths of the samples in it; tokens are not read."""
        for batch in self._batches:
            names, lists = batch.column(0), batch.column(3)
            offsets, lengths = lists.offsets.to_numpy(), lists.values.to_numpy()
            for row in range(batch.num_rows):
                yield names[row].as_py(), lengths[offsets[row] : offsets[row + 1]]

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenDataset, (self.path,)


def read_batches(shard: Path) -> Iterator[pyarrow.RecordBatch]:
    """Record batches of a shard, memory-mapped.

    Raises:
        BadInputError: missing or damaged.
    """
    try:
        reader = pyarrow.ipc.open_file(pyarrow.memory_map(str(shard)))
        if reader.schema != SCHEMA:
            raise BadInputError(f"{shard} has columns {reader.schema.names}, not those of token files", _AGAIN)
        for number in range(reader.num_record_batches):
            yield reader.get_batch(number)
    except (pyarrow.ArrowException, OSError) as error:
        raise BadInputError(f"{shard} cannot be read: {error}", _AGAIN) from None


def write_index(folder: Path, info: dict[str, Any]) -> None:
    """Write ``tokens.json``, which makes the folder complete, with the sha256 of every shard in ``info["shards"]``."""
    sums = {name: _sha256(folder / name) for name in info["shards"]}
    files.write_json(folder / INDEX, {"format": FORMAT, **info, "sha256": sums})


def made_unpacked(folder: Path) -> bool:
    """Whether a token folder is there whose rows are one sample each, as experiments begun before are."""
    try:
        return _read_index(folder).get("packed") is False
    except BadInputError:
        return False  # none, or one that tokenize_data makes again


def check_shards(folder: Path) -> int:
    """Compare every shard with the sum that was written when the folder became complete.

    Returns:
        number of shards compared: none of folders that are older than the sums.

    Raises:
        BadInputError: naming the shard that is missing, cannot be read, or has another content.
    """
    sums = _read_index(folder).get("sha256", {})
    for name, expected in sums.items():
        try:
            found = _sha256(folder / name)
        except OSError as error:
            raise BadInputError(f"{folder / name} cannot be read: {error.strerror}", _AGAIN) from None
        if found != expected:
            raise BadInputError(f"{folder / name} is damaged: its sha256 is not the one that {INDEX} holds", _AGAIN)
    return len(sums)


def _sha256(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


_AGAIN = "make the tokens again with tokenize_data"


def _list_array(rows: tuple[Ids, ...]) -> pyarrow.ListArray:
    offsets = np.zeros(len(rows) + 1, np.int32)
    np.cumsum([len(row) for row in rows], out=offsets[1:])
    return pyarrow.ListArray.from_arrays(pyarrow.array(offsets), pyarrow.array(np.concatenate(rows), pyarrow.int32()))


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / INDEX
    try:
        info = json_files.load(path)
    except OSError as error:
        raise BadInputError(f"{folder} is no complete token folder: {INDEX}: {error.strerror}", _AGAIN) from None
    except (ValueError, RecursionError) as error:
        raise BadInputError(f"{path} is not JSON: {error}", _AGAIN) from None
    if not isinstance(info, dict) or info.get("format") != FORMAT:
        raise BadInputError(f"{path} is not of token format {FORMAT}", _AGAIN)
    shards, sums = info.get("shards"), info.get("sha256", {})
    lists = isinstance(shards, list) and isinstance(sums, dict) and all(map(_is_name, [*shards, *sums]))
    if not lists or not isinstance(info.get("rows"), int) or not isinstance(info.get("vocab_size", 1), int):
        raise BadInputError(f"{path} does not name its shards, their sums, rows and vocab_size", _AGAIN)
    return info


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and Path(value).name == value
