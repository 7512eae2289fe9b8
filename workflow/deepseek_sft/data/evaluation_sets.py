"""Evaluation sets: the texts of their items, and which records of the training data hold them."""

import functools
import gc
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .. import cli
from ..errors import BadInputError
from .contamination import Index, Match, build
from .lines import Oversized, split_lines
from .sources import Source, chunks, expand, kind_of, read_source

USUAL_FIELDS = ("question", "problem", "prompt", "instruction", "query", "input", "text", "messages")
TEXT = (".txt", ".txt.gz", ".txt.zst")  # an item a line
EXCERPT = 100  # characters of an item that are shown
EXAMPLES = 10
MOST_MATCHES = 20  # items noted of one record
REPORT, REJECT = "report", "reject"


@dataclass(frozen=True)
class EvaluationSet:
    """Where a set lies.

    Args:
        path: file or pattern: JSON Lines, JSON array, Parquet, or text of an item a line; .gz and .zst as well.
        fields: of its records that are looked for, each by itself, ``outer.inner`` for one inside another; the usual
            ones if none is named.
    """

    path: str
    fields: tuple[str, ...] = ()

    @classmethod
    def from_word(cls, word: str) -> "EvaluationSet":
        """Of a command line: a path, or JSON of path and fields; raises BadInputError."""
        if not word.startswith("{"):
            return cls(word)
        try:
            value = json.loads(word)
            return cls(str(value["path"]), tuple(map(str, value.get("fields") or ())))
        except (ValueError, KeyError, TypeError):
            raise BadInputError(
                f"--evaluation-sets {word!r} is no set", 'write PATH or {"path": "PATH", "fields": ["question"]}'
            ) from None


class ItemText(NamedTuple):
    """A text that is looked for: number of its set, its item, and how it begins."""

    set: int
    item: str
    excerpt: str


@dataclass(frozen=True)
class Loaded:
    """Sets that are looked for.

    Attributes:
        index: of all texts.
        texts: by their numbers.
        items: of every set how many it has.
        without_text: of every set how many of them have no text in its fields.
    """

    sets: tuple[EvaluationSet, ...]
    index: Index
    texts: tuple[ItemText, ...]
    items: tuple[int, ...]
    without_text: tuple[int, ...]

    def find(self, conversations: Sequence[list[dict[str, Any]]]) -> list[tuple[Match, ...]]:
        """The texts that each conversation's messages hold."""
        records = [[(m.get("content") or "", m["role"] == "user") for m in messages] for messages in conversations]
        return [tuple(found[:MOST_MATCHES]) for found in self.index.find(records)]

    def described(self, match: Match) -> str:
        """A match in words."""
        text = self.texts[match.text]
        return f"{match.found} of {match.words} words of {text.item}: {text.excerpt}"


@functools.lru_cache(maxsize=1)
def load(sets: tuple[EvaluationSet, ...]) -> Loaded:
    """Read sets; once a process, and its forks have it too.

    Raises:
        BadInputError: a file that is missing, unreadable or damaged, or in which no item has a text.
    """
    texts: list[ItemText] = []
    contents: list[str] = []
    items, without = [], []
    for number, one in enumerate(sets):
        count = empty = 0
        for place, found in _items(one):
            count += 1
            empty += not found
            for text in found:
                contents.append(text)
                texts.append(ItemText(number, place, " ".join(text[: 4 * EXCERPT].split())[:EXCERPT]))
        if empty == count:
            raise BadInputError(*_nothing(one, count))
        items.append(count)
        without.append(empty)
    loaded = Loaded(sets, build(contents), tuple(texts), tuple(items), tuple(without))
    gc.collect()
    gc.freeze()  # what stays is not looked through again, which would also copy its pages in every fork
    return loaded


def _items(one: EvaluationSet) -> Iterator[tuple[str, list[str]]]:
    """Place and texts of every item."""
    for path in expand(one.path, "evaluation set"):
        if path.name.endswith(TEXT):
            for line, content in enumerate(split_lines(chunks(path)), 1):
                _refuse_oversized(content, f"{path}:{line}")
                if text := content.decode("utf-8", "replace").strip():
                    yield f"{path}:{line}", [text]
            continue
        if kind_of(path) is None:
            raise BadInputError(
                f"evaluation set {path} is of no known kind",
                "files end in .jsonl, .json, .ndjson, .txt, each optionally followed by .gz or .zst, or in .parquet",
            )
        for raw in read_source(Source(path, "auto")):
            place = f"{path}:{raw.line}" if raw.line else f"{path}, item {raw.record}"
            record = raw.payload
            _refuse_oversized(record, place)
            if isinstance(record, bytes):
                try:
                    record = json.loads(record)
                except (ValueError, RecursionError) as error:
                    raise BadInputError(
                        f"evaluation set {place} is no JSON: {error}", "give JSON Lines, a JSON array, or text as .txt"
                    ) from None
            yield place, list(_texts(record, one.fields))


def _refuse_oversized(content: Any, place: str) -> None:
    if isinstance(content, Oversized):
        raise BadInputError(f"evaluation set {place}: {content.message}", "give one item a line")


def _texts(record: Any, fields: tuple[str, ...]) -> Iterator[str]:
    if isinstance(record, str):
        yield from _strings(record)
    elif isinstance(record, dict):
        for name in fields or USUAL_FIELDS:
            value: Any = record
            for part in [name] if name in record else name.split("."):
                value = value.get(part) if isinstance(value, dict) else None
            yield from _strings(value)


def _strings(value: Any) -> Iterator[str]:
    """The texts in a value; of messages those that are not the assistant's."""
    if isinstance(value, str):
        if value.strip():
            yield value
    elif isinstance(value, list):
        for one in value:
            yield from _strings(one)
    elif isinstance(value, dict) and value.get("role") != "assistant":
        for name, one in value.items():
            if name != "role":
                yield from _strings(one)


def _nothing(one: EvaluationSet, count: int) -> tuple[str, str]:
    if not count:
        return f"evaluation set {one.path} holds no item", "give a file with items, or leave the set out"
    record = next(
        (raw.payload for path in expand(one.path, "evaluation set") for raw in read_source(Source(path, "auto"))), None
    )
    record = json.loads(record) if isinstance(record, bytes) else record
    there = ", ".join(record) if isinstance(record, dict) else f"no fields, but {type(record).__name__}"
    return (
        f"evaluation set {one.path}: none of its {count:,} items has text in {', '.join(one.fields or USUAL_FIELDS)}",
        f"name the fields that hold it, {{path: {one.path}, fields: [...]}}; the first item has {there}",
    )


@dataclass
class Contamination:
    """What was found, as the receipt carries it."""

    loaded: Loaded
    policy: str
    records: int = 0
    found: list[set[str]] = field(default_factory=list)
    by_set: list[int] = field(default_factory=list)
    examples: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.found = [set() for _ in self.loaded.sets]
        self.by_set = [0] * len(self.loaded.sets)

    def add(self, place: str, matches: tuple[Match, ...]) -> None:
        """Count a record that holds items."""
        self.records += 1
        texts = [self.loaded.texts[match.text] for match in matches]
        for text in texts:
            self.found[text.set].add(text.item)
        for number in {text.set for text in texts}:
            self.by_set[number] += 1
        if len(self.examples) < EXAMPLES:
            best = matches[0]
            self.examples.append(
                {
                    "record": place,
                    "item": texts[0].item,
                    "words_found": best.found,
                    "words": best.words,
                    "text": texts[0].excerpt,
                }
            )

    def as_dict(self) -> dict[str, Any]:
        """JSON-serialisable figures."""
        loaded = self.loaded
        unlooked = [loaded.texts[number].set for number in loaded.index.uncompared]
        sets = [
            {
                "path": one.path,
                "items": loaded.items[number],
                "items_found": len(self.found[number]),
                "records": self.by_set[number],
                "items_without_text": loaded.without_text[number],
                "texts_not_compared": unlooked.count(number),
            }
            for number, one in enumerate(loaded.sets)
        ]
        return {"policy": self.policy, "records": self.records, "sets": sets, "examples": self.examples}


def tell(figures: dict[str, Any], accepted: int) -> None:
    """Print what was found in each set; the report repeats it."""
    for one in figures["sets"]:
        loud = "warning: " if one["records"] and figures["policy"] == REPORT else ""
        done = "left out" if figures["policy"] == REJECT else f"of {accepted:,} accepted ones, kept"
        cli.say(
            f"{loud}{one['path']}: {one['items_found']:,} of {one['items']:,} items found in "
            f"{one['records']:,} records ({done})"
        )
        for name, words in (
            ("items_without_text", "items have no text in the fields that are looked at"),
            ("texts_not_compared", "texts are too short, or too much like others, to be looked for"),
        ):
            if one[name]:
                cli.say(f"{one['path']}: {one[name]:,} {words}")
    for example in figures["examples"][:3]:
        cli.say(
            f"for example {example['record']} holds {example['words_found']} of {example['words']} words of "
            f"{example['item']}: {example['text']}"
        )
