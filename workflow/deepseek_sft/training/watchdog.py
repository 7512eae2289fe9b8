"""A rank that makes no progress says where each of its threads stands, and ends.

Ranks wait for each other in collectives, so one that hangs stops all, and without this the job would hold its nodes to
its time limit. Every rank watches itself. Needs no torch.
"""

import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from .. import files

# Between a rank's last word and its end: all ranks hang within moments of each other, and torchrun kills the others
# of a node as soon as one ends. The one that the others wait for shows only beside theirs.
GRACE = 10.0
BACKSTOP = 60.0  # after that the kernel ends a process in which no Python thread can run
COLLECTIVES = ("/torch/distributed/", "/deepspeed/comm/", "/deepspeed/runtime/zero/")  # where ranks wait for others
PLACES = ("start", "data", "forward", "backward", "update", "save")  # in the order of a step


class Watchdog:
    """Ends this process when ``enter`` is not called again within the phase's limit.

    Args:
        folder: where the rank's last word goes (``failure-rank<R>.json``).
        limits: seconds for each phase (``start``, ``step``, ``save``).
    """

    def __init__(self, rank: int, folder: Path, limits: dict[str, float]):
        self.rank, self.folder, self.limits = rank, folder, limits
        self.place = "start"
        self.step = 0
        self._phase, self._since = "start", time.monotonic()
        self._changed = threading.Condition()
        self._closed = False
        self.enter("start", 0)
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def enter(self, phase: str, step: int) -> None:
        """A phase of step ``step`` begins: progress."""
        with self._changed:
            self._phase, self.step, self._since = phase, step, time.monotonic()
            if phase != "step":
                self.place = phase
            self._changed.notify()
        # A thread that hangs may hold the interpreter's lock (torch opens files with it): faulthandler's own thread
        # and the kernel's timer need no lock.
        faulthandler.dump_traceback_later(self.limits[phase], file=sys.__stderr__)
        signal.setitimer(signal.ITIMER_REAL, self.limits[phase] + GRACE + BACKSTOP)  # SIGALRM's default action

    def close(self) -> None:
        """Watch no longer."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)

    def _watch(self) -> None:
        with self._changed:
            while not self._closed:
                left = self._since + self.limits[self._phase] - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(left)
            if self._closed:
                return
            limit, place, step = self.limits[self._phase], self.place, self.step
        where = f"step {step} ({place})" if step else place
        frame, waits = position()
        message = f"no progress for {limit:g} s in {where}"
        record = {
            "rank": self.rank,
            "host": socket.gethostname(),
            "time": time.time(),
            "error": f"hang: {message}",
            "hang": {"step": step, "place": place, "frame": frame, "waits": waits},
        }
        print(f"hang: rank {self.rank}: {message}, at {frame}", file=sys.__stderr__, flush=True)
        files.write_text(self.folder / f"failure-rank{self.rank}.json", json.dumps(record))
        time.sleep(min(GRACE, limit))
        os._exit(1)


def suspects(records: list[dict[str, Any]], ranks: int) -> list[int]:
    """Ranks that a hang began with: those without a word while the others waited, else those that came least far.

    Args:
        records: last words of ranks that hung.
        ranks: world size.

    Returns:
        Ranks in order; empty where all stand at the same place.
    """
    heard = {record["rank"]: record["hang"] for record in records}
    if len(heard) < ranks:
        return [rank for rank in range(ranks) if rank not in heard]
    far = {rank: (hang["step"], PLACES.index(hang["place"]), hang["waits"]) for rank, hang in heard.items()}
    least = [rank for rank in sorted(far) if far[rank] == min(far.values())]
    return [] if len(least) == ranks else least


def explain(records: list[dict[str, Any]], ranks: int, ranks_per_node: int, hosts: tuple[str, ...]) -> list[str]:
    """Lines that name the ranks a hang began with and their nodes.

    Args:
        hosts: names of the nodes in order, where known.
    """
    found = suspects(records, ranks)
    by_node: dict[str, list[str]] = {}
    for rank in found:
        index = rank // ranks_per_node
        by_node.setdefault(hosts[index] if index < len(hosts) else f"node {index}", []).append(str(rank))
    named = "; ".join(f"rank {', '.join(ranks)} on {host}" for host, ranks in by_node.items())
    if not found:
        lines = ["hang: all ranks stand at the same place: look at the network, and at their threads"]
    elif set(found) & {record["rank"] for record in records}:
        lines = [f"hang: {named} came least far; the others waited"]
    else:
        lines = [f"hang: {named} said nothing while the others waited: frozen, or cut off"]
    told: dict[str, list[int]] = {}
    for record in records:
        told.setdefault(f"{record['error']}, at {record['hang']['frame']}", []).append(record["rank"])
    return lines + [f"  {error}: rank {', '.join(map(str, sorted(ranks)))}" for error, ranks in told.items()]


def position() -> tuple[str, bool]:
    """Innermost frame of the main thread, and whether it waits for other ranks."""
    frames = traceback.extract_stack(sys._current_frames()[threading.main_thread().ident])
    waits = any(part in frame.filename for frame in frames[-2:] for part in COLLECTIVES)
    return f"{frames[-1].filename}:{frames[-1].lineno} {frames[-1].name}", waits
