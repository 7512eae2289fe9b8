"""Sources → ``train.jsonl`` and ``rejects.jsonl``: every record ends in exactly one of them, in the input's order."""

import hashlib
import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import cli, files
from ..errors import BadInputError
from .formats import convert
from .messages import THINK_OPEN, Rejection, json_line, normalise
from .parallel import chunked, ordered_map
from .sources import RawRecord, Source, read_source

CHUNK_RECORDS = 512
EXCERPT = 200  # characters of a rejected record kept for reading
EXAMPLES = 3  # per reason, in the figures


@dataclass(frozen=True)
class Outcome:
    """What became of one record: a line for ``train.jsonl``, or a reason."""

    source: str
    record: int
    line: int | None
    id: str
    accepted: dict[str, Any] | None = None
    reason: str = ""
    message: str = ""
    excerpt: str = ""

    @property
    def place(self) -> str:
        """File and line (or record) for messages."""
        return f"{self.source}:{self.line}" if self.line else f"{self.source}, record {self.record}"


@dataclass
class Figures:
    """Counts of a run, as the receipt carries them.

    ``turns`` are assistant messages of accepted records; ``trained_turns`` those with loss; ``with_reasoning`` those
    with a thinking block.
    """

    records: int = 0
    accepted: int = 0
    rejected: int = 0
    rejects: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    turns: int = 0
    trained_turns: int = 0
    with_reasoning: int = 0

    def accept(self, messages: list[dict[str, Any]]) -> None:
        """Count an accepted record."""
        self.accepted += 1
        for message in messages:
            if message["role"] == "assistant":
                self.turns += 1
                self.trained_turns += message["loss"]
                self.with_reasoning += message["content"].startswith(THINK_OPEN)

    def reject(self, reason: str, example: str) -> None:
        """Count a rejected record, keeping the first few as examples."""
        self.rejected += 1
        self.rejects[reason] += 1
        examples = self.examples.setdefault(reason, [])
        if len(examples) < EXAMPLES:
            examples.append(example)

    def as_dict(self) -> dict[str, Any]:
        """JSON-serialisable figures with sorted reasons."""
        rejects = dict(sorted(self.rejects.items()))
        return {**vars(self), "rejects": rejects, "examples": dict(sorted(self.examples.items()))}


def convert_record(raw: RawRecord) -> Outcome:
    """Decode, convert and check one record."""
    name = f"{Path(raw.source).name}:{raw.record}"
    place = (raw.source, raw.record, raw.line)
    record = raw.payload
    try:
        if isinstance(record, bytes):
            record = _decode(record)
        if isinstance(record, dict):
            name = _own_id(record) or name
        messages = normalise(convert(record, raw.format))
        accepted = {"id": name, "messages": messages}
        try:
            json.dumps(accepted, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise Rejection("invalid_text") from None
        return Outcome(*place, name, accepted)
    except Rejection as rejection:
        shown = record.decode("utf-8", "backslashreplace") if isinstance(record, bytes) else _shown(record)
        return Outcome(*place, name, None, rejection.reason, rejection.message, shown[:EXCERPT])


def convert_chunk(chunk: list[RawRecord]) -> list[Outcome]:
    """``convert_record`` over a list, for worker processes."""
    return [convert_record(raw) for raw in chunk]


def prepare(
    sources: list[Source],
    output: Path,
    rejects: Path,
    *,
    fail_on_invalid: bool = False,
    keep_duplicates: bool = False,
    workers: int = 1,
) -> Figures:
    """Read all sources and write both files.

    If no record is accepted, ``rejects`` is still written, since it tells why, but ``output`` is not.

    Raises:
        BadInputError: a damaged file, nothing accepted, or an invalid record where ``fail_on_invalid``.
    """
    figures = Figures()
    seen: dict[bytes, int] = {}
    raw = (record for source in sources for record in read_source(source))
    chunks = ordered_map(convert_chunk, chunked(raw, CHUNK_RECORDS), workers)
    with files.atomic_open(rejects, "wb") as rejected:
        try:
            with files.atomic_open(output, "wb") as accepted:
                for outcomes in chunks:
                    for outcome in outcomes:
                        if not keep_duplicates:
                            outcome = _check_duplicate(outcome, seen, figures.accepted + 1)
                        figures.records += 1
                        if outcome.accepted:
                            figures.accept(outcome.accepted["messages"])
                            accepted.write(json_line(outcome.accepted))
                            continue
                        if fail_on_invalid:
                            raise BadInputError(
                                f"{outcome.place}: {outcome.reason}: {outcome.message}",
                                "repair the record, or let --on-invalid reject set such records aside",
                            )
                        figures.reject(outcome.reason, f"{outcome.place}: {outcome.message}")
                        rejected.write(json_line(_reject_line(outcome)))
                    cli.say(f"{figures.records} records read, {figures.rejected} rejected")
                if not figures.accepted:
                    raise _NothingAccepted
        except _NothingAccepted:
            pass
    if not figures.accepted:
        reasons = ", ".join(f"{reason} {count}" for reason, count in figures.rejects.most_common())
        first = next(iter(figures.examples.values()), [""])[0]
        raise BadInputError(
            f"none of {figures.records} records was accepted ({reasons or 'the sources are empty'})",
            f"first: {first}; all are in {rejects}" if first else "give at least one file with records",
        )
    return figures


class _NothingAccepted(Exception):
    """Leaves the output unwritten while the rejects are kept."""


def _check_duplicate(outcome: Outcome, seen: dict[bytes, int], line: int) -> Outcome:
    if not outcome.accepted:
        return outcome
    digest = hashlib.sha256(files.canonical_json(outcome.accepted["messages"]).encode()).digest()[:16]
    first = seen.setdefault(digest, line)
    if first == line:
        return outcome
    shown = _shown(outcome.accepted)[:EXCERPT]
    message = f"same messages as line {first} of the output"
    return Outcome(outcome.source, outcome.record, outcome.line, outcome.id, None, "duplicate", message, shown)


def _reject_line(outcome: Outcome) -> dict[str, Any]:
    fields = ("source", "line", "record", "id", "reason", "message", "excerpt")
    return {name: getattr(outcome, name) for name in fields}


def _decode(line: bytes) -> Any:
    try:
        return json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise Rejection("invalid_utf8", f"byte {error.start}: {error.reason}") from None
    except json.JSONDecodeError as error:
        raise Rejection("invalid_json", f"column {error.colno}: {error.msg}") from None
    except (RecursionError, ValueError) as error:  # nested too deeply; a number of thousands of digits
        raise Rejection("invalid_json", str(error)) from None


def _own_id(record: dict[str, Any]) -> str:
    value = record.get("id")
    return str(value) if isinstance(value, str | int) and not isinstance(value, bool) else ""


def _shown(record: Any) -> str:
    return json.dumps(record, ensure_ascii=False, default=str)
