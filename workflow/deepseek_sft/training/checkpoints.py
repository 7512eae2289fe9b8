"""Checkpoints of a run: found, committed, set aside and removed.

A checkpoint is the folder ``step_<N>`` of a run. It counts only with its marker ``committed.json``, which rank 0 writes
last, atomically, once the files of all ranks are on disk (docs/training.md specifies it). Needs no torch.
"""

import dataclasses
import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

from .. import files, json_files
from ..cli import say
from ..engines import DEFAULT, ENGINES, MARKER, MARKER_FORMAT, XTUNER, CheckpointLayout

INCOMPLETE, DAMAGED = ".incomplete", ".damaged"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint: its folder and its marker."""

    folder: Path
    marker: dict[str, Any]

    @property
    def step(self) -> int:
        return self.marker["step"]

    @property
    def progress(self) -> dict[str, Any]:
        return self.marker.get("progress", {})


def folder_of(run: Path, step: int) -> Path:
    return run / f"step_{step}"


def sizes(folder: Path) -> dict[str, int]:
    """Name and size of every file of a checkpoint folder but the marker."""
    found = (p for p in sorted(folder.rglob("*")) if p.is_file())
    return {p.relative_to(folder).as_posix(): p.stat().st_size for p in found if p.name != MARKER and p.name[0] != "."}


def files_of_rank(folder: Path, rank: int, layout: CheckpointLayout = XTUNER.checkpoint) -> dict[str, int]:
    """Name and size of the files that ``rank`` wrote."""
    return {p.name: p.stat().st_size for p in sorted(folder.iterdir()) if layout.of_rank(p.name, rank)}


def commit(folder: Path, marker: dict[str, Any], written: dict[str, int], patience: float = 60.0) -> Checkpoint:
    """Write the marker of a checkpoint whose files are complete; ``files`` and ``format`` are added.

    Args:
        written: name and size of every file, as the ranks that wrote them say.
        patience: seconds for the files of other nodes to show up here, since network file systems cache.

    Raises:
        RuntimeError: not two files of each rank (optimizer and model states), or other sizes here than there.
    """
    deadline = time.monotonic() + patience
    while (found := sizes(folder)) != written and time.monotonic() < deadline:
        time.sleep(0.5)
    if found != written:
        different = [name for name in sorted(found.keys() | written) if found.get(name) != written.get(name)]
        name = different[0]
        raise RuntimeError(
            f"checkpoint {folder} is not complete: {len(different)} files differ from what their ranks wrote; "
            f"{name}: {found.get(name, 'no')} bytes here, {written.get(name, 'none')} written"
        )
    layout, expected = ENGINES[marker.get("engine", DEFAULT)].checkpoint, marker["world_size"]
    if (written_by := layout.complete(list(found), expected)) != expected or 0 in found.values():
        raise RuntimeError(f"checkpoint {folder} is not complete: {written_by} of {expected} ranks wrote theirs")
    complete = {"format": MARKER_FORMAT} | marker | {"files": found}
    files.write_json(folder / MARKER, complete)
    files.fsync_directory(folder.parent)  # the folder's own name
    return Checkpoint(folder, complete)


def amend(folder: Path, keys: dict[str, Any]) -> None:
    """Add keys to the marker of a committed checkpoint, atomically."""
    marker = json_files.load(folder / MARKER)
    files.write_json(folder / MARKER, marker | keys)


@dataclasses.dataclass(frozen=True)
class NotCommitted:
    """Why a checkpoint folder does not count for a run."""

    reason: str


def judge(folder: Path, run_id: str) -> Checkpoint | NotCommitted:
    """The committed checkpoint in a folder, or why there is none; a marker that was edited or torn counts as none."""
    marker = marker_in(folder, run_id)
    if isinstance(marker, NotCommitted):
        return marker
    found = sizes(folder)
    for name, size in marker["files"].items():
        if found.get(name) != size:
            return NotCommitted(f"{name} has {found.get(name, 'no')} bytes instead of {size}")
    return Checkpoint(folder, marker)


def marker_in(folder: Path, run_id: str) -> dict[str, Any] | NotCommitted:
    """The marker in a folder, whatever lies beside it, or why there is none of this run and step."""
    try:
        marker = json_files.load(folder / MARKER)
    except FileNotFoundError:
        return NotCommitted("no commit marker")
    except (OSError, ValueError) as error:
        return NotCommitted(f"unreadable marker: {error}")
    if reason := _malformed(marker):
        return NotCommitted(f"malformed marker: {reason}")
    if marker["format"] != MARKER_FORMAT:
        return NotCommitted(f"marker of format {marker['format']}")
    if marker["run_id"] != run_id:
        return NotCommitted(f"of run {marker['run_id']}")
    if folder_of(folder.parent, marker["step"]).name != folder.name:
        return NotCommitted(f"marker of step {marker['step']}")
    return marker


# Fields of the marker that a start relies on, with their types.
FIELDS = {"format": int, "run_id": str, "step": int, "world_size": int, "progress": dict, "files": dict}

SCHEDULE = ("rows_done", "global_batch", "planned_batch", "planned_steps")  # absent from markers of earlier versions


def _malformed(marker: Any) -> str | None:
    if not isinstance(marker, dict):
        return "no JSON object"
    for key, kind in FIELDS.items():
        value = marker.get(key)
        if not isinstance(value, kind) or isinstance(value, bool):
            return f"{key} is {json.dumps(value)[:80]}"
    if marker["step"] < 0 or marker["world_size"] < 1:
        return f"step {marker['step']} of {marker['world_size']} ranks"
    if not all(type(size) is int for size in marker["files"].values()):
        return "files are not names with sizes"
    schedule = marker.get("schedule", dict.fromkeys(SCHEDULE, 1))
    if not isinstance(schedule, dict) or not all(type(schedule.get(key)) is int for key in SCHEDULE):
        return f"schedule is {json.dumps(schedule)[:80]}"
    sums = marker.get("checksums", {})
    if not isinstance(sums, dict) or not all(isinstance(value, str) for value in sums.values()):
        return "checksums are not names with text"
    return None


def committed(run: Path, run_id: str) -> list[Checkpoint]:
    """All committed checkpoints of a run, newest last."""
    if not run.is_dir():
        return []
    judged = [judge(p, run_id) for p in run.iterdir() if re.fullmatch(r"step_\d+", p.name)]
    return sorted((c for c in judged if isinstance(c, Checkpoint)), key=lambda checkpoint: checkpoint.step)


def newest(run: Path, run_id: str) -> Checkpoint | None:
    """The newest committed checkpoint of a run."""
    found = committed(run, run_id)
    return found[-1] if found else None


def set_aside(run: Path, run_id: str) -> list[Path]:
    """Rename every checkpoint folder that does not count to ``*.incomplete``; returns the new names."""
    moved = []
    for folder in sorted(run.iterdir()) if run.is_dir() else []:
        if not re.fullmatch(r"step_\d+", folder.name):
            continue
        judged = judge(folder, run_id)
        if isinstance(judged, NotCommitted):
            moved.append(_renamed(folder, INCOMPLETE))
            say(f"checkpoint {folder.name} does not count ({judged.reason}): set aside as {moved[-1].name}")
    return moved


def set_aside_damaged(folder: Path) -> Path:
    """Rename a checkpoint whose content is not what was committed; returns its new place."""
    return _renamed(folder, DAMAGED)


def _renamed(folder: Path, suffix: str) -> Path:
    target = folder.with_name(folder.name + suffix)
    shutil.rmtree(target, ignore_errors=True)
    folder.rename(target)
    return target


def _aside(run: Path) -> list[Path]:
    """Checkpoints that were set aside."""
    return [folder for suffix in (INCOMPLETE, DAMAGED) for folder in sorted(run.glob(f"step_*{suffix}"))]


def make_room(run: Path, expected: int) -> None:
    """Remove what was set aside when ``expected`` bytes would not fit; otherwise it waits for the next commit.

    Args:
        expected: 0: not known yet; then as many as the largest checkpoint folder here holds, whole or not.
    """
    aside = _aside(run)
    if aside and not expected:
        expected = max(sum(sizes(folder).values()) for folder in run.glob("step_*") if folder.is_dir())
    if aside and shutil.disk_usage(run).free < expected:
        say(f"removing {', '.join(folder.name for folder in aside)}: the next checkpoint needs the space")
        for folder in aside:
            shutil.rmtree(folder, ignore_errors=True)


def prune(run: Path, run_id: str, keep: int, best: Checkpoint | None = None) -> None:
    """Remove all but the newest ``keep`` committed checkpoints and ``best``, and those set aside.

    A damaged one stays, for a person to look at or to restore, until training has come as far again. Called only
    after a newer checkpoint is committed. The marker goes first: what an interrupted removal leaves is not a
    checkpoint any more.
    """
    old_ones = [old for old in committed(run, run_id)[:-keep] if best is None or old.folder != best.folder]
    for old in old_ones:
        (old.folder / MARKER).unlink()
        shutil.rmtree(old.folder)
    last = max((checkpoint.step for checkpoint in committed(run, run_id)), default=-1)
    for folder in _aside(run):
        if folder.suffix == INCOMPLETE or int(folder.stem.removeprefix("step_")) <= last:
            shutil.rmtree(folder, ignore_errors=True)
