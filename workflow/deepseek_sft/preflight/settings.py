"""Thresholds of the checks: from the configuration's ``preflight`` section and from the plan."""

import dataclasses
import math
from pathlib import Path
from typing import Any

from .. import json_files, receipts
from ..errors import BadInputError
from .findings import CHECKS

BACKENDS = ("auto", "nccl", "gloo", "sockets")
GPU_PERCENT = 10.0
MOST_GLOO_NODES = 4  # above, CPU nodes are checked with plain sockets: no waiting for every node to load torch


@dataclasses.dataclass(frozen=True)
class Settings:
    """Keys and units as in ``config/README.md``."""

    skip: tuple[str, ...] = ()
    all_reduce_backend: str = "auto"
    all_reduce_mb: float | None = None
    all_reduce_min_gb_per_second: float | None = None
    clock_skew_s: float = 1.0
    local_disk_gb: float = 2.0
    shared_memory_gb: float = 1.0
    timeout_s: float = 600.0
    slow_percent: float | None = None

    def wants(self, check: str) -> bool:
        return check not in self.skip

    def slower_than(self, accelerator: str) -> float | None:
        """Percent below the median from which a device or node is slow; None judges none.

        CPU nodes share their cores with others, so that they are judged only where the configuration says so.
        """
        return self.slow_percent if self.slow_percent is not None else GPU_PERCENT if accelerator == "cuda" else None

    def backend(self, accelerator: str, nodes: int) -> str:
        """``nccl``, ``gloo`` or ``sockets``."""
        if self.all_reduce_backend != "auto":
            return self.all_reduce_backend
        if accelerator == "cuda":
            return "nccl"
        return "gloo" if nodes <= MOST_GLOO_NODES else "sockets"


@dataclasses.dataclass(frozen=True)
class Needs:
    """Bytes that the plan says a run needs; None where there is no plan, which is not judged.

    Attributes:
        host: memory of one node.
        disk: all that lies below the results folder in the end, and one checkpoint of it.
        rank: memory of one GPU.
    """

    host: float | None = None
    disk: float | None = None
    checkpoint: float = 0.0
    rank: float | None = None


def read(path: Path) -> Settings:
    """Read and check a settings file.

    Raises:
        BadInputError: unreadable, a key unknown, or a value outside its range.
    """
    try:
        values = json_files.load(path)
    except (OSError, ValueError) as error:
        raise BadInputError(f"settings {path} cannot be read: {error}") from None
    names = {field.name for field in dataclasses.fields(Settings)}
    if not isinstance(values, dict) or (unknown := sorted(values.keys() - names)):
        what = "not a JSON object" if not isinstance(values, dict) else f"unknown settings: {', '.join(unknown)}"
        raise BadInputError(f"{path}: {what}", f"known: {', '.join(sorted(names))}")
    skip = values.get("skip", [])
    if unknown := sorted(set(skip) - CHECKS.keys()):
        raise BadInputError(f"{path}: no check is named {', '.join(unknown)}", f"known: {', '.join(CHECKS)}")
    if values.get("all_reduce_backend", "auto") not in BACKENDS:
        raise BadInputError(f"{path}: all_reduce_backend must be one of {', '.join(BACKENDS)}")
    for key in names - {"skip", "all_reduce_backend"}:
        value = values.get(key)
        if value is not None and not (
            isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf
        ):
            raise BadInputError(f"{path}: {key} must be a number of at least 0, found {value!r}")
    return Settings(**(values | {"skip": tuple(skip)}))


def needs_of(plan_receipt: Path | None) -> Needs:
    """What the receipt of ``plan`` or ``refine_plan`` asks for; nothing without one.

    Raises:
        BadInputError: the receipt cannot be read, or what it names has gone.
    """
    if plan_receipt is None:
        return Needs()
    names = ("host_memory_bytes", "disk_bytes", "checkpoint_bytes", "rank_memory_bytes")
    figures = receipts.read(plan_receipt, plan_receipt.stem, {"figures": dict.fromkeys(names, int)})["figures"]
    return Needs(*(figures[name] for name in names))
