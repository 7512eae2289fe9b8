"""Receipts: the small files by which one stage tells the next that it is complete.

A receipt is written last, atomically, and only when everything it names exists. Format (JSON)::

    {"schema": 1, "rule": "train", "started": "2026-01-31T12:00:00+00:00", "finished": …, "seconds": 12.3,
     "inputs":   {name: {"path": …, "fingerprint": …}},
     "settings": {…},            what shaped the result, defaults filled in
     "result":   {name: path},   where the result lies
     "figures":  {…},            what was measured
     "hosts":    ["node1", …],   machines that took part
     "slurm":    {"job_id": "7", …} or null,
     "versions": {"python": …, "workflow": …, package: version},
     "command":  [argv]}
"""

import datetime
import importlib.metadata
import os
import platform
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import __version__, files, json_files
from .errors import BadInputError

SCHEMA = 1
FIELDS = {"schema": int, "rule": str, "inputs": dict, "settings": dict, "result": dict, "figures": dict}
OPTIONAL = ("inputs", "settings")  # of receipts that were written by hand
PACKAGES = ("torch", "deepspeed", "xtuner", "transformers", "tokenizers", "safetensors", "vllm", "ray", "snakemake")
STARTED = time.time()


def versions() -> dict[str, str]:
    """Versions of Python, the workflow and whichever of the known packages this environment holds."""
    found = {"python": platform.python_version(), "workflow": __version__}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def slurm_job() -> dict[str, str] | None:
    """The Slurm job this process runs in, or None outside Slurm."""
    job_id = os.environ.get("SLURM_JOB_ID")
    if not job_id:
        return None
    names = {"nodes": "SLURM_JOB_NODELIST", "partition": "SLURM_JOB_PARTITION", "restarts": "SLURM_RESTART_COUNT"}
    return {"job_id": job_id} | {key: os.environ[name] for key, name in names.items() if os.environ.get(name)}


def input_entry(path: str | Path, full_hash: bool = False) -> dict[str, str]:
    """Path and fingerprint of one input, as receipts record it."""
    return {"path": str(path), "fingerprint": files.fingerprint(path, full_hash)}


def write(
    path: str | Path,
    rule: str,
    *,
    inputs: dict[str, dict[str, str]],
    settings: dict[str, Any],
    result: dict[str, str],
    figures: dict[str, Any],
    hosts: list[str] | None = None,
    started: float = STARTED,
) -> dict[str, Any]:
    """Write a receipt and return it.

    Args:
        path: where it goes, ``receipts/<rule>.json``.
        inputs: name → ``input_entry``.
        settings: resolved settings that shaped the result.
        result: name → path of what was made; every path must exist.
        figures: measured values, JSON-serialisable and finite.
        hosts: machines that took part; this one if not given.
        started: start of the stage, seconds since the epoch.
    """
    missing = [p for p in result.values() if not Path(p).exists()]
    if missing:
        raise AssertionError(f"receipt of {rule} names results that do not exist: {missing}")
    now = time.time()
    receipt = {
        "schema": SCHEMA,
        "rule": rule,
        "started": _iso(started),
        "finished": _iso(now),
        "seconds": round(now - started, 3),
        "inputs": inputs,
        "settings": settings,
        "result": {name: str(p) for name, p in result.items()},
        "figures": figures,
        "hosts": hosts or [socket.gethostname()],
        "slurm": slurm_job(),
        "versions": versions(),
        "command": sys.argv,
    }
    files.write_json(path, receipt)
    failed_path(path).unlink(missing_ok=True)
    return receipt


def failed_path(receipt: str | Path) -> Path:
    """Where a stage whose checks failed leaves what it found: ``failed/<rule>.json`` beside the folder of receipts.

    Beside a receipt that is written elsewhere by hand: ``<name>.failed.json``.
    """
    path = Path(receipt)
    if path.parent.name != "receipts":
        return path.with_suffix(".failed.json")
    return path.parent.parent / "failed" / path.name


def write_failed(receipt: str | Path, rule: str, figures: dict[str, Any]) -> None:
    """Leave the figures of a failed stage for the report; no stage ever starts from them.

    Format: ``{"rule", "finished", "figures": {"checks": {name: {"passed", "detail"}}, …}}``.
    """
    files.write_json(failed_path(receipt), {"rule": rule, "finished": _iso(time.time()), "figures": figures})


def read(path: str | Path, rule: str, needs: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Read the receipt of ``rule`` and check that what it names is still there.

    Args:
        needs: what the caller relies on beside the fields of every receipt, as ``json_files.require`` takes it:
            ``{"figures": {"steps": int}}``.

    Raises:
        BadInputError: missing, unreadable, of another rule, without what is needed, or its result has gone.
    """
    again = f"snakemake --profile <profile> --forcerun {rule}"
    try:
        receipt = json_files.load(path)
        if receipt.get("schema") != SCHEMA or receipt.get("rule") != rule:
            raise BadInputError(f"{path} is not a receipt of {rule}", f"make it again: {again}")
        check(receipt)
        json_files.require(receipt, needs or {})
    except FileNotFoundError:
        raise BadInputError(f"no receipt of {rule} at {path}", f"run that stage first: {again}") from None
    except (OSError, ValueError) as error:
        raise BadInputError(f"receipt {path} cannot be read: {error}", f"make it again: {again}") from None
    for name, place in receipt["result"].items():
        if not Path(place).exists():
            raise BadInputError(f"{path} names {name} at {place}, which has gone", f"make it again: {again}")
    return receipt


def check(receipt: dict[str, Any]) -> None:
    """Check the fields that every reader relies on, and fill in those that may be left out.

    Raises:
        NotJsonError: one is missing or of another type.
    """
    for name in OPTIONAL:
        receipt.setdefault(name, {})
    json_files.require(receipt, FIELDS)
    json_files.require(receipt["result"], dict.fromkeys(receipt["result"], str))
    json_files.require(receipt["inputs"], {name: {"path": str, "fingerprint": str} for name in receipt["inputs"]})


def _iso(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(timespec="seconds")
