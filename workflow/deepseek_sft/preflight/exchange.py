"""How the nodes talk: a small service on the rendezvous port of every node, and files in the shared folder beside it.

The port is the one that training's rendezvous will use, so talking proves that it is free and reachable. Every report
and decision goes both ways, over the network and as a file, so that a node that lost one of the two is still heard.

A request is one line of JSON, so is the answer::

    {"ask": "hello"}                                 → {"host": …, "attempt": …, "time": seconds since the epoch}
    {"ask": "report", "phase": 1, "rank": 3, …}      → {"taken": true}                      (first node)
    {"ask": "decision", "phase": 1, "rank": 3}       → {"decision": {…} or null}            (first node)
    {"ask": "data", "bytes": n} and n bytes          → {"bytes": n, "crc32": …}
"""

import contextlib
import json
import socket
import socketserver
import struct
import threading
import time
import zlib
from pathlib import Path
from typing import Any

from .. import files, json_files
from ..slurm.nodes import address_of

LINE_LIMIT = 8 << 20  # bytes of one request: a report with the versions of all packages is some 10 kB
BLOCK = 1 << 20
CONNECT_S = 3.0


class Board:
    """What the first node has been told and has decided; used by many threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._reports: dict[tuple[int, int], dict[str, Any]] = {}
        self._decisions: dict[int, dict[str, Any]] = {}
        self._fetched: set[tuple[int, int]] = set()

    def put_report(self, phase: int, rank: int, report: dict[str, Any]) -> None:
        with self._lock:
            self._reports[phase, rank] = report

    def reports(self, phase: int) -> dict[int, dict[str, Any]]:
        with self._lock:
            return {rank: report for (of, rank), report in self._reports.items() if of == phase}

    def decide(self, phase: int, decision: dict[str, Any]) -> None:
        with self._lock:
            self._decisions[phase] = decision

    def fetch(self, phase: int, rank: int) -> dict[str, Any] | None:
        with self._lock:
            decision = self._decisions.get(phase)
            if decision is not None:
                self._fetched.add((phase, rank))
            return decision

    def fetched(self, phase: int) -> set[int]:
        """Ranks of the nodes that know the decision of a phase."""
        with self._lock:
            return {rank for of, rank in self._fetched if of == phase}


class _Handler(socketserver.StreamRequestHandler):
    timeout = 120

    def handle(self) -> None:
        # A reset instead of TIME_WAIT on our side: training listens on this port a moment later.
        self.request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        line = self.rfile.readline(LINE_LIMIT)
        with contextlib.suppress(ValueError, KeyError, TypeError, OSError):  # a stranger's request gets no answer
            answer = self._answer(json_files.parse(line))
            self.wfile.write(json.dumps(answer).encode() + b"\n")
            self.request.recv(1)  # the asker closes first

    def _answer(self, request: dict[str, Any]) -> dict[str, Any]:
        service: Service = self.server  # type: ignore[assignment]
        ask = request["ask"]
        if ask == "data":
            return self._swallow(int(request["bytes"]))
        if ask == "report" and request["attempt"] == service.attempt:
            service.board.put_report(request["phase"], request["rank"], request["report"])
            return {"taken": True}
        if ask == "decision" and request["attempt"] == service.attempt:
            return {"decision": service.board.fetch(request["phase"], request["rank"])}
        return {"host": service.host, "attempt": service.attempt, "time": time.time()}

    def _swallow(self, size: int) -> dict[str, Any]:
        crc, left = 0, size
        while left > 0 and (block := self.rfile.read(min(BLOCK, left))):
            crc, left = zlib.crc32(block, crc), left - len(block)
        return {"bytes": size - left, "crc32": crc}


class Service(socketserver.ThreadingTCPServer):
    """Answers on a port of all interfaces, over IPv4 and IPv6, until closed.

    Raises:
        OSError: the port is taken.
    """

    address_family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 512

    def __init__(self, port: int, host: str, attempt: str):
        self.host, self.attempt, self.board = host, attempt, Board()
        super().__init__(("", port), _Handler)
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True).start()

    def server_bind(self) -> None:
        if self.address_family == socket.AF_INET6:  # names of nodes may lead to either
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that breaks is the other side's finding."""


def ask(host: str, port: int, request: dict[str, Any], payload: bytes = b"", timeout: float = 30.0) -> dict[str, Any]:
    """Send a request and return the answer.

    Raises:
        OSError: no connection, or it broke; ``ConnectionError`` with a text where the answer is not one of ours.
    """
    with socket.create_connection((address_of(host), port), timeout=CONNECT_S) as link:
        link.settimeout(timeout)
        link.sendall(json.dumps(request).encode() + b"\n" + payload)
        with link.makefile("rb") as stream:
            line = stream.readline(LINE_LIMIT)
    try:
        answer = json_files.parse(line)
    except ValueError:
        raise ConnectionError("something else answers there") from None
    if not isinstance(answer, dict):
        raise ConnectionError("something else answers there")
    return answer


class Folder:
    """The files of one attempt in the shared results folder; failures to write are silent, the network is left."""

    def __init__(self, path: Path):
        self.path = path

    def write(self, name: str, value: dict[str, Any]) -> bool:
        try:
            files.write_json(self.path / f"{name}.json", value)
        except OSError:
            return False
        return True

    def read(self, name: str) -> dict[str, Any] | None:
        try:
            return json_files.load(self.path / f"{name}.json")
        except (OSError, ValueError):
            return None

    def exists(self, name: str) -> bool:
        return (self.path / f"{name}.json").exists()
