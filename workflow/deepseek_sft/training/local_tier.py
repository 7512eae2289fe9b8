"""Checkpoints on the nodes' own disks: what lies where, which of them counts, and who hands whom what. Needs no torch.

``<path>/<run id>-<key>/step_<N>`` of each node holds the files of its own ranks, a copy of those of the node before it
(of the last node with the first), and ``committed.json``, which is the same on all nodes. ``key`` stands in the run's
folder (``node_local_key.json``): who removes a run and begins it anew does not find what the old one left on the nodes.
"""

import dataclasses
import os
import re
import secrets
import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import files, json_files, saving_tiers
from ..engines import MARKER, XTUNER
from . import checkpoints

KEY, NOTE, FURTHEST = "node_local_key.json", "node_local.json", "node_local_furthest.json"
STEP = re.compile(r"step_(\d+)")


class NotUsableError(Exception):
    """Why a folder on a node's own disk cannot be used, in words."""


# ------------------------------------------------------------------------------------------------- folders and notes


def root_of(path: str, run_id: str, key: str, variables: Mapping[str, str] = os.environ) -> Path:
    """A run's folder on this node's disk.

    Raises:
        NotUsableError: the path means nothing here, see ``saving_tiers.on_this_node``.
    """
    try:
        return saving_tiers.on_this_node(path, variables) / f"{run_id}-{key}"
    except ValueError as error:
        raise NotUsableError(str(error)) from None


def key_of(run: Path) -> str:
    """The key of a run's folders on the nodes, made where there is none; by rank 0.

    Raises:
        OSError: the run's folder cannot be written.
    """
    key = _read(run / KEY).get("key")
    if not isinstance(key, str) or not re.fullmatch(r"[0-9a-f]{8}", key):
        key = secrets.token_hex(4)
        files.write_json(run / KEY, {"key": key})
    return key


def note(run: Path, step: int, size: int, seconds: float, time: float) -> None:
    """Leave word in the run's folder of a checkpoint that is on the nodes: for ``status``, and as a sign of progress.

    Progress is a step that no start has come to: jobs that lose their nodes each time repeat the same ones for ever.

    Args:
        size: bytes of one copy, all nodes together.
        seconds: that writing and copying took.
        time: of the commit, seconds since the epoch.
    """
    files.write_json(run / NOTE, {"step": step, "bytes": size, "seconds": round(seconds, 3), "time": time})
    before = _read(run / FURTHEST).get("step")
    if type(before) is not int or before < step:
        files.write_json(run / FURTHEST, {"step": step})


def read_note(run: Path) -> dict[str, Any]:
    """What ``note`` left; empty where nothing was, or it cannot be read."""
    told = _read(run / NOTE)
    kinds = {"step": int, "bytes": int, "time": float}
    return told if all(type(told.get(key)) is kind for key, kind in kinds.items()) else {}


def _read(path: Path) -> dict[str, Any]:
    try:
        told = json_files.load(path)
    except (OSError, ValueError):
        return {}
    return told if isinstance(told, dict) else {}


def topology_of(marker: Mapping[str, Any]) -> str:
    """Digest of what must be the same where ranks read their own files back."""
    return files.digest([marker["world_size"], marker.get("experts")])


# -------------------------------------------------------------------------------------------------- what a node holds


@dataclasses.dataclass(frozen=True)
class Held:
    """A checkpoint on one node's disk, as far as it is there.

    Attributes:
        digest: of its marker: parts of two checkpoints of one step never come together.
        topology: see ``topology_of``.
        world_size: ranks that wrote it.
        hosts: nodes that wrote it, in the order of their ranks.
        ranks: those whose files are all here, with the sizes that they were committed with.
    """

    step: int
    digest: str
    topology: str
    world_size: int
    hosts: tuple[str, ...]
    ranks: frozenset[int]


def held(root: Path, run_id: str) -> list[Held]:
    """The committed checkpoints below a run's folder on this node."""
    found = []
    for folder in _steps(root):
        marker = checkpoints.marker_in(folder, run_id)
        if isinstance(marker, checkpoints.NotCommitted):
            continue
        there = checkpoints.sizes(folder)
        lacking = {rank_of(name) for name, size in marker["files"].items() if there.get(name) != size}
        hosts = marker["progress"].get("hosts")
        found.append(
            Held(
                step=marker["step"],
                digest=digest_of(marker),
                topology=topology_of(marker),
                world_size=marker["world_size"],
                hosts=tuple(hosts) if isinstance(hosts, list) else (),
                ranks=frozenset(range(marker["world_size"])) - lacking,
            )
        )
    return found


def digest_of(marker: Mapping[str, Any]) -> str:
    return files.digest(marker, 64)


def rank_of(name: str) -> int:
    """The rank that wrote a file; -1 of no rank's."""
    found = [re.search(kind, name) for kind in XTUNER.checkpoint.files]
    return next((int(one[1]) for one in found if one), -1)


def files_of(marker: Mapping[str, Any], rank: int) -> dict[str, int]:
    """Names and sizes of a rank's files."""
    return {name: size for name, size in marker["files"].items() if XTUNER.checkpoint.of_rank(name, rank)}


def _steps(root: Path) -> list[Path]:
    return sorted(p for p in root.glob("step_*") if STEP.fullmatch(p.name)) if root.is_dir() else []


# ---------------------------------------------------------------------------------------------------- which one counts


@dataclasses.dataclass(frozen=True)
class Move:
    """A rank's files that one node hands to another."""

    rank: int
    giver: int
    taker: int


@dataclasses.dataclass(frozen=True)
class Choice:
    """A checkpoint of which every rank's files are on some node.

    Attributes:
        marked: the first node that has its marker.
        moves: in the order in which all ranks make them.
    """

    step: int
    digest: str
    marked: int
    moves: tuple[Move, ...]


@dataclasses.dataclass(frozen=True)
class Damaged:
    """A rank's files on a node that are not what was committed."""

    node: int
    digest: str
    rank: int


def choices(
    told: Sequence[Sequence[Held]],
    ranks_per_node: int,
    topology: str,
    damaged: Collection[Damaged] = (),
) -> list[Choice]:
    """Checkpoints that can be loaded, oldest first; the same on whoever has heard the same.

    Args:
        told: what each node holds.
        topology: of this start: only what ranks of the same kind wrote is read.
        damaged: is as if it were not there.
    """
    found = []
    for one in _kinds(told):
        if one.topology != topology:
            continue
        holders = _holders(told, one.digest, damaged)
        if any(not holders.get(rank) for rank in range(one.world_size)):
            continue
        moves = []
        for rank in range(one.world_size):
            taker = rank // ranks_per_node
            if taker not in holders[rank]:
                moves.append(Move(rank, holders[rank][0], taker))
        marked = next(node for node, all_held in enumerate(told) if any(h.digest == one.digest for h in all_held))
        found.append(Choice(one.step, one.digest, marked, tuple(moves)))
    return sorted(found, key=lambda choice: (choice.step, -len(choice.moves), choice.digest))


def refused(
    told: Sequence[Sequence[Held]], topology: str, world_size: int, damaged: Collection[Damaged] = ()
) -> dict[int, str]:
    """Step → why a checkpoint that is there in part, or of other ranks, cannot be loaded."""
    found = {}
    for one in _kinds(told):
        name = f"node-local checkpoint step_{one.step}"
        if one.topology != topology:
            ranks = f"{one.world_size} ranks" if one.world_size != world_size else "ranks that shared experts otherwise"
            found[one.step] = (
                f"{name} is of {ranks}, this start has {world_size}: what lies on the nodes is read by the very ranks "
                "that wrote it, only the shared storage's is read by others"
            )
            continue
        holders = _holders(told, one.digest, damaged)
        lost = [rank for rank in range(one.world_size) if not holders.get(rank)]
        if lost:
            each = max(1, one.world_size // max(1, len(one.hosts)))
            wrote = dict.fromkeys(one.hosts[rank // each] for rank in lost if rank // each < len(one.hosts))
            shown = ", ".join(map(str, lost[:16])) + (f" and {len(lost) - 16} more" if len(lost) > 16 else "")
            by = f", which {' and '.join(wrote)} wrote," if wrote else ""
            found[one.step] = (
                f"{name} is lost: the files zero_pp_rank_R_* of rank {shown}{by} are on none of these nodes, nor a copy"
            )
    return found


def _kinds(told: Iterable[Iterable[Held]]) -> list[Held]:
    """One of each checkpoint, by digest."""
    return list({one.digest: one for node in told for one in node}.values())


def _holders(told: Sequence[Sequence[Held]], digest: str, damaged: Collection[Damaged]) -> dict[int, list[int]]:
    """Rank → nodes that have its files."""
    found: dict[int, list[int]] = {}
    for node, all_held in enumerate(told):
        for one in all_held:
            if one.digest == digest:
                for rank in one.ranks:
                    if Damaged(node, digest, rank) not in damaged:
                        found.setdefault(rank, []).append(node)
    return found


# ---------------------------------------------------------------------------------------------- writing and removing


def open_root(root: Path, node: int, attempt: str) -> None:
    """Make a run's folder on this node, for its owner alone, and show that it can be written; by the node's first rank.

    Raises:
        NotUsableError: naming folder and reason.
    """
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        root.mkdir(mode=0o700, exist_ok=True)
        for folder in _steps(root):
            if not (folder / MARKER).exists():  # never committed, or half removed
                shutil.rmtree(folder)
        for sign in root.glob(".node-*"):
            if not sign.name.endswith(f"-{attempt}"):  # of a start that was killed
                sign.unlink(missing_ok=True)
        _sign(root, node, attempt).write_text(attempt)
    except OSError as error:
        raise NotUsableError(f"{root} cannot be used: {error.strerror or error}") from None


def others_seen(root: Path, node: int, attempt: str) -> list[int]:
    """Nodes whose sign is in this node's folder: then the disk is no node's own. After all have opened theirs."""
    names = [re.fullmatch(rf"\.node-(\d+)-{re.escape(attempt)}", path.name) for path in root.glob(".node-*")]
    return sorted(int(found[1]) for found in names if found and int(found[1]) != node)


def close_root(root: Path, node: int, attempt: str, remove: bool) -> None:
    """Take this node's sign away; or all of the run, whose results are elsewhere."""
    _sign(root, node, attempt).unlink(missing_ok=True)
    if remove:
        for folder in _steps(root):
            discard(folder)
        shutil.rmtree(root, ignore_errors=True)


def _sign(root: Path, node: int, attempt: str) -> Path:
    return root / f".node-{node}-{attempt}"


def begin(folder: Path, expected: int) -> None:
    """Make an empty folder for a checkpoint; by the node's first rank.

    Args:
        expected: bytes that will come, own files and copies; 0: not known yet.

    Raises:
        NotUsableError: no space, or the disk cannot be written.
    """
    try:
        if folder.exists():  # of another course of the run, which was given up
            (folder / MARKER).unlink(missing_ok=True)
            shutil.rmtree(folder)
        folder.mkdir()
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise NotUsableError(f"{folder}: {error.strerror or error}") from None
    if free < expected:
        folder.rmdir()
        raise NotUsableError(
            f"{folder.parent}: {free / 1e9:.1f} GB are free, this checkpoint takes {expected / 1e9:.1f}"
        )


def discard(folder: Path) -> None:
    """Give the space of a checkpoint back that was not committed."""
    (folder / MARKER).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def commit(folder: Path, marker: Mapping[str, Any]) -> None:
    """Write the marker on this node, last and atomically; by the node's first rank.

    Raises:
        OSError: it could not be written.
    """
    files.write_json(folder / MARKER, marker)
    files.fsync_directory(folder.parent)


def prune(root: Path, step: int, keep: int) -> None:
    """Remove all but the newest ``keep`` checkpoints up to ``step``, which has just been committed somewhere.

    Later ones are of a course of the run that was given up.
    """
    steps = {int(STEP.fullmatch(folder.name)[1]): folder for folder in _steps(root)}
    kept = sorted(number for number in steps if number <= step)[-keep:]
    for number, folder in steps.items():
        if number not in kept:
            discard(folder)
    for folder in root.glob("step_*.damaged"):
        shutil.rmtree(folder, ignore_errors=True)


def set_aside(folder: Path, names: Iterable[str]) -> Path:
    """Move damaged files out of a checkpoint's folder, for a person to look at until the next one is committed."""
    target = folder.with_name(f"{folder.name}.damaged")
    target.mkdir(exist_ok=True)
    for name in names:
        if (folder / name).exists():
            os.replace(folder / name, target / name)
    return target
