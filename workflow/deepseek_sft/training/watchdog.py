"""A rank that makes no progress says where each of its threads stands, and ends.

Ranks wait for each other in collectives, so one that hangs stops all, and without this the job would hold its nodes to
its time limit. Every rank watches itself. Needs no torch.
"""

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from pathlib import Path

from .. import files

# Between a rank's last word and its end: all ranks hang within moments of each other, and torchrun kills the others
# of a node as soon as one ends. The one that the others wait for shows only beside theirs.
GRACE = 10.0
BACKSTOP = 60.0  # after the limit: where a thread holds the interpreter's lock, only faulthandler's own thread runs
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
        faulthandler.dump_traceback_later(self.limits[phase] + GRACE + BACKSTOP, exit=True, file=sys.__stderr__)

    def close(self) -> None:
        """Watch no longer."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        faulthandler.cancel_dump_traceback_later()

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
        message = f"no progress for {limit:g} s in {where}"
        record = {
            "rank": self.rank,
            "host": socket.gethostname(),
            "time": time.time(),
            "error": f"hang: {message}",
            "hang": {"step": step, "place": place},
        }
        print(f"hang: rank {self.rank}: {message}; its threads:", file=sys.__stderr__, flush=True)
        faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)
        files.write_text(self.folder / f"failure-rank{self.rank}.json", json.dumps(record))
        time.sleep(GRACE)
        os._exit(1)


def explain(records: list[dict], ranks: int, ranks_per_node: int, hosts: tuple[str, ...]) -> list[str]:
    """Which ranks a hang began with: those without a word while the others waited, else those that came least far.

    Args:
        records: last words of ranks that hung.
        ranks: world size.
        hosts: names of the nodes in order, where known.
    """
    heard = {record["rank"]: record for record in records}
    silent = [rank for rank in range(ranks) if rank not in heard]

    def node_of(rank: int) -> str:
        index = rank // ranks_per_node
        return hosts[index] if index < len(hosts) else f"node {index}"

    def named(chosen: list[int]) -> str:
        by_node: dict[str, list[str]] = {}
        for rank in chosen:
            host = heard[rank]["host"] if rank in heard else node_of(rank)
            by_node.setdefault(host, []).append(str(rank))
        return "; ".join(f"rank {', '.join(ranks)} on {host}" for host, ranks in by_node.items())

    def far(rank: int) -> tuple[int, int]:
        hang = heard[rank]["hang"]
        return hang["step"], PLACES.index(hang["place"])

    if silent:
        return [f"hang: {named(silent)} said nothing while the others waited: frozen, or cut off", *_told(records)]
    behind = min(map(far, heard))
    last = [rank for rank in sorted(heard) if far(rank) == behind]
    if len(last) == ranks:
        return ["hang: all ranks stand at the same place: look at the network, and at their threads", *_told(records)]
    return [f"hang: {named(last)} came least far; the others waited", *_told(records)]


def _told(records: list[dict]) -> list[str]:
    counts: dict[str, list[int]] = {}
    for record in records:
        counts.setdefault(record["error"], []).append(record["rank"])
    return [f"  {error}: rank {', '.join(map(str, sorted(ranks)))}" for error, ranks in counts.items()]
