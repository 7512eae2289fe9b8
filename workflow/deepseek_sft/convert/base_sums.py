"""Sums of a base model's files: written once the model is found complete, compared before it is trained.

Headers, sizes and samples say nothing of a bit that turned inside a weight; such a base trains, and no loss shows it.
Format of ``base_sums.json``: ``{"format": 1, "algorithm": "sha256", "files": {name: {"bytes", "sha256"}}}``.
"""

import concurrent.futures
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .. import files, json_files
from ..errors import BadInputError

NAME = "base_sums.json"
FORMAT = 1
BLOCK = 1 << 24  # bytes
MOST_PER_RANK = 32 << 30  # bytes; half a minute of hashing beside minutes of loading
AGAIN = "fetch or restore this file; if it was changed on purpose, run prepare_model again"


def place(receipt: Path) -> Path:
    """Where the sums of a receipt's base lie: in the experiment's folder, since the base's may be read-only."""
    return receipt.parent.parent / NAME if receipt.parent.name == "receipts" else receipt.with_suffix(".sums.json")


def write(path: Path, folder: Path, weights: Iterable[Path], workers: int = 0) -> int:
    """Read all weight files and write their sums, with those of the configuration and the index; returns their bytes.

    Args:
        workers: threads; 0: two per core, at most 16.
    """
    named = [*weights, *(folder / name for name in ("config.json", "model.safetensors.index.json"))]
    present = [file for file in named if file.is_file()]
    with concurrent.futures.ThreadPoolExecutor(workers or min(16, 2 * (os.cpu_count() or 1))) as threads:
        sums = list(threads.map(_sum, present))
    entries = {
        file.relative_to(folder).as_posix(): {"bytes": size, "sha256": digest}
        for file, (size, digest) in zip(present, sums, strict=True)
    }
    files.write_json(path, {"format": FORMAT, "algorithm": "sha256", "files": entries})
    return sum(size for size, _ in sums)


def read(path: Path) -> dict[str, dict[str, Any]]:
    """File name → ``bytes`` and ``sha256``.

    Raises:
        BadInputError: the file is missing, torn or edited.
    """
    again = "run prepare_model again: snakemake --profile <profile> --forcerun prepare_model"
    content = json_files.read(path, {"format": int, "files": dict}, again)
    try:
        if content["format"] != FORMAT:
            raise json_files.NotJsonError(f"format is {content['format']}, this version reads {FORMAT}")
        json_files.require(content["files"], {name: {"bytes": int, "sha256": str} for name in content["files"]})
    except json_files.NotJsonError as error:
        raise BadInputError(f"{path} cannot be read: {error}", again) from None
    return content["files"]


def shares(sums: dict[str, dict[str, Any]], world_size: int) -> list[list[str]]:
    """The files that each rank compares: largest first, each to the rank with the fewest bytes."""
    lots: list[list[str]] = [[] for _ in range(world_size)]
    loads = [0] * world_size
    for name in sorted(sums, key=lambda name: (-sums[name]["bytes"], name)):
        rank = loads.index(min(loads))
        lots[rank].append(name)
        loads[rank] += sums[name]["bytes"]
    return lots


def is_cheap(sums: dict[str, dict[str, Any]], world_size: int) -> bool:
    """Whether comparing takes little beside loading, spread over this many ranks."""
    return max(sum(sums[name]["bytes"] for name in lot) for lot in shares(sums, world_size)) <= MOST_PER_RANK


def problems(folder: Path, sums: dict[str, dict[str, Any]], names: Iterable[str]) -> list[str]:
    """One sentence for each of these files that is not what it was."""
    found = []
    for name in names:
        try:
            size, digest = _sum(folder / name)
        except OSError as error:
            found.append(f"{folder / name} cannot be read: {error.strerror}")
            continue
        if size != sums[name]["bytes"]:
            found.append(f"{folder / name} has {size} bytes, prepare_model found {sums[name]['bytes']}")
        elif digest != sums[name]["sha256"]:
            found.append(f"{folder / name} is damaged: its sha256 is not the one that prepare_model wrote down")
    return found


def _sum(path: Path) -> tuple[int, str]:
    hasher, size = hashlib.sha256(), 0
    with open(path, "rb", buffering=0) as stream:
        while block := stream.read(BLOCK):
            hasher.update(block)
            size += len(block)
    return size, hasher.hexdigest()
