"""README.md of a converted model: what it was made from and how, for whoever gets the folder.

Only numbers, digests and words of our own go into it: of receipts nothing is copied that a person or a machine named,
such as paths, hosts, sources, or examples of records.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from .. import cli, files, receipts
from ..errors import BadInputError
from ..tensors.model_writer import read_origin

NAME = "README.md"
MADE = "<!-- written by verify_model -->"  # by which a card is known as ours
STAGES = ("prepare_data", "tokenize_data", "prepare_model", "train", "convert_checkpoint")
LICENCE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENSE-MODEL", "LICENCE", "LICENCE.txt")
WORD = re.compile(r"[\w.+ -]{1,60}")  # what a word of our own, a version or the name of a licence looks like
DIGEST = re.compile(r"[a-z0-9]{1,12}:[0-9a-f]{16,128}")
TRAINING = (  # settings that are told
    *("engine", "strategy", "optimizer", "dtype", "learning_rate", "min_learning_rate", "lr_schedule", "warmup_ratio"),
    *("adam_betas", "weight_decay", "max_grad_norm", "epochs", "max_steps", "micro_batch_size"),
    *("gradient_accumulation_steps", "sequence_parallel_size", "auxiliary_loss_weight", "balance_bias_speed", "seed"),
)
RUN = (
    *("steps", "skipped_steps", "first_loss", "last_loss", "tokens", "trained_tokens", "world_size", "nodes"),
    "wall_seconds",
    *("validation_first_loss", "validation_loss", "converted_step", "converted_validation_loss"),
)
DATA = ("template", "max_length", "history_reasoning", "on_too_long", "pack")
SHOWN_ROWS = 50  # sources or evaluation sets


@dataclass(frozen=True)
class Licence:
    """Of the base: its name as the base's own card says it, and the digest of the text beside it; either may lack."""

    name: str = ""
    digest: str = ""

    @classmethod
    def of(cls, base: Path) -> "Licence":
        """As the base's folder says it; empty where it does not."""
        name = ""
        try:
            head = (base / NAME).read_text(encoding="utf-8").split("---\n", 2)
            said = yaml.safe_load(head[1]) if len(head) == 3 and not head[0].strip() else None
        except (OSError, ValueError, yaml.YAMLError):
            said = None
        if isinstance(said, dict):
            found = said.get("license_name") if said.get("license") == "other" else said.get("license")
            name = _word(found or said.get("license"))
        texts = [base / file for file in LICENCE_FILES if (base / file).is_file()]
        return cls(name, files.fingerprint_file(texts[0], full=True) if texts else "")


def write(model: Path, receipt: Path, base: Path, verified: dict[str, Any]) -> bool:
    """Write the card of a verified model, where the receipts beside ``receipt`` tell of it.

    A README.md that is not ours stays, and so does a folder that cannot be written to; both are said.

    Args:
        model: converted folder.
        receipt: of verify_model.
        base: folder that training started from.
        verified: figures of verify_model.

    Returns:
        Whether there is a card of ours.
    """
    told = _receipts(receipt.parent)
    converted = told.get("convert_checkpoint", {}).get("result", {}).get("model")
    if read_origin(model) is None or not converted or Path(converted).resolve() != model.resolve():
        return False
    place = model / NAME
    if place.is_file() and MADE not in place.read_text(encoding="utf-8", errors="replace"):
        cli.say(f"{place} was written by somebody else and stays as it is")
        return False
    original = Path(told.get("prepare_model", {}).get("inputs", {}).get("base", {}).get("path") or base)
    try:
        files.write_text(place, text(told | {"verify_model": {"figures": verified}}, Licence.of(original)))
    except PermissionError as error:
        cli.say(f"warning: the model's card {place} could not be written: {error.strerror}")
        return False
    return True


def _receipts(folder: Path) -> dict[str, dict[str, Any]]:
    found = {}
    for stage in STAGES:
        try:
            found[stage] = receipts.read(folder / f"{stage}.json", stage)
        except BadInputError:  # of a chain that was started by hand, or cleaned: its section is left out
            continue
    return found


def text(told: Mapping[str, Mapping[str, Any]], licence: Licence) -> str:
    """The card.

    Args:
        told: receipts by stage; of what is missing nothing is said.
        licence: of the base.
    """
    head = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["sft"]}
    if licence.name:
        head = {"license": licence.name} | head
    parts = ["---", yaml.safe_dump(head, sort_keys=False).strip(), "---", MADE, "", "# Fine-tuned model", ""]
    parts.append(
        "Full-parameter supervised fine-tuning of a model of the DeepSeek-V3 architecture, by DeepSeek SFT on Slurm."
    )
    sections = (
        ("Base", _base(told, licence)),
        ("Data", _data(told)),
        ("Training", _training(told)),
        ("Conversion and checks", _conversion(told)),
        ("Versions", _versions(told)),
    )
    for title, rows in sections:
        if table := [f"| {name} | {value} |" for name, value in rows if value]:
            parts += ["", f"## {title}", "", "| | |", "|---|---|", *table]
    return "\n".join(parts) + "\n"


Rows = Iterator[tuple[str, str]]


def _base(told: Mapping[str, Mapping[str, Any]], licence: Licence) -> Rows:
    figures = _part(told, "prepare_model", "figures")
    yield "parameters", _number(figures.get("parameters"))
    for name in ("layers", "hidden_size", "experts", "vocab"):
        yield name.replace("_", " "), _number(figures.get(name))
    yield "fingerprint", _digest(figures.get("fingerprint"))
    yield "licence", licence.name or "not stated in the base's folder"
    yield "licence text", _digest(licence.digest)


def _data(told: Mapping[str, Mapping[str, Any]]) -> Rows:
    prepared, tokens = _part(told, "prepare_data", "figures"), _part(told, "tokenize_data", "figures")
    inputs = _part(told, "prepare_data", "inputs")
    sources = _mapping(prepared.get("sources"))
    for number, (place, source) in enumerate(list(sources.items())[:SHOWN_ROWS], 1):
        digest = _digest(_mapping(inputs.get(place)).get("fingerprint"))
        counts = f"{_number(source.get('accepted'))} of {_number(source.get('records'))} records"
        yield f"source {number}", f"{counts}, {digest}"
    yield "records", _of(prepared, "accepted", "records")
    rejects = _mapping(prepared.get("rejects"))
    yield "left out", ", ".join(f"{_word(reason)} {_number(count)}" for reason, count in rejects.items())
    yield "answers with reasoning", _of(prepared, "with_reasoning", "turns")
    yield "records held out of training", _number(_mapping(prepared.get("held_out")).get("records"))
    sets = _mapping(prepared.get("contamination")).get("sets") or []
    reject = _mapping(prepared.get("contamination")).get("policy") == "reject"
    for number, one in enumerate(map(_mapping, sets[:SHOWN_ROWS]), 1):
        found = f"{_of(one, 'items_found', 'items')} items found in {_number(one.get('records'))} records"
        digest = _digest(_mapping(inputs.get(one.get("path"))).get("fingerprint"))
        yield f"evaluation set {number}", f"{found}, {'left out' if reject else 'kept'}{digest and f', {digest}'}"
    for name in ("samples", "tokens", "trained_tokens", "rows", "longest"):
        yield name.replace("_", " "), _number(tokens.get(name))
    lengths = _mapping(tokens.get("length"))
    yield "tokens of a sample", ", ".join(f"{name} {_number(lengths.get(name))}" for name in ("mean", "p95") if lengths)
    languages = _mapping(tokens.get("languages"))
    yield "scripts", ", ".join(f"{_word(name)} {_number(count)}" for name, count in languages.items())
    yield from _settings(_part(told, "tokenize_data", "settings"), DATA)
    yield "tokenizer", _digest(tokens.get("tokenizer_fingerprint"))


def _training(told: Mapping[str, Mapping[str, Any]]) -> Rows:
    figures = _part(told, "train", "figures")
    yield from _settings(_part(told, "train", "settings"), TRAINING)
    for name in RUN:
        yield name.replace("_", " "), _number(figures.get(name))


def _conversion(told: Mapping[str, Mapping[str, Any]]) -> Rows:
    settings, inputs = _part(told, "convert_checkpoint", "settings"), _part(told, "convert_checkpoint", "inputs")
    verified = _part(told, "verify_model", "figures")
    yield "number format", _word(settings.get("dtype"))
    yield "multi-token prediction layer", _word(settings.get("mtp"))
    yield "parameters", _number(verified.get("parameters"))
    yield "tensors", _number(verified.get("tensors"))
    yield "checkpoint", _digest(_mapping(inputs.get("checkpoint")).get("fingerprint"))
    checks = _mapping(verified.get("checks"))
    yield "checks passed", ", ".join(_word(name) for name, one in checks.items() if _mapping(one).get("passed") is True)
    yield "largest relative change of a tensor", _number(verified.get("largest_relative_change"))


def _versions(told: Mapping[str, Mapping[str, Any]]) -> Rows:
    found: dict[str, set[str]] = {}
    for stage in STAGES:
        for name, version in _part(told, stage, "versions").items():
            found.setdefault(_word(name), set()).add(_word(version))
    for name in sorted(found):
        yield name, ", ".join(sorted(filter(None, found[name])))


def _settings(settings: Mapping[str, Any], names: tuple[str, ...]) -> Rows:
    for name in names:
        value = settings.get(name)
        shown = ", ".join(map(_number, value)) if isinstance(value, list) else _number(value) or _word(value)
        yield name.replace("_", " "), shown


def _of(figures: Mapping[str, Any], part: str, whole: str) -> str:
    shown = [_number(figures.get(name)) for name in (part, whole)]
    return " of ".join(shown) if all(shown) else ""


def _number(value: Any) -> str:
    """A number for people; empty for anything else."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.6g}" if isinstance(value, float) else ""


def _word(value: Any) -> str:
    return value if isinstance(value, str) and WORD.fullmatch(value) else ""


def _digest(value: Any) -> str:
    return f"`{value}`" if isinstance(value, str) and DIGEST.fullmatch(value) else ""


def _part(told: Mapping[str, Mapping[str, Any]], stage: str, part: str) -> dict[str, Any]:
    return _mapping(_mapping(told.get(stage)).get(part))


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
