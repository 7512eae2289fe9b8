"""Writes safetensors files piece by piece, from several threads, in bounded memory.

A file is written as ``<name>.part``, at its full size from the start so that a full disk shows at once, and takes its
name once synced. Threads go on with the next files while one is being synced.
"""

import concurrent.futures
import ctypes
import errno
import fcntl
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from .. import files
from ..errors import BadInputError
from .safetensors_files import ITEM_SIZES, Shard

# (tensor name, first element, number of elements) → (its bytes, number of non-finite values among them); in place of
# the bytes a list of (tensor name, first element, bytes) where other tensors of the same file are made along with it
Produce = Callable[[str, int, int], tuple[Any, int]]
Item = tuple[str, int, int]

WRITE_BACK = 1 << 20  # bytes; from this size on the kernel is asked to write at once, so that syncing has little to do
MOST_UNSYNCED = 4  # complete files that wait for the disk
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)

# Not os.posix_fallocate: where a file system cannot allocate (NFSv3, older Lustre, BeeGFS) the C library then writes
# a byte into every block of the file.
_fallocate = ctypes.CDLL(None, use_errno=True).fallocate
_fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


def reserve(descriptor: int, size: int) -> None:
    """Give a file its size, with its blocks where the file system can; else a full disk shows in the writing.

    Raises:
        OSError: no space.
    """
    if _fallocate(descriptor, 0, 0, size):
        if (code := ctypes.get_errno()) in NO_SPACE:
            raise OSError(code, os.strerror(code))
        os.ftruncate(descriptor, size)


def write_fully(descriptor: int, data: Any, offset: int) -> None:
    """``pwrite`` all of ``data`` (anything with a buffer), and have the kernel begin to bring it to the disk."""
    view = memoryview(data).cast("B")
    start, size = offset, len(view)
    while view:
        count = os.pwrite(descriptor, view, offset)
        view, offset = view[count:], offset + count
    if size >= WRITE_BACK:
        os.posix_fadvise(descriptor, start, size, os.POSIX_FADV_DONTNEED)


class OpenShard:
    """A file being written: what is left to do and what was found on the way.

    Raises:
        BadInputError: another process is writing this file.
    """

    def __init__(self, folder: Path, shard: Shard) -> None:
        self.shard = shard
        self.final = folder / shard.name
        self.part = folder / f"{shard.name}.part"
        self.pending = 0
        self.handed_out = False  # all work items
        self.non_finite: dict[str, int] = {}
        self.descriptor = os.open(self.part, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            self._prepare()
        except BaseException:
            self.close()
            raise

    def _prepare(self) -> None:
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise self._written_elsewhere() from None
        except OSError:
            pass  # a file system without locks; the lock of the whole folder has said so
        self._require_own()
        os.ftruncate(self.descriptor, 0)
        reserve(self.descriptor, self.shard.size)
        write_fully(self.descriptor, self.shard.header, 0)

    def _written_elsewhere(self) -> BadInputError:
        return BadInputError(f"another process is writing {self.part}", "give every process its share")

    def _require_own(self) -> None:
        """
        Raises:
            BadInputError: what has the file's name by now is not what is written here; locks do not work everywhere.
        """
        try:
            own = os.path.samestat(os.fstat(self.descriptor), self.part.stat())
        except FileNotFoundError:
            own = False
        if not own:
            raise self._written_elsewhere()

    def work(self, produce: Produce, name: str, start: int, count: int) -> tuple[str, int]:
        made, non_finite = produce(name, start, count)
        for target, first, data in made if isinstance(made, list) else [(name, start, made)]:
            tensor = self.shard.tensors[target]
            write_fully(self.descriptor, data, tensor.offset + first * ITEM_SIZES[tensor.spec.dtype])
        return name, non_finite

    def publish(self) -> None:
        """Sync the file and give it its name."""
        os.fsync(self.descriptor)
        self._require_own()
        os.replace(self.part, self.final)
        files.fsync_directory(self.final.parent)
        self.close()

    def close(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def items(shard: Shard, chunk: int, row: Callable[[str], int]) -> Iterator[Item]:
    """The work items of a file in order; see ``model_writer.Plan`` for ``chunk`` and ``row``."""
    for name, tensor in shard.tensors.items():
        together = row(name)
        if not together:
            continue
        step = max(together, chunk // together * together)
        for start in range(0, tensor.spec.elements, step):
            yield name, start, min(step, tensor.spec.elements - start)


def write_shards(
    folder: Path,
    shards: Iterable[Shard],
    work_items: Callable[[Shard], Iterable[Item]],
    produce: Produce,
    workers: int,
    expect: Callable[[str, int, int], None],
    published: Callable[[Shard, dict[str, int]], None],
) -> None:
    """Write files in order.

    Work is handed out one item per thread ahead of the threads: for those ``expect`` is called, so that the disk reads
    them in the meantime.

    Args:
        folder: where to.
        work_items: the pieces of a file.
        produce: makes a piece.
        workers: threads.
        expect: told every work item when it is handed out.
        published: told every file that has its name, with its non-finite values by tensor; from one other thread.

    Raises:
        OSError, StageError: what the first failing thread met; the files in work stay ``.part``.
    """
    waiting: dict[Future, OpenShard] = {}
    opened: list[OpenShard] = []
    syncing: dict[Future, OpenShard] = {}
    executor = concurrent.futures.ThreadPoolExecutor(workers, "convert")
    syncer = concurrent.futures.ThreadPoolExecutor(1, "sync")

    def sync(shard: OpenShard) -> None:
        shard.publish()
        published(shard.shard, dict(sorted(shard.non_finite.items())))

    def collect(most_waiting: int, most_syncing: int) -> None:
        """Take in results until no more than so many are outstanding."""
        while True:
            done = [future for future in (*waiting, *syncing) if future.done()]
            for future in done:
                if future in syncing:
                    future.result()
                    opened.remove(syncing.pop(future))
                    continue
                shard = waiting.pop(future)
                name, non_finite = future.result()
                shard.pending -= 1
                if non_finite:
                    shard.non_finite[name] = shard.non_finite.get(name, 0) + non_finite
            for shard in opened:
                if shard.handed_out and not shard.pending and shard not in syncing.values():
                    syncing[syncer.submit(sync, shard)] = shard
            late = [
                *(waiting if len(waiting) > most_waiting else ()),
                *(syncing if len(syncing) > most_syncing else ()),
            ]
            if not late:
                return
            concurrent.futures.wait(late, return_when=concurrent.futures.FIRST_COMPLETED)

    try:
        for shard in shards:
            current = OpenShard(folder, shard)
            opened.append(current)
            for item in work_items(shard):
                expect(*item)
                waiting[executor.submit(current.work, produce, *item)] = current
                current.pending += 1
                collect(2 * workers, MOST_UNSYNCED)
            current.handed_out = True
        while waiting or syncing:
            collect(0, MOST_UNSYNCED if waiting else 0)
        collect(0, 0)
    finally:
        executor.shutdown(wait=True, cancel_futures=True)
        syncer.shutdown(wait=True, cancel_futures=True)
        for shard in opened:
            shard.close()
