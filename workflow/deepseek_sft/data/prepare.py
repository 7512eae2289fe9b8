"""Sources → ``train.jsonl`` and ``rejects.jsonl``: every record ends in exactly one of them, in the input's order."""

import dataclasses
import hashlib
import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import cli, files
from ..errors import BadInputError
from .formats import FORMATS, choose
from .lines import Oversized
from .messages import THINK_OPEN, Rejection, escape_separators, json_line, normalise
from .parallel import chunked, ordered_map
from .seen import Seen
from .sources import RawRecord, Source, read_source

CHUNK_RECORDS = 512
CHUNK_BYTES = 2 << 20  # of a chunk; a larger record is one by itself
EXCERPT = 200  # characters of a rejected record kept for reading
EXAMPLES = 3  # per reason, in the figures


@dataclass(frozen=True)
class Outcome:
    """What became of one record: a line for ``train.jsonl``, or a reason.

    Args:
        written: the line; empty if the record is rejected.
        digest: of the messages, for finding duplicates.
        turns: assistant messages, those with loss, those with reasoning.
        format: the format it was read in; empty if none was found.
    """

    source: str
    record: int
    line: int | None
    id: str
    written: bytes = b""
    digest: bytes = b""
    turns: tuple[int, int, int] = (0, 0, 0)
    reason: str = ""
    message: str = ""
    excerpt: str = ""
    format: str = ""

    @property
    def place(self) -> str:
        """File and line (or record) for messages."""
        return f"{self.source}:{self.line}" if self.line else f"{self.source}, record {self.record}"


@dataclass
class Figures:
    """Counts of a run, as the receipt carries them.

    ``turns`` are assistant messages of accepted records; ``trained_turns`` those with loss; ``with_reasoning`` those
    with a thinking block; ``formats`` counts records by the format they were read in, ``sources`` by file.
    """

    records: int = 0
    accepted: int = 0
    rejected: int = 0
    rejects: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    turns: int = 0
    trained_turns: int = 0
    with_reasoning: int = 0
    formats: Counter[str] = field(default_factory=Counter)
    sources: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, outcome: Outcome) -> None:
        """Count a record."""
        self.records += 1
        source = self.sources.setdefault(outcome.source, {"records": 0, "accepted": 0, "formats": {}})
        source["records"] += 1
        if outcome.format:
            self.formats[outcome.format] += 1
            source["formats"][outcome.format] = source["formats"].get(outcome.format, 0) + 1
        if outcome.reason:
            self.reject(outcome.reason, f"{outcome.place}: {outcome.message}")
        else:
            self.accepted += 1
            source["accepted"] += 1
            turns, trained, reasoned = outcome.turns
            self.turns, self.trained_turns = self.turns + turns, self.trained_turns + trained
            self.with_reasoning += reasoned

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
        formats = dict(sorted(self.formats.items()))
        return {**vars(self), "rejects": rejects, "formats": formats, "examples": dict(sorted(self.examples.items()))}


def convert_record(raw: RawRecord) -> Outcome:
    """Decode, convert and check one record."""
    name = f"{Path(raw.source).name}:{raw.record}"
    place = (raw.source, raw.record, raw.line)
    record, chosen = raw.payload, ""
    try:
        if isinstance(record, Oversized):
            raise Rejection("too_large", record.message)
        if isinstance(record, bytes):
            record = _decode(record)
        if isinstance(record, dict):
            name = _own_id(record) or name
        chosen = choose(record, raw.format)
        messages = normalise(FORMATS[chosen].convert(record))
        text = json.dumps(messages, ensure_ascii=False)
        weight = "" if raw.weight == 1 else f', "weight": {json.dumps(raw.weight)}'
        try:
            written = escape_separators(
                f'{{"id": {json.dumps(name, ensure_ascii=False)}{weight}, "messages": {text}}}\n'
            ).encode()
        except UnicodeEncodeError:
            raise Rejection("invalid_text") from None
        answers = [m for m in messages if m["role"] == "assistant"]
        reasoned = sum(m["content"].startswith(THINK_OPEN) for m in answers)
        turns = (len(answers), sum(m["loss"] for m in answers), reasoned)
        digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
        return Outcome(*place, name, written, digest, turns, format=chosen)
    except Rejection as rejection:
        record = record.head if isinstance(record, Oversized) else record
        shown = record.decode("utf-8", "backslashreplace") if isinstance(record, bytes) else _shown(record)
        reason, message = rejection.reason, rejection.message
        return Outcome(*place, name, reason=reason, message=message, excerpt=shown[:EXCERPT], format=chosen)


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
    seen = Seen()
    raw = (record for source in sources for record in read_source(source))
    chunks = ordered_map(convert_chunk, chunked(raw, CHUNK_RECORDS, lambda record: record.size, CHUNK_BYTES), workers)
    with files.atomic_open(rejects, "wb") as rejected:
        try:
            with files.atomic_open(output, "wb") as accepted:
                for outcomes in chunks:
                    for outcome in outcomes:
                        if not keep_duplicates:
                            outcome = _check_duplicate(outcome, seen, figures.accepted + 1)
                        if fail_on_invalid and outcome.reason:
                            raise BadInputError(
                                f"{outcome.place}: {outcome.reason}: {outcome.message}",
                                "repair the record, or let --on-invalid reject set such records aside",
                            )
                        figures.add(outcome)
                        if outcome.reason:
                            rejected.write(json_line(_reject_line(outcome)))
                        else:
                            accepted.write(outcome.written)
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


def _check_duplicate(outcome: Outcome, seen: Seen, line: int) -> Outcome:
    if outcome.reason:
        return outcome
    first = seen.setdefault(outcome.digest, line)
    if first == line:
        return outcome
    message = f"same messages as line {first} of the output"
    excerpt = outcome.written.decode()[:EXCERPT]
    return dataclasses.replace(outcome, written=b"", reason="duplicate", message=message, excerpt=excerpt)


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
