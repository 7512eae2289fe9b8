"""Sources → ``train.jsonl`` and ``rejects.jsonl``: every record ends in exactly one of them, in the input's order."""

import dataclasses
import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .. import cli, files
from ..errors import BadInputError
from .evaluation_sets import REJECT, REPORT, Contamination, EvaluationSet, load
from .fields import PLAIN, Leftovers, Vocabulary
from .figures import Figures, Outcome, described, mapping_to_write
from .formats import choose, read
from .held_out_split import Fingerprints, Split, write
from .hints import source_hint
from .lines import Oversized
from .messages import THINK_OPEN, escape_separators, json_line, normalise
from .parallel import chunked, ordered_map
from .rejection import Rejection
from .seen import Seen
from .sources import RawRecord, Source, read_source
from .tools import dump, without_filled_nulls

CHUNK_RECORDS = 512
CHUNK_BYTES = 2 << 20  # of a chunk; a larger record is one by itself
EXCERPT = 200  # characters of a rejected record kept for reading


def convert_record(
    raw: RawRecord, vocabulary: Vocabulary = PLAIN, take: Callable[[list[dict[str, Any]]], None] | None = None
) -> Outcome:
    """Decode, convert and check one record; ``take`` is given the messages of one that is accepted."""
    name = f"{os.path.basename(raw.source)}:{raw.record}"  # noqa: PTH119  a Path for every record takes its time
    place = (raw.source, raw.record, raw.line)
    record, chosen = raw.payload, ""
    try:
        if isinstance(record, Oversized):
            raise Rejection("too_large", record.message)
        if isinstance(record, bytes):
            record = _decode(record)
        elif raw.source.endswith(".parquet"):
            record = without_filled_nulls(record)
        if isinstance(record, dict):
            name = _own_id(record) or name
        chosen = choose(record, raw.format)
        left = Leftovers(vocabulary)
        conversation = read(record, chosen, vocabulary, left)
        messages = normalise(conversation.messages, vocabulary, left)
        text = json.dumps(messages, ensure_ascii=False)
        tools = dump(conversation.tools, "tool_definitions", "tools") if conversation.tools else ""
        given = f', "tools": {tools}' if tools else ""
        weight = "" if raw.weight == 1 else f', "weight": {json.dumps(raw.weight)}'
        try:
            written = escape_separators(
                f'{{"id": {json.dumps(name, ensure_ascii=False)}{weight}{given}, "messages": {text}}}\n'
            ).encode()
        except UnicodeEncodeError:
            raise Rejection("invalid_text") from None
        answers = [m for m in messages if m["role"] == "assistant"]
        reasoned = sum(m["content"].startswith(THINK_OPEN) for m in answers)
        turns = (len(answers), sum(m["loss"] for m in answers), reasoned)
        digest = hashlib.blake2b((text + tools).encode(), digest_size=16).digest()
        unused = tuple(left.paths.items())
        if take:
            take(messages)
        return Outcome(*place, name, written, digest, turns, format=chosen, unused=unused, tools=bool(tools))
    except Rejection as rejection:
        record = record.head if isinstance(record, Oversized) else record
        shown = record.decode("utf-8", "backslashreplace") if isinstance(record, bytes) else _shown(record)
        reason, message = rejection.reason, rejection.message
        return Outcome(*place, name, reason=reason, message=message, excerpt=shown[:EXCERPT], format=chosen)


def convert_chunk(
    chunk: list[RawRecord],
    vocabulary: Vocabulary = PLAIN,
    sets: tuple[EvaluationSet, ...] = (),
    fingerprints: bool = False,
) -> list[Outcome]:
    """``convert_record`` over a list, for worker processes; with what each record holds of evaluation sets."""
    if not sets and not fingerprints:
        return [convert_record(raw, vocabulary) for raw in chunk]
    conversations: list[list[dict[str, Any]]] = []
    outcomes = [convert_record(raw, vocabulary, conversations.append) for raw in chunk]
    found = load(sets).find(conversations) if sets else [()] * len(conversations)
    prints = list(map(_fingerprints().of, conversations)) if fingerprints else [b""] * len(conversations)
    each = iter(zip(found, prints, strict=True))
    return [
        one
        if one.reason or not any(more := next(each))
        else dataclasses.replace(one, matches=more[0], fingerprint=more[1])
        for one in outcomes
    ]


@functools.cache
def _fingerprints() -> Fingerprints:
    return Fingerprints()


def prepare(
    sources: list[Source],
    output: Path,
    rejects: Path,
    *,
    fail_on_invalid: bool = False,
    keep_duplicates: bool = False,
    vocabulary: Vocabulary = PLAIN,
    fail_on_unused_fields: bool = False,
    fail_on_empty_source: bool = False,
    evaluation_sets: tuple[EvaluationSet, ...] = (),
    decontaminate: str = REPORT,
    held_out: float = 0,
    workers: int = 1,
) -> Figures:
    """Read all sources and write both files.

    Where the stage fails for what all records together show, ``rejects`` is still written, since it tells why, but
    ``output`` is not.

    Args:
        sources: files.
        output: ``train.jsonl``.
        rejects: ``rejects.jsonl``.
        fail_on_invalid: stop at the first record that cannot be used.
        keep_duplicates: accept a conversation again.
        vocabulary: what the names of fields mean.
        fail_on_unused_fields: fail where any field is not used, not only one of unclear meaning.
        fail_on_empty_source: fail where a source gives no record.
        evaluation_sets: sets whose items are looked for in the records.
        decontaminate: what a record does that holds one: ``report`` counts it, ``reject`` leaves it out.
        held_out: share of the accepted records that go to other files beside ``output`` and are not trained on.
        workers: processes.

    Raises:
        BadInputError: a damaged file, an evaluation set that cannot be read, nothing accepted, an invalid record where
            ``fail_on_invalid``, a field of unclear meaning, what the other two options forbid, or nothing that
            can be held out.
    """
    figures = Figures()
    figures.expect(str(source.path) for source in sources)
    seen = Seen()
    contamination = Contamination(load(evaluation_sets), decontaminate) if evaluation_sets else None
    raw = (record for source in sources for record in read_source(source))
    work = functools.partial(convert_chunk, vocabulary=vocabulary, sets=evaluation_sets, fingerprints=held_out > 0)
    split = Split(held_out) if held_out else None
    chunks = ordered_map(work, chunked(raw, CHUNK_RECORDS, lambda record: record.size, CHUNK_BYTES), workers)
    problem: BadInputError | None = None
    with files.atomic_open(rejects, "wb") as rejected:
        try:
            with tempfile.TemporaryFile(dir=output.parent) if split else files.atomic_open(output, "wb") as accepted:
                for outcomes in chunks:
                    for outcome in outcomes:
                        if not keep_duplicates:
                            outcome = _check_duplicate(outcome, seen, figures.accepted + 1, split)
                        if fail_on_invalid and outcome.reason:  # evaluation sets have a word of their own
                            raise BadInputError(
                                f"{outcome.place}: {outcome.reason}: {outcome.message}",
                                "repair the record, or let --on-invalid reject set such records aside",
                            )
                        if contamination and outcome.matches and not outcome.reason:
                            outcome = _check_contamination(outcome, contamination)
                        figures.add(outcome)
                        if outcome.reason:
                            rejected.write(json_line(_reject_line(outcome)))
                        else:
                            accepted.write(outcome.written)
                            if split:
                                split.add(outcome.fingerprint, outcome.digest)
                    cli.say(f"{figures.records} records read, {figures.rejected} rejected")
                figures.contamination = contamination.as_dict() if contamination else None
                problem = _problem(figures, rejects, fail_on_unused_fields, fail_on_empty_source)
                if problem:
                    raise _Refused
                if split:
                    accepted.seek(0)
                    figures.held_out = write(accepted, split.decide(), held_out, output)
        except _Refused:
            pass
    if problem:
        raise problem
    return figures


class _Refused(Exception):
    """Leaves the output unwritten while the rejects are kept."""


def _problem(figures: Figures, rejects: Path, fail_on_unused: bool, fail_on_empty: bool) -> BadInputError | None:
    """Why the stage must not succeed, for what all records together show."""
    if not figures.accepted:
        reasons = ", ".join(f"{reason} {count}" for reason, count in figures.rejects.most_common())
        first = next(iter(figures.examples.values()), [""])[0]
        hints = [*filter(None, (hint_on(place, source) for place, source in figures.sources.items()))][:3]
        return BadInputError(
            f"none of {figures.records} records was accepted ({reasons or 'the sources are empty'})",
            "\n".join([f"first: {first}; all are in {rejects}" if first else "give a file with records", *hints]),
        )
    if figures.unclear_fields:
        return BadInputError(
            "fields whose names say that they carry training, reasoning or system text are not understood: "
            + described(figures.unclear_fields, figures.accepted),
            "say in the configuration (or with --fields NAME=MEANING) what they mean: "
            + mapping_to_write(figures.unclear_fields, likely=True),
        )
    if fail_on_unused and figures.unused_fields:
        return BadInputError(
            f"fields not used: {described(figures.unused_fields, figures.accepted)}",
            "say in the configuration (or with --fields NAME=MEANING) what they mean: "
            + mapping_to_write(figures.unused_fields),
        )
    if fail_on_empty and (nothing := figures.empty_sources()):
        return BadInputError(
            f"sources that give nothing: {'; '.join(nothing)}",
            f"repair them (reasons are in {rejects}), leave them out, or set data.on_empty_source: warn",
        )
    return None


def hint_on(place: str, source: dict[str, Any]) -> str:
    """What to do about a source that gave nothing, where its beginning tells."""
    hint = "" if source["accepted"] else source_hint(Path(place))
    return f"{place}: {hint}" if hint else ""


def _check_duplicate(outcome: Outcome, seen: Seen, line: int, split: Split | None) -> Outcome:
    if outcome.reason:
        return outcome
    first = seen.setdefault(outcome.digest, line)
    if first == line:
        return outcome
    message = f"same messages{' and tools' if outcome.tools else ''} as line {first} of the output"
    message += " and what is held out of it together" if split else ""
    excerpt = outcome.written.decode()[:EXCERPT]
    return dataclasses.replace(outcome, written=b"", reason="duplicate", message=message, excerpt=excerpt)


def _check_contamination(outcome: Outcome, contamination: Contamination) -> Outcome:
    contamination.add(outcome.place, outcome.matches)
    if contamination.policy != REJECT:
        return outcome
    message = contamination.loaded.described(outcome.matches[0])
    excerpt = outcome.written.decode()[:EXCERPT]
    return dataclasses.replace(outcome, written=b"", reason="contaminated", message=message, excerpt=excerpt)


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
