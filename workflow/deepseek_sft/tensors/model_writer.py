"""Writes a model folder by streaming: bounded memory, several threads or nodes, and after a kill it goes on.

While it is being made a folder is called ``<output>.incomplete``; files in it take their names once synced, and
``<output>.progress`` names those that are finished. A run writes all files or a share of them. When all are there
``origin.json`` says what the folder was made from, and the folder takes its name.
"""

import errno
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import cli, files, json_files
from ..errors import BadInputError, CrashError
from ..formatting import byte_size
from .node_shares import Part, share
from .progress_folder import Finished, ProgressFolder, difference
from .safetensors_files import INDEX_NAME, SINGLE_FILE, Shard, index_of
from .shard_writer import Item, Produce, items, write_shards

NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS)
ORIGIN = "origin.json"
FORMAT = 1


def _nothing(*_: Any) -> None:
    return None


@dataclass(frozen=True)
class Plan:
    """What to write.

    Attributes:
        output: final folder.
        identity: what the result is made from and how; restart and re-run compare it.
        shards: the weight files.
        chunk: elements per work item.
        row: tensor name → elements that must stay together in one work item; 0 if it is made along with another.
        workers: threads.
        finish: adds the remaining files (config, tokenizer) to the folder it is given.
        replace: whether a result made from something else gives way.
        part: the share of the files to write; with None all, and the folder is completed.
        expect: told of every work item (as ``Produce``) some time before it is made, to read ahead.
        note: told of every written file; what it returns (as JSON) is kept with the file's state.
        check: told of all files' notes before the folder is completed; returns what to report and the names of files
            that must be written again, and why; those then count as unfinished.
    """

    output: Path
    identity: dict[str, Any]
    shards: list[Shard]
    chunk: int
    row: Callable[[str], int]
    workers: int
    finish: Callable[[Path], None]
    replace: bool = False
    part: Part | None = None
    expect: Callable[[str, int, int], None] = _nothing
    note: Callable[[Shard], Any] = _nothing
    check: "Callable[[dict[str, Any]], Checked] | None" = None

    @property
    def own_shards(self) -> list[Shard]:
        return share(self.shards, self.part) if self.part else self.shards


@dataclass(frozen=True)
class Checked:
    """Result of ``Plan.check``: figures to report, names of useless files, and the error to raise if there are any."""

    figures: dict[str, Any]
    useless: set[str] = field(default_factory=set)
    error: BadInputError | None = None


@dataclass
class Progress:
    """What is written so far.

    Attributes:
        done: finished file → {tensor: number of non-finite values}, tensors without any left out.
        written: bytes written by this run.
        kept: files that an earlier run or another node had finished.
        already_complete: nothing was to be done.
        figures: of ``Plan.check``.
    """

    done: dict[str, dict[str, int]] = field(default_factory=dict)
    written: int = 0
    kept: int = 0
    already_complete: bool = False
    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def non_finite(self) -> dict[str, int]:
        return {name: count for counts in self.done.values() for name, count in counts.items()}


def read_origin(folder: Path) -> dict[str, Any] | None:
    """What a finished folder says it was made from, or None if this workflow did not make it."""
    try:
        return json_files.load(folder / ORIGIN)
    except (OSError, ValueError):
        return None


def write_model(plan: Plan, produce: Produce) -> Progress:
    """Write the folder or a share of it, or find it finished.

    Raises:
        BadInputError: the output is something else, was made from other inputs, or the disk is too small.
        CrashError: writing failed; the same command goes on.
    """
    folder = ProgressFolder(plan.output, plan.identity)
    if plan.output.exists():
        origin = read_origin(plan.output)
        if origin is None:
            raise BadInputError(f"{plan.output} exists and was not made by this program", "choose another --output")
        changed = difference(origin["identity"], plan.identity)
        if changed is None:
            return _finished(plan, folder, origin)
        if not plan.replace:
            raise BadInputError(
                f"{plan.output} is complete but was made from other inputs: {changed}",
                "choose another --output, or let it be replaced: --replace",
            )
    files.require_writable(folder.incomplete)
    with folder.locked(shared=plan.part is not None, replace=plan.replace):
        try:
            progress = _resume(plan, folder)
            _write(plan, folder, produce, progress)
            if plan.part is None:
                _complete(plan, folder, progress)
        except OSError as error:
            where = f" ({error.filename})" if error.filename else ""
            fix = "free space if the disk or quota is full; the same command goes on after the last complete file"
            if error.errno in NOT_ALLOWED:
                fix = "have the file system or its permissions mended; the same command goes on"
            problem = f"writing {folder.incomplete} failed: {error.strerror or error}{where}"
            raise CrashError(problem, fix) from None
    if plan.part is None:
        folder.remove()
    return progress


def finished_files(plan: Plan) -> list[Shard]:
    """The weight files that are finished already, of an output that is still being made."""
    folder = ProgressFolder(plan.output, plan.identity)
    return [shard for shard in plan.shards if folder.finished(shard)]


def _finished(plan: Plan, folder: ProgressFolder, origin: dict[str, Any]) -> Progress:
    for shard in plan.shards:
        path = plan.output / shard.name
        if not path.is_file() or path.stat().st_size != shard.size:
            raise BadInputError(f"{path} was complete once and is now missing or cut", f"delete {plan.output}, repeat")
    if plan.part is None and not folder.incomplete.exists():
        folder.remove()
    figures = origin.get("figures", {})
    return Progress({"": origin["non_finite"]}, kept=len(plan.shards), already_complete=True, figures=figures)


def _resume(plan: Plan, folder: ProgressFolder) -> Progress:
    progress = Progress()
    for shard in plan.own_shards:
        if found := folder.finished(shard):
            progress.done[shard.name] = found.non_finite
    if plan.part is None:
        folder.remove_leftovers(set(progress.done))
    progress.kept = len(progress.done)
    if progress.kept:
        cli.say(f"continuing: {progress.kept} of {len(plan.own_shards)} files were complete")
    missing = sum(shard.size for shard in plan.own_shards if shard.name not in progress.done)
    free = shutil.disk_usage(folder.incomplete).free
    if free < missing:
        raise BadInputError(
            f"{plan.output.parent} has {byte_size(free)} free, the result still needs {byte_size(missing)}",
            "free space or choose another --output",
        )
    return progress


def _write(plan: Plan, folder: ProgressFolder, produce: Produce, progress: Progress) -> None:
    def work_items(shard: Shard) -> "list[Item]":
        return list(items(shard, plan.chunk, plan.row))

    def published(shard: Shard, non_finite: dict[str, int]) -> None:
        folder.finish(shard, Finished(non_finite, plan.note(shard)))
        progress.done[shard.name] = non_finite
        progress.written += shard.size
        cli.say(f"{shard.name}: {byte_size(shard.size)}, {len(progress.done)}/{len(plan.own_shards)}")

    missing = [shard for shard in plan.own_shards if shard.name not in progress.done]
    write_shards(folder.incomplete, missing, work_items, produce, plan.workers, plan.expect, published)


def _complete(plan: Plan, folder: ProgressFolder, progress: Progress) -> None:
    """Check, add the remaining files, and give the folder its name."""
    if plan.check:
        found = {shard.name: folder.finished(shard) for shard in plan.shards}
        checked = plan.check({name: finished.note for name, finished in found.items() if finished})
        if checked.error:
            folder.discard(checked.useless)
            raise checked.error
        progress.figures = checked.figures
    plan.finish(folder.incomplete)
    if [shard.name for shard in plan.shards] != [SINGLE_FILE]:
        files.write_json(folder.incomplete / INDEX_NAME, index_of(plan.shards))
    origin = {"format": FORMAT, "identity": plan.identity, "non_finite": progress.non_finite}
    origin["figures"] = progress.figures
    files.write_json(folder.incomplete / ORIGIN, origin)
    old = plan.output.with_name(plan.output.name + ".replaced")
    if plan.output.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(plan.output, old)
    os.replace(folder.incomplete, plan.output)
    files.fsync_directory(plan.output.parent)
    shutil.rmtree(old, ignore_errors=True)
