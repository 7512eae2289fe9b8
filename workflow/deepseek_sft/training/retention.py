"""Which checkpoints of a verified experiment may go, and removing them. Receipts decide; nothing is guessed."""

import dataclasses
import datetime
import hashlib
import re
import shutil
from pathlib import Path
from typing import Any

from .. import engines, json_files, receipts
from ..cli import say
from ..errors import BadInputError, GateError, StageError
from ..formatting import byte_size
from ..json_files import Maybe
from . import checkpoints, lock

AGAIN = "snakemake --profile <profile> convert"
VERIFY = "snakemake --profile <profile> --forcerun verify_model -- convert"
HASHED = 64 << 20  # bytes; larger files of the model are judged by their time: hashing 1.3 TB takes an hour

MODEL = {"result": {"model": str}}
FIGURES = {"run_id": str, "converted_step": Maybe(int), "steps": Maybe(int)}


@dataclasses.dataclass(frozen=True)
class Item:
    """A folder to remove.

    Attributes:
        why: what it is.
        bytes: size of its files.
    """

    folder: Path
    why: str
    bytes: int


@dataclasses.dataclass(frozen=True)
class Removal:
    """What goes and what stays of one run."""

    run: Path
    items: list[Item]
    kept: list[Path]

    @property
    def bytes(self) -> int:
        return sum(item.bytes for item in self.items)


def choose(results: Path, newest: bool = False) -> Removal:
    """What may go: all checkpoints of the verified run but the newest committed one, and the one that is converted.

    Args:
        results: ``results/<experiment>``.
        newest: the newest committed checkpoint too.

    Raises:
        BadInputError: a receipt or what it names is missing.
        GateError: the converted model is not verified, has changed since, or is not made from the last checkpoint.
    """
    train = _read(results, "train", {"result": {"run": str, "checkpoint": str}, "figures": FIGURES})
    converted = _read(results, "convert_checkpoint", MODEL)
    verified = _read(results, "verify_model", MODEL | {"figures": {"sha256": Maybe(dict)}})
    run, last = Path(train["result"]["run"]), Path(train["result"]["checkpoint"])
    failed = [name for name, check in (verified["figures"].get("checks") or {}).items() if check["passed"] is not True]
    if failed or not verified["figures"].get("checks"):
        raise GateError(f"the converted model is not verified: {', '.join(failed) or 'no checks'}", AGAIN)
    of = Path(verified["inputs"].get("checkpoint", {}).get("path", "none"))
    if of.resolve() != last.resolve() or verified["finished"] < train["finished"]:
        raise GateError(f"the verified model was made from {of}, but the run's last checkpoint is {last}", AGAIN)
    _check_model(converted, verified)
    run_id = train["figures"]["run_id"]
    found = checkpoints.committed(run, run_id)
    # With an early end the checkpoint of the lowest validation loss is converted; the newest is the run's end.
    chosen = [one.folder for one in found if one.folder.resolve() == last.resolve()]
    ended = train["figures"].get("steps") if train["figures"].get("converted_step") is not None else None
    if not chosen or (found[-1].folder not in chosen and found[-1].step != ended):
        raise GateError(
            f"{run} has a newer checkpoint than the verified one, {found[-1].folder.name if found else 'or none'}",
            "finish training and convert again first",
        )
    kept = [] if newest else list(dict.fromkeys([*chosen, found[-1].folder]))
    items = [_item(one.folder, f"checkpoint of step {one.step}") for one in found if one.folder not in kept]
    known = {one.folder for one in found}
    for folder in sorted(path for path in run.glob("step_*") if path.is_dir() and path not in known):
        if re.fullmatch(rf"step_\d+({re.escape(checkpoints.INCOMPLETE)})?", folder.name):
            items.append(_item(folder, "not a committed checkpoint"))
    return Removal(run, items, kept)


def _read(results: Path, rule: str, needs: dict[str, Any]) -> dict[str, Any]:
    """A receipt with the time at which its stage finished, and its checks, as far as it names some."""
    path = results / "receipts" / f"{rule}.json"
    figures = needs.get("figures", {}) | {"checks": Maybe(dict)}
    receipt = receipts.read(path, rule, needs | {"finished": str, "figures": figures})
    again = VERIFY if rule == "verify_model" else f"snakemake --profile <profile> --forcerun {rule}"
    try:
        datetime.datetime.fromisoformat(receipt["finished"])
        checks = receipt["figures"].get("checks") or {}
        json_files.require(checks, {name: {"passed": (bool, type(None))} for name in checks})
    except ValueError as error:
        raise BadInputError(f"{path} cannot be read: {error}", again) from None
    return receipt


def _check_model(converted: dict[str, Any], verified: dict[str, Any]) -> None:
    """Raises GateError unless the model that lies there is the one that was verified."""
    model = Path(verified["result"]["model"])
    last = Path(converted["result"]["model"])
    if model.resolve() != last.resolve():
        raise GateError(f"verified is {model}, but converted last was {last}", VERIFY)
    made_from = [one["inputs"].get("checkpoint", {}).get("fingerprint") for one in (converted, verified)]
    if made_from[0] != made_from[1] or verified["finished"] < converted["finished"]:
        raise GateError(f"{model} was converted again after it was verified", VERIFY)
    recorded = verified["figures"].get("sha256")
    if not recorded:
        raise GateError(f"the verification of {model} names no files", VERIFY)
    finished = datetime.datetime.fromisoformat(verified["finished"]).timestamp()
    for name, digest in recorded.items():
        file = model / name
        if not file.is_file():
            raise GateError(f"{file} has gone since it was verified", AGAIN)
        status = file.stat()
        if status.st_size <= HASHED:
            changed = hashlib.sha256(file.read_bytes()).hexdigest() != digest
        else:
            changed = status.st_mtime > finished + 1  # receipts count whole seconds
        if changed:
            raise GateError(f"{file} has changed since it was verified", VERIFY)


def _item(folder: Path, why: str) -> Item:
    return Item(folder, why, sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file()))


def describe(removal: Removal, verb: str) -> str:
    """What goes, line by line, what stays, and the sum.

    Args:
        verb: ``remove`` or ``would remove``.
    """
    lines = [f"{verb}  {byte_size(item.bytes):>12}  {item.folder} ({item.why})" for item in removal.items]
    lines += [f"keep  {folder}" for folder in removal.kept]
    return "\n".join([*lines, f"{byte_size(removal.bytes)} in {len(removal.items)} folders"])


def preview(results: Path) -> str:
    """What ``choose`` and ``describe`` say, or why nothing may go; for a dry run."""
    try:
        return describe(choose(results), "would remove")
    except StageError as error:
        return f"would refuse: {error}"


def remove(removal: Removal) -> None:
    """Remove what was chosen, owning the run meanwhile; the marker goes first, as when training prunes.

    Raises:
        BadInputError: the run is in use.
    """
    with lock.hold(removal.run):
        for item in removal.items:
            (item.folder / engines.MARKER).unlink(missing_ok=True)
            shutil.rmtree(item.folder)
            say(f"removed {item.folder}")
        say(f"freed {byte_size(removal.bytes)}")
