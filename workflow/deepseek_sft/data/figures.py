"""What prepare_data counts: records by outcome, by source, and the fields that nothing used."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .contamination import Match
from .fields import IGNORE, MEANINGS, likely_meaning

EXAMPLES = 3  # per reason
MOST_FIELDS = 1000  # different ones that are counted apart; the names of a record are data and may be without end
SHOWN_FIELDS = 20  # on the console
OTHERS = "(other fields)"


@dataclass(frozen=True)
class Outcome:
    """What became of one record: a line for ``train.jsonl``, or a reason.

    Args:
        written: the line; empty if the record is rejected.
        digest: of the messages and tools, for finding duplicates.
        turns: assistant messages, those with loss, those with reasoning.
        format: the format it was read in; empty if none was found.
        unused: paths of fields that nothing used, and whether their meaning is unclear.
        tools: whether tools are defined beside the messages.
        matches: texts of evaluation sets that it holds.
        fingerprint: by which it is alike others, where some are held out.
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
    unused: tuple[tuple[str, bool], ...] = ()
    tools: bool = False
    matches: tuple[Match, ...] = ()
    fingerprint: bytes = b""

    @property
    def place(self) -> str:
        """File and line (or record) for messages."""
        return f"{self.source}:{self.line}" if self.line else f"{self.source}, record {self.record}"


@dataclass
class Figures:
    """Counts of a run, as the receipt carries them.

    ``turns`` are assistant messages of accepted records; ``trained_turns`` those with loss; ``with_reasoning`` those
    with a thinking block; ``with_tools`` records that define tools; ``formats`` counts records by the format they were
    read in, ``sources`` by file; ``unused_fields`` counts accepted records by fields that nothing used, with the first
    place; ``unclear_fields`` names those of them whose meaning must be told; ``contamination`` says which evaluation
    sets were looked for and what of them was found; ``held_out`` how many of the accepted records are not trained on.
    """

    records: int = 0
    accepted: int = 0
    rejected: int = 0
    rejects: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    turns: int = 0
    trained_turns: int = 0
    with_reasoning: int = 0
    with_tools: int = 0
    formats: Counter[str] = field(default_factory=Counter)
    sources: dict[str, dict[str, Any]] = field(default_factory=dict)
    unused_fields: dict[str, dict[str, Any]] = field(default_factory=dict)
    unclear_fields: dict[str, dict[str, Any]] = field(default_factory=dict)
    contamination: dict[str, Any] | None = None
    held_out: dict[str, Any] | None = None

    def expect(self, sources: Iterable[str]) -> None:
        """Name every source, so that one without a record is counted too."""
        for source in sources:
            self.sources.setdefault(source, {"records": 0, "accepted": 0, "formats": {}, "rejects": {}})

    def add(self, outcome: Outcome) -> None:
        """Count a record."""
        self.records += 1
        self.expect([outcome.source])
        source = self.sources[outcome.source]
        source["records"] += 1
        if outcome.format:
            self.formats[outcome.format] += 1
            source["formats"][outcome.format] = source["formats"].get(outcome.format, 0) + 1
        if outcome.reason:
            source["rejects"][outcome.reason] = source["rejects"].get(outcome.reason, 0) + 1
            self.reject(outcome.reason, f"{outcome.place}: {outcome.message}")
            return
        self.accepted += 1
        source["accepted"] += 1
        turns, trained, reasoned = outcome.turns
        self.turns, self.trained_turns = self.turns + turns, self.trained_turns + trained
        self.with_reasoning += reasoned
        self.with_tools += outcome.tools
        for path, unclear in outcome.unused:
            _count(self.unused_fields, path, outcome.place)
            if unclear:
                _count(self.unclear_fields, path, outcome.place)

    def reject(self, reason: str, example: str) -> None:
        """Count a rejected record, keeping the first few as examples."""
        self.rejected += 1
        self.rejects[reason] += 1
        examples = self.examples.setdefault(reason, [])
        if len(examples) < EXAMPLES:
            examples.append(example)

    def empty_sources(self) -> list[str]:
        """Sources that gave no record to train on, each with what became of its records."""
        return [f"{place}: {_fate(source)}" for place, source in self.sources.items() if not source["accepted"]]

    def as_dict(self) -> dict[str, Any]:
        """JSON-serialisable figures with sorted reasons, the most frequent fields first."""
        rejects = dict(sorted(self.rejects.items()))
        formats = dict(sorted(self.formats.items()))
        fields = {
            name: dict(sorted(counted.items(), key=lambda one: (-one[1]["records"], one[0])))
            for name, counted in (("unused_fields", self.unused_fields), ("unclear_fields", self.unclear_fields))
        }
        examples = dict(sorted(self.examples.items()))
        counted = {name: value for name, value in vars(self).items() if value is not None}
        return {**counted, "rejects": rejects, "formats": formats, "examples": examples, **fields}


def _count(fields: dict[str, dict[str, Any]], path: str, place: str) -> None:
    if path not in fields and len(fields) >= MOST_FIELDS:
        path = OTHERS
    one = fields.setdefault(path, {"records": 0, "first": place})
    one["records"] += 1


def _fate(source: dict[str, Any]) -> str:
    if not source["records"]:
        return "it holds no record"
    reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(source["rejects"].items()))
    return f"none of its {source['records']:,} records is accepted ({reasons})"


def described(fields: dict[str, dict[str, Any]], records: int) -> str:
    """Counted fields in one sentence, the most frequent first."""
    ordered = sorted(fields.items(), key=lambda one: (-one[1]["records"], one[0]))
    texts = [
        f"{path} in {one['records']:,} of {records:,} records, first in {_file(one['first'])}"
        for path, one in ordered[:SHOWN_FIELDS]
    ]
    more = len(ordered) - SHOWN_FIELDS
    return "; ".join([*texts, *([f"and {more} more"] if more > 0 else [])])


def _file(place: str) -> str:
    return str(Path(place).name) if "/" in place else place


def mapping_to_write(fields: Iterable[str], likely: bool = False) -> str:
    """The line of the configuration that says what fields mean: to leave them out, or what their names suggest."""
    names = dict.fromkeys(path.rpartition(".")[2] for path in fields if path != OTHERS)
    entries = ", ".join(
        f"{_yaml_key(name)}: {_yaml_key(likely_meaning(name) if likely else IGNORE)}"
        for name in list(names)[:SHOWN_FIELDS]
    )
    return f"data: {{fields: {{{entries}}}}}; each is one of {', '.join(MEANINGS)}, look at the records to choose"


def _yaml_key(name: str) -> str:
    plain = all(character.isalnum() or character in "_-" for character in name) and name[:1].isalpha()
    return name if plain else '"' + name.replace("\\", "\\\\").replace('"', '\\"') + '"'
