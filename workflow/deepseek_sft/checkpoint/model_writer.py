"""Writes a model folder by streaming: bounded memory, several threads, and after a kill it goes on where it was.

While it is being made a folder is called ``<output>.incomplete``; there ``state.json`` names the finished files. A file
is written as ``<name>.part``, at its full size from the start so that a full disk shows at once, and takes its name
once synced. When all is complete ``origin.json`` says what the folder was made from and the folder takes its name.
"""

import concurrent.futures
import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import cli, files
from ..errors import BadInputError, CrashError
from .safetensors_files import INDEX_NAME, ITEM_SIZES, SINGLE_FILE, Shard, index_of
from .sizes import show_size

STATE, ORIGIN, LOCK = "state.json", "origin.json", "lock"
FORMAT = 1

# (tensor name, first element, number of elements) → (its bytes, number of non-finite values among them); in place of
# the bytes a list of (tensor name, first element, bytes) where other tensors of the same file are made along with it
Produce = Callable[[str, int, int], tuple[Any, int]]


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
    """

    output: Path
    identity: dict[str, Any]
    shards: list[Shard]
    chunk: int
    row: Callable[[str], int]
    workers: int
    finish: Callable[[Path], None]
    replace: bool = False

    @property
    def incomplete(self) -> Path:
        return self.output.with_name(self.output.name + ".incomplete")


@dataclass
class Progress:
    """What is written so far.

    Attributes:
        done: finished file → {tensor: number of non-finite values}, tensors without any left out.
        written: bytes written by this run.
        kept: files that an earlier run had finished.
        already_complete: nothing was to be done.
    """

    done: dict[str, dict[str, int]] = field(default_factory=dict)
    written: int = 0
    kept: int = 0
    already_complete: bool = False

    @property
    def non_finite(self) -> dict[str, int]:
        return {name: count for counts in self.done.values() for name, count in counts.items()}


def read_origin(folder: Path) -> dict[str, Any] | None:
    """What a finished folder says it was made from, or None if this workflow did not make it."""
    try:
        return json.loads((folder / ORIGIN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def write_model(plan: Plan, produce: Produce) -> Progress:
    """Write the folder, or find it finished.

    Raises:
        BadInputError: the output is something else, was made from other inputs, or the disk is too small.
        CrashError: writing failed; the same command goes on.
    """
    if plan.output.exists():
        origin = read_origin(plan.output)
        if origin is None:
            raise BadInputError(f"{plan.output} exists and was not made by this program", "choose another --output")
        difference = _difference(origin["identity"], plan.identity)
        if difference is None:
            return _finished(plan, origin)
        if not plan.replace:
            raise BadInputError(
                f"{plan.output} is complete but was made from other inputs: {difference}",
                "choose another --output, or let it be replaced: --replace",
            )
    plan.incomplete.mkdir(parents=True, exist_ok=True)
    with _locked(plan.incomplete):
        progress = _resume(plan)
        try:
            _write_shards(plan, produce, progress)
            plan.finish(plan.incomplete)
            _publish(plan, progress)
        except OSError as error:
            raise CrashError(
                f"writing {plan.incomplete} failed: {error.strerror or error}",
                "free space if the disk or quota is full; the same command goes on after the last complete file",
            ) from None
    return progress


def _difference(found: dict[str, Any], wanted: dict[str, Any]) -> str | None:
    changed = [key for key in {**wanted, **found} if found.get(key) != wanted.get(key)]
    if not changed:
        return None
    return "; ".join(f"{key} was {found.get(key)!r}, is {wanted.get(key)!r}" for key in changed)


def _finished(plan: Plan, origin: dict[str, Any]) -> Progress:
    for shard in plan.shards:
        path = plan.output / shard.name
        if not path.is_file() or path.stat().st_size != shard.size:
            raise BadInputError(f"{path} was complete once and is now missing or cut", f"delete {plan.output}, repeat")
    for name in (STATE, LOCK):
        (plan.output / name).unlink(missing_ok=True)
    return Progress(done={"": origin["non_finite"]}, kept=len(plan.shards), already_complete=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One writer per folder; the lock goes with the process. File systems without locks go without."""
    with open(folder / LOCK, "w", encoding="utf-8") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadInputError(f"another process is writing {folder}", "wait for it, or stop it") from None
        except OSError as error:
            cli.say(f"warning: {folder} cannot be locked ({error.strerror}); do not start this twice")
        yield


def _resume(plan: Plan) -> Progress:
    state_file = plan.incomplete / STATE
    progress = Progress()
    if state_file.exists():
        try:
            state = json.loads(state_file.read_text(encoding="utf-8"))
            difference = _difference(state["identity"], plan.identity)
        except (ValueError, KeyError, TypeError) as error:
            raise BadInputError(f"{state_file} cannot be read: {error!r}", f"delete {plan.incomplete}") from None
        if difference is None:
            progress.done = {s.name: state["done"][s.name] for s in plan.shards if s.name in state["done"]}
        elif not plan.replace:
            raise BadInputError(
                f"{plan.incomplete} was begun from other inputs: {difference}",
                f"delete {plan.incomplete}, or let it be replaced: --replace",
            )
    for path in plan.incomplete.iterdir():
        if path.name not in progress.done and path.name not in (STATE, LOCK):
            path.unlink()
    progress.kept = len(progress.done)
    if progress.kept:
        cli.say(f"continuing: {progress.kept} of {len(plan.shards)} files were complete")
    missing = sum(shard.size for shard in plan.shards if shard.name not in progress.done)
    free = shutil.disk_usage(plan.incomplete).free
    if free < missing:
        raise BadInputError(
            f"{plan.output.parent} has {show_size(free)} free, the result still needs {show_size(missing)}",
            "free space or choose another --output",
        )
    _save_state(plan, progress)
    return progress


def _save_state(plan: Plan, progress: Progress) -> None:
    state = {"format": FORMAT, "identity": plan.identity, "done": progress.done}
    files.write_json(plan.incomplete / STATE, state)


class _OpenShard:
    """A file being written: what is left to do and what was found on the way."""

    def __init__(self, folder: Path, shard: Shard) -> None:
        self.shard = shard
        self.final = folder / shard.name
        self.part = folder / f"{shard.name}.part"
        self.pending = 0
        self.complete = False  # all work items are handed out
        self.non_finite: dict[str, int] = {}
        self.descriptor = os.open(self.part, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            os.posix_fallocate(self.descriptor, 0, shard.size)
        except OSError:  # not every file system can; a full disk shows in the write then
            os.ftruncate(self.descriptor, shard.size)
        write_fully(self.descriptor, shard.header, 0)

    def work(self, produce: Produce, name: str, start: int, count: int) -> tuple[str, int]:
        made, non_finite = produce(name, start, count)
        for target, first, data in made if isinstance(made, list) else [(name, start, made)]:
            tensor = self.shard.tensors[target]
            write_fully(self.descriptor, data, tensor.offset + first * ITEM_SIZES[tensor.spec.dtype])
        return name, non_finite

    def publish(self) -> None:
        os.fsync(self.descriptor)
        self.close()
        os.replace(self.part, self.final)
        files.fsync_directory(self.final.parent)

    def close(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def write_fully(descriptor: int, data: Any, offset: int) -> None:
    """``pwrite`` all of ``data`` (anything with a buffer)."""
    view = memoryview(data).cast("B")
    while view:
        count = os.pwrite(descriptor, view, offset)
        view, offset = view[count:], offset + count


def _items(plan: Plan, shard: Shard) -> Iterator[tuple[str, int, int]]:
    for name, tensor in shard.tensors.items():
        row = plan.row(name)
        if not row:
            continue
        step = max(row, plan.chunk // row * row)
        for start in range(0, tensor.spec.elements, step):
            yield name, start, min(step, tensor.spec.elements - start)


def _write_shards(plan: Plan, produce: Produce, progress: Progress) -> None:
    """Hand out work in order, a few items ahead of the threads, so that files finish one after the other."""
    waiting: dict[concurrent.futures.Future, _OpenShard] = {}
    opened: list[_OpenShard] = []
    executor = concurrent.futures.ThreadPoolExecutor(plan.workers)

    def collect(limit: int) -> None:
        while len(waiting) > limit:
            finished, _ = concurrent.futures.wait(waiting, return_when=concurrent.futures.FIRST_COMPLETED)
            for future in finished:
                shard = waiting.pop(future)
                name, non_finite = future.result()
                shard.pending -= 1
                if non_finite:
                    shard.non_finite[name] = shard.non_finite.get(name, 0) + non_finite
        for shard in [s for s in opened if s.complete and not s.pending]:
            shard.publish()
            opened.remove(shard)
            progress.done[shard.shard.name] = dict(sorted(shard.non_finite.items()))
            progress.written += shard.shard.size
            _save_state(plan, progress)
            cli.say(f"{shard.shard.name}: {show_size(shard.shard.size)}, {len(progress.done)}/{len(plan.shards)}")

    try:
        for shard in plan.shards:
            if shard.name in progress.done:
                continue
            current = _OpenShard(plan.incomplete, shard)
            opened.append(current)
            for item in _items(plan, shard):
                waiting[executor.submit(current.work, produce, *item)] = current
                current.pending += 1
                collect(2 * plan.workers)
            current.complete = True
        collect(0)
    finally:
        executor.shutdown(wait=True, cancel_futures=True)
        for shard in opened:
            shard.close()


def _publish(plan: Plan, progress: Progress) -> None:
    if [shard.name for shard in plan.shards] != [SINGLE_FILE]:
        files.write_json(plan.incomplete / INDEX_NAME, index_of(plan.shards))
    origin = {"format": FORMAT, "identity": plan.identity, "non_finite": progress.non_finite}
    files.write_json(plan.incomplete / ORIGIN, origin)
    old = plan.output.with_name(plan.output.name + ".replaced")
    if plan.output.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(plan.output, old)
    os.replace(plan.incomplete, plan.output)
    files.fsync_directory(plan.output.parent)
    for name in (STATE, LOCK):
        (plan.output / name).unlink(missing_ok=True)
    shutil.rmtree(old, ignore_errors=True)
