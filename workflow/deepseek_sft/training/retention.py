"""Which checkpoints of a verified experiment may go, and removing them. Receipts decide; nothing is guessed."""

import dataclasses
import re
import shutil
from pathlib import Path

from .. import receipts
from ..cli import say
from ..errors import GateError
from . import checkpoints, lock

AGAIN = "snakemake --profile <profile> convert"


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
    """What may go: all checkpoints of the verified run but the newest committed one.

    Args:
        results: ``results/<experiment>``.
        newest: the newest committed checkpoint too.

    Raises:
        BadInputError: a receipt or what it names is missing.
        GateError: the converted model is not verified, or not made from this run's last checkpoint.
    """
    train = receipts.read(results / "receipts" / "train.json", "train")
    receipts.read(results / "receipts" / "convert_checkpoint.json", "convert_checkpoint")
    verified = receipts.read(results / "receipts" / "verify_model.json", "verify_model")
    run, last = Path(train["result"]["run"]), Path(train["result"]["checkpoint"])
    failed = [name for name, check in verified["figures"].get("checks", {}).items() if check["passed"] is not True]
    if failed or not verified["figures"].get("checks"):
        raise GateError(f"the converted model is not verified: {', '.join(failed) or 'no checks'}", AGAIN)
    of = Path(verified["inputs"].get("checkpoint", {}).get("path", "none"))
    if of.resolve() != last.resolve() or verified["finished"] < train["finished"]:
        raise GateError(f"the verified model was made from {of}, but the run's last checkpoint is {last}", AGAIN)
    run_id = train["figures"]["run_id"]
    found = checkpoints.committed(run, run_id)
    if not found or found[-1].folder.resolve() != last.resolve():
        raise GateError(
            f"{run} has a newer checkpoint than the verified one, {found[-1].folder.name if found else 'or none'}",
            "finish training and convert again first",
        )
    kept = [] if newest else [found[-1].folder]
    items = [_item(one.folder, f"checkpoint of step {one.step}") for one in found if one.folder not in kept]
    known = {one.folder for one in found}
    for folder in sorted(path for path in run.glob("step_*") if path.is_dir() and path not in known):
        if re.fullmatch(rf"step_\d+({re.escape(checkpoints.INCOMPLETE)})?", folder.name):
            items.append(_item(folder, "not a committed checkpoint"))
    return Removal(run, items, kept)


def _item(folder: Path, why: str) -> Item:
    return Item(folder, why, sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file()))


def remove(removal: Removal) -> None:
    """Remove what was chosen, owning the run meanwhile; the marker goes first, as when training prunes.

    Raises:
        BadInputError: the run is in use.
    """
    with lock.hold(removal.run):
        for item in removal.items:
            (item.folder / checkpoints.MARKER).unlink(missing_ok=True)
            shutil.rmtree(item.folder)
            say(f"removed {item.folder}")
