"""``train.jsonl`` → token files, rejects and statistics."""

import dataclasses
import functools
import hashlib
import json
import math
import os
import re
import shutil
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import cli, files
from ..errors import BadInputError, GateError
from . import dealing
from .encoding import Encoder, load_encoder
from .lines import Oversized, file_lines
from .messages import json_line
from .packing import best_fit
from .parallel import chunked, ordered_map
from .samples import Made, Sample, Settings, make_samples, oversized
from .statistics import Statistics
from .template_check import Verdict, check
from .tokenizer_files import check_against_library
from .tokens import TokenDataset, TokenWriter, write_index

CHUNK_RECORDS = 256
CHUNK_BYTES = 4 << 20  # of a chunk; a larger line is one by itself
OWN_ID = re.compile(rb'\{"id": ("(?:[^"\\]|\\.)*")')  # as prepare_data begins a line


@dataclass(frozen=True)
class Outputs:
    """Where the results go."""

    tokens: Path
    rejects: Path
    statistics: Path


def tokenize(
    source: Path,
    tokenizer: Path,
    settings: Settings,
    outputs: Outputs,
    *,
    pack: bool = False,
    workers: int = 1,
    on_template_difference: str = "fail",
    once: bool = False,
) -> dict[str, Any]:
    """Make the token folder and both files; return the figures for the receipt.

    The folder is built under a temporary name, so an interrupted run leaves the previous one, or none. If there is no
    sample, rejects and statistics are still written, since they tell why.

    Args:
        on_template_difference: what a template that is not the base's does, ``fail`` or ``warn``.
        once: each record once, whatever its weight.

    Raises:
        BadInputError: unreadable input, an unfit tokenizer, or no sample.
        GateError: the template is not that of the base.
    """
    if workers > 1:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the threads; and without these it can fork
    settings, verdict = settle_template(tokenizer, settings, on_template_difference)
    encoder = load_encoder(tokenizer, settings.template)
    building = outputs.tokens.with_name(f".{outputs.tokens.name}.building")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    try:
        statistics = Statistics(settings.max_length)
        loose = building / "loose" if pack else building
        loose.mkdir(exist_ok=True)
        writer = TokenWriter(loose)
        originals = array("q")  # of every sample the number that its copies share, or -1; filled for packing
        with files.atomic_open(outputs.rejects, "wb") as rejects:
            for made in made_samples(source, tokenizer, settings, workers):
                if verdict.tools_differ and made.calls:
                    name = made.samples[0].id if made.samples else made.rejects[0][0]
                    raise GateError(f"record {name} has tools, but {verdict.tools_differ}", _LEAVE_OUT)
                statistics.add_record(made)
                for name, reason, message in made.rejects:
                    rejects.write(json_line({"id": name, "reason": reason, "message": message}))
                used = 1 if once else made.copies
                first = len(originals) if used > 1 else None
                for copy in range(1, used + 1):
                    if pack:
                        originals.extend(-1 if first is None else first + n for n in range(len(made.samples)))
                    for sample in made.samples:
                        statistics.add_sample(sample)
                        length = np.array([len(sample.input_ids)], np.int32)
                        name = sample.id if copy == 1 else f"{sample.id}~{copy}"
                        writer.add(name, sample.input_ids, sample.labels, length)
        shards = writer.close()
        files.write_json(outputs.statistics, statistics.report())
        if not statistics.counts["samples"]:
            raise _no_samples(source, statistics, outputs.rejects)
        info = _index(encoder, settings, statistics) | {"shards": shards}
        write_index(loose, info)
        if pack:
            info = _pack(loose, building, info, originals)
            shutil.rmtree(loose)
            write_index(building, info)
        files.fsync_directory(building)
        rows = TokenDataset(building).rows()
        _replace(building, outputs.tokens)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    names = ("rows", "longest", "max_length", "packed", "vocab_size", "tokenizer_fingerprint")
    figures = statistics.figures() | {name: info[name] for name in names}
    if pack:
        figures["packing_efficiency_share"] = round(info["tokens"] / (info["rows"] * settings.max_length), 4)
    figures["mean_length"] = round(info["tokens"] / info["rows"], 2)
    shown = dealing.quantiles(rows)
    figures["row_quantiles"] = {"lengths": shown.lengths.tolist(), "pairs": shown.pairs.tolist()}
    figures["template"] = settings.template
    figures["template_prompts_compared"] = verdict.compared
    figures["template_notes"] = list(verdict.notes)
    return figures


_LEAVE_OUT = "leave such records out, or set data.on_template_difference: warn if another template will be served"


def settle_template(tokenizer: Path, settings: Settings, policy: str) -> tuple[Settings, Verdict]:
    """Settings with the template that was compared with the base's, and what the comparison found; notes are printed.

    Raises:
        BadInputError: ``auto``, and no template fits.
        GateError: the template is not that of the base.
    """
    check_against_library(tokenizer)
    verdict = check(load_encoder(tokenizer, settings.template), settings.template, policy)
    for note in verdict.notes:
        cli.say(f"{'note' if verdict.agrees else 'warning'}: {note}")
    return dataclasses.replace(settings, template=verdict.template), verdict


def made_samples(source: Path, tokenizer: Path, settings: Settings, workers: int = 1) -> Iterator[Made]:
    """Samples and rejects of every record, in the order of the input."""
    work = functools.partial(_make_chunk, tokenizer=tokenizer, settings=settings)
    done = 0
    lines = chunked(_numbered_lines(source), CHUNK_RECORDS, lambda line: len(line[1]), CHUNK_BYTES)
    for results in ordered_map(work, lines, workers):
        yield from results
        done += len(results)
        if done % (CHUNK_RECORDS * 40) == 0:
            cli.say(f"{done} records tokenised")


def _make_chunk(lines: list[tuple[str, bytes | Oversized]], tokenizer: Path, settings: Settings) -> list[Made]:
    if any(isinstance(line, Oversized) for _, line in lines):
        encoder = load_encoder(tokenizer, settings.template)
        return [
            oversized(_own_id(place, line), line, encoder, settings)
            if isinstance(line, Oversized)
            else _make_chunk([(place, line)], tokenizer, settings)[0]
            for place, line in lines
        ]
    records: list[Any] = []
    for name, line in lines:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = {}
        records.append({"id": name} | record if isinstance(record, dict) else {"id": name})
    made = make_samples(records, load_encoder(tokenizer, settings.template), settings)
    return [
        dataclasses.replace(one, copies=copies(one.weight, f"{place} {record['id']}")) if one.weight != 1 else one
        for one, (place, _), record in zip(made, lines, records, strict=True)
    ]


def _own_id(place: str, line: Oversized) -> str:
    own = OWN_ID.match(line.head)
    return json.loads(own[1]) if own else place


def copies(weight: float, name: str) -> int:
    """How often a record is used: the whole part of its weight, and once more with the fraction as its chance.

    The name, not a random state, decides: the same for any number of workers, and a record keeps its luck.
    """
    whole = math.floor(weight)
    drawn = int.from_bytes(hashlib.blake2b(name.encode("utf-8", "replace"), digest_size=8).digest()) / 2**64
    return whole + (drawn < weight - whole)


def _numbered_lines(source: Path) -> Iterator[tuple[str, bytes | Oversized]]:
    try:
        for number, line in enumerate(file_lines(source), 1):
            if isinstance(line, Oversized) or line.strip():
                yield f"{source.name}:{number}", line
    except OSError as error:
        raise BadInputError(f"{source} cannot be read: {error.strerror}", "run prepare_data first") from None


def _index(encoder: Encoder, settings: Settings, statistics: Statistics) -> dict[str, Any]:
    return {
        "shards": [],
        "rows": statistics.counts["samples"],
        "samples": statistics.counts["samples"],
        "tokens": statistics.counts["tokens"],
        "trained_tokens": statistics.counts["trained_tokens"],
        "max_length": settings.max_length,
        "longest": max(statistics.lengths),
        "vocab_size": encoder.vocab_size,
        "template": settings.template,
        "packed": False,
        "bos_token_id": encoder.bos_token_id,
        "eos_token_id": encoder.eos_token_id,
        "tokenizer_fingerprint": encoder.fingerprint,
    }


def _pack(loose: Path, folder: Path, info: dict[str, Any], originals: Sequence[int]) -> dict[str, Any]:
    """Rewrite samples as packed rows; only their lengths and numbers are held in memory."""
    samples = TokenDataset(loose)
    lengths = samples.lengths()
    rows = best_fit(lengths, info["max_length"], originals)
    writer = TokenWriter(folder)
    for row in rows:
        parts = [samples[number] for number in row]
        columns = [np.concatenate([part[name] for part in parts]) for name in ("input_ids", "labels", "sample_lengths")]
        writer.add(",".join(part["id"] for part in parts), *columns)
    shards = writer.close()
    longest = max(int(lengths[row].sum()) for row in rows)
    return info | {"shards": shards, "rows": len(rows), "longest": longest, "packed": True}


def _replace(building: Path, final: Path) -> None:
    """Give the new folder its name; a folder cannot be renamed over another, so the old one steps aside."""
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    building.rename(final)
    files.fsync_directory(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def _no_samples(source: Path, statistics: Statistics, rejects: Path) -> BadInputError:
    reasons = ", ".join(f"{reason} {count}" for reason, count in statistics.rejects.most_common())
    problem = f"{source} gives no sample ({reasons or 'it is empty'})"
    if set(statistics.rejects) == {"too_long"}:
        return BadInputError(problem, "raise --max-length, or choose --on-too-long truncate")
    return BadInputError(problem, f"see {rejects}")


def first_samples(source: Path, tokenizer: Path, settings: Settings, count: int) -> list[Sample]:
    """The first ``count`` samples, for ``--show``."""
    settings, _ = settle_template(tokenizer, settings, "warn")
    found: list[Sample] = []
    for made in made_samples(source, tokenizer, settings):
        found += made.samples
        if len(found) >= count:
            break
    return found[:count]


def tokenize_held_out(
    source: Path, tokenizer: Path, settings: Settings, tokens: Path, *, pack: bool = False, workers: int = 1
) -> dict[str, Any]:
    """Make the token folder of the held-out records for validation, each record once; rejects and statistics beside it.

    Args:
        settings: those of the training data, with the template that was settled there.

    Returns:
        Figures for the receipt.

    Raises:
        BadInputError: as ``tokenize``; or no token of them is trained.
    """
    outputs = Outputs(
        tokens, tokens.with_name(f"{tokens.name}_rejects.jsonl"), tokens.with_name(f"{tokens.name}_statistics.json")
    )
    found = tokenize(
        *(source, tokenizer, settings, outputs), pack=pack, workers=workers, on_template_difference="warn", once=True
    )
    if not found["trained_tokens"]:
        raise BadInputError(
            f"{source}: no token of the {found['samples']:,} held-out samples carries a loss",
            "hold out a larger share in data.held_out, or leave train.validation out",
        )
    names = ("rows", "samples", "rejected", "tokens", "trained_tokens", "longest", "mean_length")
    return {name: found[name] for name in names}
