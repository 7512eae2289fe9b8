"""Experiment folders that were copied, moved or renamed: recognised by receipts that name another folder's results.

Going on with one would convert, verify or remove what belongs to the experiment that it was copied from.
"""

import os
import shlex
from pathlib import Path
from typing import Any

from . import files, json_files, receipts
from .errors import BadInputError

# Rule → its result that always lies in the experiment's folder, and how many folders below it.
OWN = {
    "prepare_data": ("data", 2),
    "tokenize_data": ("tokens", 2),
    "train": ("checkpoint", 4),
    "convert_checkpoint": ("model", 1),
    "verify_model": ("model", 1),
}


def foreign(results: Path) -> tuple[Path, str] | None:
    """The other folder that an experiment's receipts speak of, and a result named there; None if there is none.

    A result that a link inside the folder leads to is its own.
    """
    for rule, (name, depth) in OWN.items():
        try:
            receipt = json_files.load(results / "receipts" / f"{rule}.json")
            receipts.check(receipt)
            place = Path(receipt["result"][name])
        except (OSError, ValueError, KeyError):
            continue  # whoever needs it says what is wrong with it
        if not _inside(place, results) and len(place.parts) > depth:
            return place.parents[depth - 1], str(place)
    return None


def check(results: Path) -> None:
    """
    Raises:
        BadInputError: the folder is a copy, with the command that makes it an experiment of its own.
    """
    if found := foreign(results):
        raise BadInputError(
            f"{results} is a copy of {found[0]} or has been renamed: its receipts name {found[1]}",
            "to go on with it as an experiment of its own: "
            f"python workflow/scripts/adopt.py {shlex.quote(str(results))}",
        )


def adopt(results: Path) -> list[Path]:
    """Have the receipts of a copied folder name what lies in it; returns those that were changed.

    Their times stay, by which Snakemake tells what has to run again. All is checked before anything is written.

    Raises:
        BadInputError: it is no copy, a receipt cannot be read, or a result was not copied along.
    """
    found = foreign(results)
    if found is None:
        raise BadInputError(f"{results} is no copied experiment: its receipts name no other folder's results")
    changed = {}
    for path in sorted(results.glob("receipts/*.json")):
        receipt = json_files.read(path, receipts.FIELDS)
        moved = receipt | {key: _moved(receipt[key], found[0], results) for key in ("result", "inputs")}
        missing = [p for p in moved["result"].values() if not Path(p).exists()]
        if moved != receipt and missing:
            raise BadInputError(f"{path}: {missing[0]} was not copied along", "copy it, or remove this receipt")
        if moved != receipt:
            changed[path] = moved
    for path, receipt in changed.items():
        times = path.stat()
        files.write_json(path, receipt)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    return list(changed)


def _inside(place: Path, folder: Path) -> bool:
    as_written = ".." not in place.parts and place.absolute().is_relative_to(folder.absolute())
    return as_written or place.resolve().is_relative_to(folder.resolve())


def _moved(value: Any, old: Path, new: Path) -> Any:
    if isinstance(value, dict):
        return {key: _moved(inner, old, new) for key, inner in value.items()}
    if isinstance(value, str) and (value == str(old) or value.startswith(f"{old}/")):
        return str(new) + value[len(str(old)) :]
    return value
