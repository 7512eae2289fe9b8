"""Watching one node's processes and the other nodes, and ending all of it together."""

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from ..cli import say
from ..errors import BadInputError, CrashError, StoppedError
from . import lasting_endpoint, memory_kills, node_addresses, node_channel, processes, server_logs
from .failures import NodeFailure, StopRequest, lack_of_memory
from .shared_memory import Segments

PROGRESS_EVERY_S = 10
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
TICK_S = 0.25
OBSERVE_EVERY_S = 2.0  # all descendants; reading their maps takes some 10 ms
LOST_S = 5.0  # time for a program to end by itself, with its own words, after a process of its engine is gone
SETTLE_S = 2.0  # after a death, time for the other nodes to report theirs: the first to be noticed may be a consequence
PART_S = 10.0  # beyond the grace, until the other nodes have stopped everything
SHOWN_LINES = 25


class Watch:
    """What one node has started and whom it is connected to; ``wait`` raises whatever ends the deployment.

    Attributes:
        children: processes started here.
        finished: names of those that may end on their own.
        channel: connection to the other nodes, None with one node.
        log: output of this node's processes.
        log_start: byte offset in it at which this start begins.
        ready: on a worker, whether the head has said that the API answers.
    """

    def __init__(self, run_dir: Path):
        self.run_dir = run_dir
        self.rank = int(os.environ.get("SLURM_NODEID", "0"))
        self.nodes = int(os.environ.get("SLURM_NNODES", "1"))
        self.name = node_addresses.node_name()
        self.log = run_dir / f"{self.name}.log"
        self.log_start = self.log.stat().st_size if self.log.exists() else 0
        self.children: list[processes.Child] = []
        self.finished: set[str] = set()
        self.channel: node_channel.HeadChannel | node_channel.WorkerChannel | None = None
        self.start_message: node_channel.Message | None = None  # on a worker, once the head sent it
        self.ready = False
        self._signal: int | None = None
        self._segments = Segments()
        self._memory_kills = memory_kills.count()
        self._observed = 0.0
        self._engine: dict[psutil.Process, str] = {}
        self._lost: dict[psutil.Process, float] = {}

    def catch_signals(self) -> None:
        """Let TERM, INT and USR1 (Slurm's warning before the time limit) end the deployment in order."""
        for number in SIGNALS:
            signal.signal(number, self._on_signal)

    def start(
        self, name: str, command: list[str], environment: dict[str, str], *, ends: bool = False, to_log: bool = True
    ) -> processes.Child:
        """Start a process; unless it ``ends`` on its own, its end is the end of the deployment."""
        child = processes.start(name, command, environment, self.log if to_log else None)
        if ends:
            self.finished.add(name)
        self.children.append(child)
        return child

    def wait(
        self,
        done: Callable[[], bool],
        seconds: float | None,
        waiting_for: Callable[[], str] | None,
        fix: str = "",
        give_up: bool = True,
    ) -> None:
        """Watch everything until ``done``; with ``give_up``, raise CrashError when ``seconds`` have passed."""
        begin = said = time.monotonic()
        limit = "" if seconds is None else f" of {seconds:g}"
        while True:
            self._tick()
            if done():
                return
            now = time.monotonic()
            if seconds is not None and now - begin > seconds:
                if not give_up:
                    return
                what = waiting_for() if waiting_for else "waiting"
                lines = "".join(f"\n  {self.name}| {line}" for line in server_logs.last_lines(self.log, SHOWN_LINES))
                raise CrashError(f"{self.name}: gave up after {seconds:g} s {what}{lines}", fix)
            if waiting_for and now - said >= PROGRESS_EVERY_S:
                said = now
                say(f"{self.name}: {now - begin:.0f} s{limit}: {waiting_for()}")
            time.sleep(TICK_S)

    def _tick(self) -> None:
        """Look once at signals, own processes and the other nodes; raises what ends the deployment."""
        # Messages first: Slurm answers another node's failure by a signal, and then the failure is the news.
        for message in self.channel.poll() if self.channel else ():
            self._on_message(message)
        if self._signal is not None:
            raise StoppedError(f"{self.name}: stopped by {signal.Signals(self._signal).name}")
        if time.monotonic() - self._observed > OBSERVE_EVERY_S:
            self._observed = time.monotonic()
            self._observe()
        dead = [child for child in self.children if child.name not in self.finished and child.exit_code() is not None]
        if dead:
            raise NodeFailure([self.report(child) for child in dead])
        self._check_peers()
        if self.rank == 0 and (self.run_dir / "stop").exists():
            (self.run_dir / "stop").unlink(missing_ok=True)
            say(f"{self.name}: stopping, as {self.run_dir / 'stop'} asks")
            raise StopRequest

    def _observe(self) -> None:
        """Look at all descendants; raises NodeFailure when a process of the engine is gone and nothing follows.

        Under Ray, vLLM 0.32 goes on after the loss of a worker: /health stays 200 and requests wait for ever.
        """
        descendants = psutil.Process().children(recursive=True)
        self._segments.observe(descendants)
        living = processes.engine_processes(descendants)
        now = time.monotonic()
        for process in set(self._engine) - set(living):
            if now - self._lost.setdefault(process, now) > LOST_S:
                exits = f"(pid {process.pid}) has gone, and the engine did not end by itself"
                raise NodeFailure([self._report(self._engine[process], exits)])
        self._engine |= living

    def _on_message(self, message: node_channel.Message) -> None:
        if message["event"] == "start":
            self.start_message = message
        if message["event"] == "ready":
            self.ready = True
        if message["event"] == "failure":
            raise NodeFailure(message["reports"])
        if message["event"] == "error":
            kind = {2: BadInputError, 4: StoppedError}.get(message["exit_code"], CrashError)
            raise kind(message["problem"], message["fix"])
        if message["event"] == "stop":
            raise StopRequest

    def _check_peers(self) -> None:
        if isinstance(self.channel, node_channel.HeadChannel):
            gone = self.channel.gone
        else:
            gone = ["the head node"] if self.channel and self.channel.closed else []
        if gone:
            exits = "is gone: its connection ended without a word (node down, or the program was killed)"
            silent = {"process": "serve_node", "exit": exits, "log": "", "exceptions": [], "lines": []}
            raise NodeFailure([{"node": node} | silent for node in gone])

    def report(self, child: processes.Child) -> dict[str, Any]:
        """What other nodes and the reader need to know about a process that ended."""
        return self._report(child.name, processes.describe_exit(child.exit_code()))

    def _report(self, process: str, exits: str) -> dict[str, Any]:
        killed = memory_kills.count() - self._memory_kills
        exits += lack_of_memory(killed) if killed else ""
        return _report_of(self.name, self.log, self.log_start, process, exits)

    def _lost_by_ray(self) -> list[dict[str, Any]]:
        """On the head, reports on workers that Ray misses on other nodes, whose own programs see Ray go on."""
        dead = server_logs.dead_actors(self.log, self.log_start)
        starts = {node: hello.get("log_start", 0) for node, hello in self.channel.hellos.items()}
        places = lasting_endpoint.who_serves(self.run_dir) if dead else {}
        return [
            _report_of(
                node, self.run_dir / f"{node}.log", starts[node], "Ray's worker", f"(pid {dead[address]}) has gone"
            )
            for node, address in ((node, place["address"]) for node, place in places.items())
            if address in dead and node in starts
        ]

    def _on_signal(self, number: int, _frame: Any) -> None:
        self._signal = number

    def settle(self, reports: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """On the head, collect what other nodes report within moments, so that the cause is among what is shown."""
        found = {(report["node"], report["process"]): report for report in reports}
        deadline = time.monotonic() + SETTLE_S
        while isinstance(self.channel, node_channel.HeadChannel) and time.monotonic() < deadline:
            for message in self.channel.poll():
                for report in message.get("reports", []):
                    found[report["node"], report["process"]] = report
            for child in self.children if self._signal is None else ():  # a signal ends them too; that is no cause
                if child.name not in self.finished and child.exit_code() is not None:
                    found.setdefault((self.name, child.name), self.report(child))
            time.sleep(TICK_S)
        for report in self._lost_by_ray() if isinstance(self.channel, node_channel.HeadChannel) else ():
            if not any(node == report["node"] for node, _ in found):
                found[report["node"], report["process"]] = report
        if isinstance(self.channel, node_channel.HeadChannel) and not any(node == self.name for node, _ in found):
            # Under Ray the words of all workers are in the head's log.
            ours = self._report("the head's processes", "go on") | {"lines": []}
            if ours["exceptions"]:
                found[self.name, ""] = ours
        return list(found.values())

    def end(self, outcome: dict[str, Any], grace: float, folder: Path) -> None:
        """Tell the others first, so that all stop at the same time; then stop and remove what is here.

        Returns when all nodes have done so: once one task has ended with a failure, Slurm soon kills the others.
        """
        if isinstance(self.channel, node_channel.HeadChannel):
            self.channel.broadcast(outcome)
        elif self.channel and outcome["event"] != "stop":
            self.channel.send(outcome)
        self._segments.observe(psutil.Process().children(recursive=True))
        processes.stop(self.children, grace)
        removed = self._segments.remove()
        if removed:
            say(f"{self.name}: removed {len(removed)} segments that were left in /dev/shm")
        shutil.rmtree(folder, ignore_errors=True)
        # Nothing is left to stop: Slurm's TERM after the first node's exit must not make this one's exit code 143.
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        if self.channel:
            self.channel.part(grace + PART_S)


def _report_of(node: str, log: Path, since: int, process: str, exits: str) -> dict[str, Any]:
    return {
        "node": node,
        "process": process,
        "exit": exits,
        "log": str(log),
        "exceptions": server_logs.exceptions(log, since),
        "lines": server_logs.last_lines(log, SHOWN_LINES),
    }
