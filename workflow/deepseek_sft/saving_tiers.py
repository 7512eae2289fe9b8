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


def local(saving: Saving | Mapping[str, Any]) -> Any:
    """The entry for the nodes' own disks; None where there is none. Of settings, or as they are written, as below."""
    return next((tier for tier in _of(saving, "checkpoints") or () if _of(tier, "path") is not None), None)


def local_seconds(saving: Saving | Mapping[str, Any]) -> float | None:
    """Between checkpoints on the nodes' own disks."""
    minutes = _of(local(saving), "every_minutes")
    return minutes and 60 * minutes


def local_keep(saving: Saving | Mapping[str, Any]) -> int:
    """Newest checkpoints kept on the nodes' own disks."""
    return _of(local(saving), "keep") or 1


def of_shared(saving: Saving | Mapping[str, Any]) -> dict[str, Any]:
    """``save_every_minutes`` and ``keep_checkpoints`` as they hold for the shared storage: whoever knows one folder
    alone reads these."""
    shared = next((tier for tier in _of(saving, "checkpoints") or () if _of(tier, "path") is None), None)
    stated = {"save_every_minutes": _of(shared, "every_minutes"), "keep_checkpoints": _of(shared, "keep")}
    return {key: _of(saving, key) if value is None else value for key, value in stated.items()}


def shared_seconds(saving: Saving) -> float | None:
    """Between checkpoints in the run's folder."""
    minutes = of_shared(saving)["save_every_minutes"]
    return minutes and 60 * minutes


def shared_keep(saving: Saving) -> int:
    """Newest checkpoints kept in the run's folder."""
    return of_shared(saving)["keep_checkpoints"]


def _of(settings: Any, name: str) -> Any:
    """A value of settings or of a mapping; None where it is not there."""
    return settings.get(name) if isinstance(settings, Mapping) else getattr(settings, name, None)


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
