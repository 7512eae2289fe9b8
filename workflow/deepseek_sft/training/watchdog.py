"""A rank that makes no progress says where each of its threads stands, and ends.

Ranks wait for each other in collectives, so one that hangs stops all, and without this the job would hold its nodes to
its time limit. Every rank watches itself. Needs no torch; where torch is loaded, the rank's last collectives are
written down, too.
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
from collections import deque
from pathlib import Path
from typing import Any

from .. import files, time_limits

# Between a rank's last word and its end: all ranks hang within moments of each other, and torchrun kills the others
# of a node as soon as one ends. The one that the others wait for shows only beside theirs.
GRACE = 10.0
DUMP_S = 5.0  # for the flight recorder, whose lock a hanging thread may hold
BACKSTOP = 60.0  # after that the kernel ends a process in which no Python thread can run
COLLECTIVES = ("/torch/distributed/", "/deepspeed/comm/", "/deepspeed/runtime/zero/")  # where ranks wait for others
RECENT = 50  # measured times of a phase that its limit follows
NO_RECORDER = "this torch has no flight recorder"
PLACES = ("start", "data", "forward", "backward", "commit", "update", "validation", "save")  # in the order of a step


class Watchdog:
    """Ends this process when ``enter`` is not called again within the phase's limit.

    Args:
        folder: where the rank's last word goes (``failure-rank<R>.json``).
        limits: seconds for each phase (``start``, ``step``, ``save``).
        derived: phases whose limit follows from measured times once there are some (``took``).
        trace: file for what NCCL's flight recorder holds; None writes none.
    """

    def __init__(
        self,
        rank: int,
        folder: Path,
        limits: dict[str, float],
        derived: tuple[str, ...] = (),
        trace: Path | None = None,
    ):
        self.rank, self.folder, self.limits = rank, folder, dict(limits)
        self._most = max(limits.values())  # collectives wait longer than this, and were told so when they were set up
        self._measured = {phase: deque(maxlen=RECENT) for phase in derived if phase != "start"}
        self._seen = dict.fromkeys(self._measured, 0)
        self.trace = trace
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

    def took(self, phase: str, seconds: float) -> None:
        """A phase came to its end after ``seconds``; where its limit is derived, the next ones are judged by it."""
        if phase not in self._measured:
            return
        with self._changed:
            self._since = time.monotonic()  # a shorter limit must not end what has just come to its end
        self._measured[phase].append(seconds)
        self._seen[phase] += 1
        enough = {"step": time_limits.MEASURED_STEPS, "save": time_limits.MEASURED_SAVES}[phase]
        if self._seen[phase] >= enough:
            # What is left of a save after its files, such as the last rows' losses, may take as long as a step.
            least = self.limits["step"] if phase == "save" else 0.0
            self.limits[phase] = time_limits.after_measuring(self._measured[phase], self._most, least)

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
        ended = time.monotonic() + min(GRACE, limit)
        if self.trace is not None and (told := dump_flight_recorder(self.trace)):
            print(f"hang: rank {self.rank}: {told}", file=sys.__stderr__, flush=True)
        time.sleep(max(0.0, ended - time.monotonic()))
        os._exit(1)


def dump_flight_recorder(path: Path, limit: float = DUMP_S) -> str:
    """Write what NCCL's flight recorder holds of this process (a pickle, for torch's ``fr_trace``) to ``path``.

    Returns:
        What came of it, in a few words; empty where torch is not loaded.
    """
    torch_collectives = sys.modules.get("torch._C._distributed_c10d")
    if torch_collectives is None:
        return ""
    # Two recorders, not two names of one (torch's ProcessGroupNCCL.hpp, FlightRecorder.hpp): NCCL writes to its own,
    # which a torch without CUDA does not have; the other one, gloo's, is empty on GPUs.
    names = ("_dump_nccl_trace", "_dump_fr_trace")
    dump = next((found for name in names if (found := getattr(torch_collectives, name, None))), None)
    if dump is None:
        return NO_RECORDER
    told = [f"the flight recorder did not answer within {limit:g} s"]

    def write() -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(dump())
            told[0] = f"the last collectives are in {path}"
        except Exception as error:  # a thread of its own; the rank ends all the same
            told[0] = f"the flight recorder could not be written: {error}"

    thread = threading.Thread(target=write, name="flight recorder", daemon=True)
    thread.start()
    thread.join(limit)
    return told[0]


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
