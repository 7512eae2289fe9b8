"""Training rows whose losses a finished run leaves with its weights, for the served model to be compared with.

The record (key ``trained_losses`` of the commit marker and of receipts)::

    {"format": 1, "dtype": "bfloat16", "step": 800,
     "rows": [{"id": …, "tokens": [id, …], "losses": [nats of every token but the first], "of": tokens of the sample}]}

Needs no torch; its names are read where no token file can be.
"""

import hashlib
import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from .tokens import TokenDataset

KEY, FORMAT = "trained_losses", 1
ROWS = 8
LONG = 4096  # tokens: beyond the context that the base was first trained with, where YaRN must be right
# Of a longer sample the first tokens only: a token's loss depends on those before it alone, and the record lies in
# the marker and in receipts (1 MB at most).
LONGEST = 8192
DIGITS = 5  # of a loss, after the point


@dataclass(frozen=True, order=True)
class Sample:
    """One sample of the token dataset: packed rows hold several, and a server is asked for one.

    Attributes:
        row: in the dataset.
        start: its first token in the row.
        length: its tokens.
    """

    row: int
    start: int
    length: int


def choose(dataset: "TokenDataset", count: int = ROWS) -> list[Sample]:
    """Samples by the hash of their row's name and their place in it: the same whatever the order of the rows.

    One of them has more than LONG tokens, where the dataset has one.
    """
    chosen = heapq.nsmallest(count, _named(dataset))
    if not any(sample.length > LONG for _, sample in chosen):
        long = min((named for named in _named(dataset) if named[1].length > LONG), default=None)
        chosen = [*chosen[: count - 1], long] if long else chosen
    return [sample for _, sample in chosen]


def record(
    dataset: "TokenDataset", samples: list[Sample], losses: list[list[float]], dtype: str, step: int
) -> dict[str, Any]:
    """The record of ``samples``; ``losses`` holds those of the first tokens of each."""
    rows: list[dict[str, Any]] = []
    for sample, values in zip(samples, losses, strict=True):
        row = dataset[sample.row]
        tokens = row["input_ids"][sample.start : sample.start + len(values) + 1].tolist()
        rows.append(
            {
                "id": row["id"],
                "tokens": tokens,
                "losses": [round(value, DIGITS) for value in values],
                "of": sample.length,
            }
        )
    return {"format": FORMAT, "dtype": dtype, "step": step, "rows": rows}


def _named(dataset: "TokenDataset") -> Iterator[tuple[bytes, Sample]]:
    """Every sample of at least two tokens, with what it is ordered by."""
    for row, (name, lengths) in enumerate(dataset.names_and_lengths()):
        starts = np.concatenate([[0], np.cumsum(lengths)])
        for number, length in enumerate(lengths.tolist()):
            if length > 1:
                digest = hashlib.sha256(f"{name}\0{number}".encode()).digest()
                yield digest, Sample(row, int(starts[number]), length)
