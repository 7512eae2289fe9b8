"""Which run a start goes on with: its own, or one that trains the same on other ranks.

A run's id holds the keys of topology, as it did before they could change, so that begun runs are found by it. A start
whose own run has no checkpoint looks for a run beside it with the same inputs and the same settings but for those keys,
and goes on in that run's folder, under its id, which is the name that it keeps.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .. import files, json_files
from ..data import dealing
from ..errors import BadInputError
from ..settings import field_types, reading
from . import checkpoints, new_runs, schedule, settings
from .checkpoints import Checkpoint
from .schedule import Position, Schedule
from .settings import Settings


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What a run is made from beside its settings: two receipts, and the size of the token dataset."""

    base: dict[str, Any]
    tokens: dict[str, Any]
    rows: int
    samples: int


@dataclasses.dataclass(frozen=True)
class Found:
    """The run to go on with, or to begin.

    Attributes:
        run_id: name of its folder.
        trains: digest of what it trains, the same on any ranks.
        begun: micro batch, accumulation (in micro batches) and sequence-parallel size that it was begun with.
        newest: its newest committed checkpoint.
        own_id: the id of a run of these very settings.
    """

    run_id: str
    trains: str
    begun: dict[str, int]
    newest: Checkpoint | None
    own_id: str


def trains(chosen: Settings, inputs: Inputs) -> str:
    """Digest of settings and inputs without what says how the work is spread over ranks."""
    topology = field_types.marked(Settings, "topology")
    kept = {key: value for key, value in chosen.shaping().items() if key not in topology}
    made_from = [settings.identity(inputs.base), settings.identity(inputs.tokens)]
    return files.digest({"code": settings.CODE_VERSION, "settings": kept, "inputs": made_from})


def find(runs: Path, chosen: Settings, inputs: Inputs, world_size: int) -> Found:
    """The run of these settings; where it has no checkpoint, the one of the same training that has come furthest.

    A complete run of other settings is gone on with where its steps had as many rows: then it is what would be trained.
    With another batch it was another experiment. Every node finds the same, also once the first has begun to write
    into the run's folder.

    Args:
        runs: folder of the runs.
        chosen: as configured, before what is open in them is settled.
    """
    run_id, digest = settings.run_id(chosen, inputs.base, inputs.tokens), trains(chosen, inputs)
    begun = _told(runs / run_id, digest) or _batch(chosen, inputs)
    own = Found(run_id, digest, begun, checkpoints.newest(runs / run_id, run_id), run_id)
    if own.newest:
        return own
    others = []
    for folder in sorted(path for path in runs.glob("*") if path.name != run_id and path.is_dir()):
        newest = checkpoints.newest(folder, folder.name)
        of_other = newest and (_told(folder, digest) or _recognised(folder, digest, inputs))
        if not of_other or (position := position_of(newest, of_other)) is None:
            continue
        if newest.step < newest.marker["steps"] or position.global_batch == schedule.rows_of(begun, world_size):
            others.append((position.rows, folder.name, Found(folder.name, digest, of_other, newest, run_id)))
    return max(others, key=lambda one: one[:2])[2] if others else own


def schedule_from(fresh: Schedule, chosen: Settings, newest: Checkpoint, begun: dict[str, int]) -> Schedule:
    """The schedule that goes on from a checkpoint.

    Raises:
        BadInputError: its steps were of another number of rows, and the settings do not take that.
    """
    if (position := position_of(newest, begun)) is None:
        return fresh
    found = schedule.resumed(fresh, chosen, position)
    done = position.step >= newest.marker["steps"]
    if position.global_batch != fresh.global_batch and chosen.on_new_topology == "refuse" and not done:
        raise BadInputError(
            f"{newest.folder} was trained in steps of {position.global_batch} rows, this start would go on with "
            f"{fresh.global_batch} ({found.describe()})",
            f"choose ranks, micro_batch_size and gradient_accumulation_steps that give {position.global_batch} rows, "
            "or write train: {on_new_topology: continue}, or give another train.run_name to begin a new run",
        )
    return found


def position_of(newest: Checkpoint, begun: dict[str, int]) -> Position | None:
    """Where a checkpoint stands; None where an edited marker or an unknown batch does not tell."""
    if "schedule" not in newest.marker and not ("steps" in newest.marker and begun):
        return None
    return Position.of(newest.marker, begun)


def _batch(chosen: Settings, inputs: Inputs) -> dict[str, int]:
    counted = schedule.with_accumulation(chosen, inputs.rows, inputs.samples)
    return {key: getattr(counted, key) for key in schedule.BATCH}


def _told(folder: Path, digest: str) -> dict[str, int] | None:
    """What the run in a folder was begun with, where it says that it trains this."""
    try:
        told = json_files.load(folder / "settings.json")
        if told["trains"] == digest and all(type(told["begun"][key]) is int for key in schedule.BATCH):
            return told["begun"]
    except (OSError, ValueError, KeyError, TypeError):
        pass  # no run, of an earlier version, or torn: not known as one of this training
    return None


def _recognised(folder: Path, digest: str, inputs: Inputs) -> dict[str, int] | None:
    """The same of a run of an earlier version: its settings and these inputs must give the id that is its name."""
    for begun in _as_begun(folder, inputs):
        if settings.run_id(begun, inputs.base, inputs.tokens) == folder.name and trains(begun, inputs) == digest:
            return _batch(begun, inputs)
    return None


def _as_begun(folder: Path, inputs: Inputs) -> Iterator[Settings]:
    """What the settings in a run's folder can have been before what was open in them was settled."""
    try:
        kept = json_files.load(folder / "settings.json")["settings"]
        settled = reading.parse(Settings, kept, str(folder), complete=True)
    except (OSError, ValueError, KeyError, TypeError, BadInputError):
        return
    counts = [settled.gradient_accumulation_steps]
    if settled.accumulate_by == "samples" and inputs.rows:
        per_row = inputs.samples / inputs.rows
        most = int((counts[0] + 1) * per_row) + 1
        counts = [count for count in range(1, most + 1) if dealing.accumulation_for(count, per_row) == counts[0]]
    opened = [(default.open, getattr(settled, key)) for key, default in new_runs.DEFAULTS.items()]
    for count, *values in itertools.product(counts, *opened):
        changes = dict(zip(new_runs.DEFAULTS, values, strict=True))
        yield dataclasses.replace(settled, gradient_accumulation_steps=count, **changes)
