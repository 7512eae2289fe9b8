"""Which conversations are held out of training: a share of them, by their hash, what is alike on one side.

Two conversations are alike if their questions are the same, or if they are near duplicates (``similarity``). All that
are alike, over others too, are a group, and the hash of its first member decides for the whole.
"""

import hashlib
import itertools
import json
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import files
from ..errors import BadInputError
from .held_out_prompts import HELD_OUT, LONGEST_QUESTION, PROMPTS, PROMPTS_FILE
from .messages import json_line
from .similarity import BANDS, signature
from .text_tokens import Reader

LARGEST_GROUP = 10  # records, or a tenth of what is to be held out: a larger group would be most of it
COLUMNS = BANDS + 1
Columns = NDArray[np.uint64]


class Fingerprints:
    """Makes what a conversation is compared by: 56 bytes, the bands of its signature and its questions."""

    def __init__(self) -> None:
        self._reader = Reader()

    def of(self, messages: list[dict[str, Any]]) -> bytes:
        """Of one conversation."""
        words = self._reader.tokens([" ".join(message.get("content") or "" for message in messages)]).values[:-1]
        asked = "\n".join(message["content"] for message in messages if message["role"] == "user")
        question = self._reader.tokens([asked]).values[:-1]
        digest = hashlib.blake2b(question.tobytes(), digest_size=8).digest()
        return signature(words.astype(np.int64)).tobytes() + digest


@dataclass(frozen=True)
class Decision:
    """Which records are held out.

    Attributes:
        held: by record.
        kept_together: records of groups too large to be held out.
    """

    held: NDArray[np.bool_]
    kept_together: int


class Split:
    """Collects conversations, 64 bytes each, and decides.

    Args:
        share: of the records to be held out.
    """

    def __init__(self, share: float):
        self.share = share
        self._fingerprints = bytearray()
        self._digests = array("Q")

    def add(self, fingerprint: bytes, digest: bytes) -> None:
        """Take a conversation: what it is compared by, and its digest."""
        self._fingerprints += fingerprint
        self._digests.append(int.from_bytes(digest[:8]))

    def decide(self) -> Decision:
        """Hold out groups whose hash says so; the same for the same records in any order."""
        digests = np.frombuffer(self._digests, np.uint64)
        count = len(digests)
        if not count:
            return Decision(np.zeros(0, bool), 0)
        groups = _groups(np.frombuffer(bytes(self._fingerprints), np.uint64).reshape(count, COLUMNS))
        _, group, sizes = np.unique(groups, return_inverse=True, return_counts=True)
        smallest = np.full(len(sizes), np.iinfo(np.uint64).max)
        np.minimum.at(smallest, group, digests)
        drawn = smallest * np.uint64(0x9E3779B97F4A7C15)  # the smallest of many is small: its bits are mixed again
        drawn ^= drawn >> np.uint64(29)
        drawn *= np.uint64(0xBF58476D1CE4E5B9)
        large = sizes > max(LARGEST_GROUP, self.share * count / 10)
        held = (drawn.astype(np.float64) / 2.0**64 < self.share) & ~large
        return Decision(held[group], int(sizes[large].sum()))


def _groups(columns: Columns) -> NDArray[np.int64]:
    """By record the number of its group: of all that share a value in a column, over others too."""
    group = np.arange(len(columns))
    orders = [np.argsort(columns[:, number], kind="stable").astype(np.int32) for number in range(COLUMNS)]
    while True:
        before = group.copy()
        for number, order in enumerate(orders):
            values = columns[order, number]
            firsts = np.flatnonzero(np.append(True, values[1:] != values[:-1]))
            least = np.minimum.reduceat(group[order], firsts)
            group[order] = np.repeat(least, np.diff(np.append(firsts, len(order))))
        group = group[group]
        if (group == before).all():
            return group


def write(lines: Iterable[bytes], decision: Decision, share: float, output: Path) -> dict[str, Any]:
    """Deal lines of accepted records out to ``output`` and, beside it, what is held out and the smoke test's prompts.

    Returns:
        Figures for the receipt.

    Raises:
        BadInputError: nothing is held out, or none of it can be asked as a question; nothing is written.
    """
    held, prompts = output.with_name(HELD_OUT), output.with_name(PROMPTS_FILE)
    count = int(decision.held.sum())
    if not count:
        raise BadInputError(
            f"data.held_out: {share:g} holds out none of {len(decision.held):,} records"
            + (f"; {decision.kept_together:,} are too much alike to part" if decision.kept_together else ""),
            "hold out a larger share, or write data: {held_out: 0} and name other samples in smoke_test.prompts",
        )
    chosen: list[tuple[bytes, dict[str, Any]]] = []
    with files.atomic_open(output, "wb") as trained, files.atomic_open(held, "wb") as kept:
        for line, out in zip(lines, decision.held, strict=True):
            (kept if out else trained).write(line)
            if out and (prompt := _prompt(json.loads(line))):
                chosen.append((hashlib.blake2b(line, digest_size=8).digest(), prompt))
                if len(chosen) > 2 * PROMPTS:
                    chosen = sorted(chosen, key=lambda one: one[0])[:PROMPTS]
        if not chosen:
            raise BadInputError(
                f"data.held_out: none of the {count:,} records held out is a question of at most {LONGEST_QUESTION:,} "
                "bytes with a trained answer, without tools",
                "hold out a larger share, or write data: {held_out: 0} and name other samples in smoke_test.prompts",
            )
        asked = [prompt for _, prompt in sorted(chosen, key=lambda one: one[0])[:PROMPTS]]
        with files.atomic_open(prompts, "wb") as stream:
            stream.writelines(map(json_line, _named(asked)))
    return {
        "share": share,
        "records": count,
        "prompts": len(asked),
        "records_too_much_alike": decision.kept_together,
    }


def _prompt(record: dict[str, Any]) -> dict[str, Any] | None:
    """A held-out sample that a server can be asked; None where the record is none."""
    messages = record["messages"]
    plain = "tools" not in record and all(one["role"] != "tool" and "tool_calls" not in one for one in messages)
    if not plain or len(messages) < 2 or messages[-1]["role"] != "assistant" or not messages[-1]["loss"]:
        return None
    size = sum(len(one["content"].encode()) for one in messages[:-1])
    return {"id": record["id"], "messages": messages} if size <= LONGEST_QUESTION else None


def _named(prompts: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Prompts with names of their own, as records need not have."""
    used: set[str] = set()
    for prompt in prompts:
        names = itertools.chain([prompt["id"]], (f"{prompt['id']}~{number}" for number in itertools.count(2)))
        name = next(name for name in names if name not in used)
        used.add(name)
        yield prompt | {"id": name}
