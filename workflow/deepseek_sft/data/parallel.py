"""Work spread over processes with results in the order of the input, whatever the number of processes."""

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TypeVar

from ..errors import CrashError

Item = TypeVar("Item")
Result = TypeVar("Result")

AHEAD = 3  # chunks in flight per worker; bounds the memory
HARMLESS = ("jemalloc_bg_thd",)  # pyarrow's allocator, which takes its locks along when it is forked


def chunked(
    items: Iterable[Item], size: int, weigh: Callable[[Item], int] = lambda _: 0, most: int = 0
) -> Iterator[list[Item]]:
    """Lists of ``size`` items; shorter where their weights exceed ``most`` together, and at the end."""
    chunk: list[Item] = []
    weight = 0
    for item in items:
        own = weigh(item)
        if chunk and (len(chunk) == size or weight + own > most):
            yield chunk
            chunk, weight = [], 0
        chunk.append(item)
        weight += own
    if chunk:
        yield chunk


def ordered_map(function: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """``map(function, items)`` over ``workers`` processes; with one worker, in this process.

    Raises:
        CrashError: a worker died.
    """
    if workers <= 1:
        yield from map(function, items)
        return
    pool = ProcessPoolExecutor(workers, mp_context=_context(), initializer=_start_worker)
    pending: deque[Future[Result]] = deque()
    try:
        pool.submit(os.getpid).result()  # forked now, before reading the items starts any thread
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) >= workers * AHEAD:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool:
        raise CrashError("a worker process died", "most often memory ran out: use fewer --workers") from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _context() -> multiprocessing.context.BaseContext:
    """Fork where that is safe: workers then have the tokenizer that this process has read, which takes seconds each.

    A fork keeps one thread, and whatever lock another one held stays locked: with threads, processes start anew.
    """
    threads = [Path(path, "comm").read_text(encoding="utf-8").strip() for path in Path("/proc/self/task").iterdir()]
    alone = threading.active_count() == 1 and len([name for name in threads if name not in HARMLESS]) == 1
    return multiprocessing.get_context("fork" if alone else "spawn")


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)
