"""Thresholds of the checks: section ``preflight`` of the configuration, and what the plan needs."""

import dataclasses
from pathlib import Path

from .. import engines, json_files, receipts
from ..errors import BadInputError
from ..json_files import Maybe
from ..settings import reading
from ..settings.field_types import Text, section
from ..settings.preflight import Checks

GPU_PERCENT = 10.0
MOST_GLOO_NODES = 4  # above, CPU nodes are checked with plain sockets: no waiting for every node to load torch


@section
class Settings(Checks):
    """What is checked, and from where on a node is bad."""

    imports: tuple[Text, ...] = ()
    """Modules that training imports beside its engine's."""
    engine: Text = engines.DEFAULT
    """Whose imports are tried."""
    checkpoints: Text = ""
    """Folder of `train.checkpoints` on the nodes' own disks; empty where there is none."""

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
        own_disk: a node's own disk, and own files of one checkpoint with the copies of another node's.
    """

    host: float | None = None
    disk: float | None = None
    checkpoint: float = 0.0
    rank: float | None = None
    own_disk: float | None = None
    own_checkpoint: float = 0.0


def read(path: Path) -> Settings:
    """Read and check a settings file.

    Raises:
        BadInputError: unreadable, a key unknown, or a value that is not allowed.
    """
    return reading.read(Settings, path)


def needs_of(plan_receipt: Path | None) -> Needs:
    """What the receipt of ``plan`` or ``refine_plan`` asks for; nothing without one.

    Raises:
        BadInputError: the receipt cannot be read, or what it names has gone.
    """
    if plan_receipt is None:
        return Needs()
    names = ("host_memory_bytes", "disk_bytes", "checkpoint_bytes", "rank_memory_bytes")
    wanted = dict.fromkeys(names, float) | {"own_disks": Maybe(dict)}
    figures = receipts.read(plan_receipt, plan_receipt.stem, {"figures": wanted})["figures"]
    own = figures.get("own_disks") or {}
    try:
        json_files.require(own, dict.fromkeys(("disk_bytes", "checkpoint_bytes"), float) if own else {})
    except ValueError as error:
        raise BadInputError(f"{plan_receipt} cannot be read: {error}", "plan again") from None
    return Needs(*(figures[name] for name in names), own.get("disk_bytes"), 2 * own.get("checkpoint_bytes", 0.0))
