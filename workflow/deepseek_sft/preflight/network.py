"""Checks between nodes: reachable ports, clocks, and the shared folder."""

import concurrent.futures
import os
import time
import zlib
from pathlib import Path
from typing import Any

from . import exchange
from .exchange import Folder
from .findings import Finding

KNOWN_UP_S = 10.0  # a node that has said in the shared folder that it listens must answer within this
START_S = 60.0  # a node that has not said so may still be starting
PROBE_BYTES = 16 << 20
APPEAR_S = (
    30.0  # until another node's file must be visible: attribute caches of NFS last 3 to 60 s, a listing renews them
)
CLOCK_ASKS = 5
THREADS = 16
ALL_PAIRS = 8  # up to this many nodes everyone calls everyone


def partners(nodes: int, rank: int) -> list[int]:
    """Nodes that a node calls: all others of few, else those a power of two away in both directions and the first.

    Each node is called from 2 log₂(nodes) others, which is enough to tell who is deaf, and the number of connections
    stays far below nodes², which overflows tables of neighbours (1,024 entries by Linux's default) in larger jobs.
    """
    if nodes <= ALL_PAIRS:
        return [other for other in range(nodes) if other != rank]
    steps = [1 << power for power in range((nodes - 1).bit_length())]
    chosen = {(rank + sign * step) % nodes for step in steps for sign in (1, -1)} | {0}
    return sorted(chosen - {rank})


def reach(hosts: list[str], rank: int, port: int, attempt: str, folder: Folder, patience: float) -> dict:
    """Which of its partners answer on the port: host → None, or why it does not answer.

    Args:
        patience: longest wait in seconds for a node that may still be starting.
    """
    patience = min(patience, START_S)
    others = [(number, hosts[number]) for number in partners(len(hosts), rank)]
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        found = pool.map(lambda other: _reach(*other, port, attempt, folder, patience), others)
    return {host: error for (_, host), error in zip(others, found, strict=True)}


def _reach(number: int, host: str, port: int, attempt: str, folder: Folder, patience: float) -> str | None:
    started, seen_up = time.monotonic(), None
    while True:
        try:
            answer = exchange.ask(host, port, {"ask": "hello"})
            if answer.get("attempt") == attempt:
                return None
            error = f"it answers for {answer.get('attempt', 'something else')}"
        except OSError as problem:
            error = "no answer" if isinstance(problem, TimeoutError) else problem.strerror or str(problem)
        now = time.monotonic()
        if seen_up is None and folder.exists(f"up-{number}"):
            seen_up = now
        if now - started > patience or (seen_up is not None and now - seen_up > min(KNOWN_UP_S, patience)):
            return error
        time.sleep(0.3)


def clock_offset(host: str, port: int) -> tuple[float, float] | None:
    """Seconds that ``host``'s clock is ahead of ours and the uncertainty, by the fastest of some questions."""
    best: tuple[float, float] | None = None
    for _ in range(CLOCK_ASKS):
        try:
            before = time.time()
            theirs = exchange.ask(host, port, {"ask": "hello"})["time"]
            after = time.time()
        except (OSError, KeyError):
            continue
        uncertain = (after - before) / 2
        if best is None or uncertain < best[1]:
            best = theirs - (before + after) / 2, uncertain
    return best


def content(attempt: str, rank: int) -> bytes:
    """What a node writes into its probe file: 16 MiB that no other node or attempt writes, and that compress badly."""
    block = b"".join(zlib.crc32(f"{attempt} {rank} {i}".encode()).to_bytes(4, "big") for i in range(1 << 14))
    return block * (PROBE_BYTES // len(block))


def shared_files(
    folder: Path, attempt: str, hosts: list[str], rank: int, patience: float
) -> tuple[Finding, dict[str, Any]]:
    """Write a file and read the next node's.

    Args:
        patience: longest wait in seconds for the other file.

    Returns:
        The finding, and ``{"wrote": whether our own file was written, "reads": host whose file was read}``.
    """
    own, neighbour = folder / f"probe-{rank}", (rank + 1) % len(hosts)
    facts: dict[str, Any] = {"wrote": False, "reads": hosts[neighbour]}
    started = time.monotonic()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".probe-{rank}"
        with open(temporary, "wb") as stream:
            stream.write(content(attempt, rank))
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, own)
    except OSError as error:
        return Finding("shared_files", False, f"writing 16 MiB to {folder} failed: {error.strerror}", "no write"), facts
    facts["wrote"] = True
    speed = PROBE_BYTES / 1e6 / max(1e-9, time.monotonic() - started)
    other = folder / f"probe-{neighbour}"
    patience = min(patience, APPEAR_S)
    deadline = time.monotonic() + patience
    while not other.exists():
        list(folder.iterdir())
        if time.monotonic() > deadline:
            detail = f"the file of {hosts[neighbour]} has not shown up in {folder} within {patience:.0f} s"
            return Finding("shared_files", False, detail, "not shared"), facts
        time.sleep(0.2)
    try:
        same = other.read_bytes() == content(attempt, neighbour)
    except OSError as error:
        detail = f"reading the file of {hosts[neighbour]} failed: {error.strerror}"
        return Finding("shared_files", False, detail, "no read"), facts
    if not same:
        return Finding("shared_files", False, f"the file of {hosts[neighbour]} reads differently", "differs"), facts
    return Finding("shared_files", True, f"written with {speed:,.0f} MB/s", f"{speed:,.0f} MB/s"), facts
