"""What ``train.checkpoints`` says: how often, and how many, on the nodes' own disks and on the shared storage."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol


class Tier(Protocol):
    """One entry, see ``settings/checkpoint_tiers.py``."""

    path: str | None
    every_minutes: float | None
    keep: int | None


class Saving(Protocol):
    """Settings that say when checkpoints are saved."""

    save_every_minutes: float | None
    keep_checkpoints: int

    @property
    def checkpoints(self) -> Sequence[Tier]: ...


def local(saving: Saving) -> Tier | None:
    """The entry for the nodes' own disks."""
    return next((tier for tier in saving.checkpoints if tier.path is not None), None)


def local_seconds(saving: Saving) -> float | None:
    """Between checkpoints on the nodes' own disks."""
    tier = local(saving)
    return tier and tier.every_minutes and 60 * tier.every_minutes


def shared_minutes(saving: Saving) -> float | None:
    """Minutes between checkpoints in the run's folder."""
    stated = next((tier.every_minutes for tier in saving.checkpoints if tier.path is None), None)
    return saving.save_every_minutes if stated is None else stated


def shared_seconds(saving: Saving) -> float | None:
    """The same in seconds."""
    minutes = shared_minutes(saving)
    return minutes and 60 * minutes


def shared_keep(saving: Saving) -> int:
    """Newest checkpoints kept in the run's folder."""
    return next((tier.keep for tier in saving.checkpoints if tier.path is None and tier.keep), saving.keep_checkpoints)


def of_shared(train: Mapping[str, Any]) -> dict[str, Any]:
    """``save_every_minutes`` and ``keep_checkpoints`` as they hold for the shared storage, of settings as they are
    written: whoever knows one folder alone reads these."""
    shared = next((tier for tier in train.get("checkpoints") or () if tier.get("path") is None), {})
    stated = {"save_every_minutes": shared.get("every_minutes"), "keep_checkpoints": shared.get("keep")}
    return {key: train.get(key) if value is None else value for key, value in stated.items()}


def on_this_node(path: str, variables: Mapping[str, str] = os.environ) -> Path:
    """The folder that a tier's path means on this node: ``$NAME`` and ``${NAME}`` are its own.

    Raises:
        ValueError: in words: a variable is not set here, or the path does not begin with / then.
    """

    def value(found: re.Match[str]) -> str:
        name = found[1] or found[2]
        if not variables.get(name):
            raise ValueError(f"train.checkpoints: {path}: the variable {name} is not set on this node")
        return variables[name]

    expanded = re.sub(r"\$(?:\{(\w+)\}|(\w+))", value, path)
    if not expanded.startswith("/"):
        raise ValueError(f"train.checkpoints: {path} is {expanded!r} on this node, which does not begin with /")
    return Path(expanded)
