"""How the nodes of one deployment find the head and tell each other that it ends.

The head listens on a port and writes ``rendezvous.json`` into the shared run folder::

    {"attempt": "7.0.0", "address": "10.0.0.1", "port": 41234, "token": …}

Every other node connects, says hello and keeps the connection. Messages are JSON lines. A closed connection means that
the program at its other end is gone, which needs neither clocks nor polling of a shared file system; a node that lost
its power is noticed by TCP keep-alive. The token (the file is readable by its owner only) keeps strangers out.
"""

import contextlib
import hmac
import json
import os
import secrets
import select
import socket
import time
from pathlib import Path
from typing import Any

from .. import files, json_files

RENDEZVOUS = "rendezvous.json"
LONGEST_MESSAGE = 1 << 20  # bytes
KEEP_ALIVE = {"TCP_KEEPIDLE": 8, "TCP_KEEPINTVL": 4, "TCP_KEEPCNT": 3}  # seconds, seconds, probes: dead after 20 s

Message = dict[str, Any]


def attempt() -> str:
    """Names this start of the job, so that a run folder left by an earlier one is not mistaken for it."""
    return ".".join(os.environ.get(name, "0") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT"))


class Connection:
    """One end of a connection that carries JSON lines."""

    def __init__(self, link: socket.socket):
        self.link = link
        self.node = ""  # name of the other end, once it said hello
        self.closed = False
        self._buffer = b""
        link.settimeout(5)
        link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in KEEP_ALIVE.items():
            link.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)

    def send(self, message: Message) -> None:
        """Send a message; a broken connection is noticed by the next ``receive``, not here."""
        with contextlib.suppress(OSError):
            self.link.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[Message]:
        """Messages that have arrived; sets ``closed`` when the other end is gone or talks nonsense."""
        try:
            while not self.closed and select.select([self.link], [], [], 0)[0]:
                block = self.link.recv(1 << 16)
                self._buffer += block
                self.closed = not block or len(self._buffer) > LONGEST_MESSAGE
        except OSError:
            self.closed = True
        *lines, self._buffer = self._buffer.split(b"\n")
        try:
            messages = [json_files.parse(line) for line in lines]
        except ValueError:
            messages = [None]
        if not all(isinstance(message, dict) and "event" in message for message in messages):
            self.closed = True
            return []
        return messages

    def close(self) -> None:
        self.link.close()


class HeadChannel:
    """The head's end: one connection per other node."""

    def __init__(self, address: str, run_dir: Path):
        self.peers: dict[str, Connection] = {}
        self.hellos: dict[str, Message] = {}
        self.gone: list[str] = []  # nodes whose connection ended, in order
        self._done: set[str] = set()  # nodes that have stopped everything
        self._strangers: list[Connection] = []
        self._token = secrets.token_hex(16)
        self._listener = socket.create_server((address, 0), backlog=128)
        value = {
            "attempt": attempt(),
            "address": address,
            "port": self._listener.getsockname()[1],
            "token": self._token,
        }
        self._file = run_dir / RENDEZVOUS
        with files.atomic_open(self._file, opener=lambda path, flags: os.open(path, flags, 0o600)) as stream:
            json.dump(value, stream)

    def poll(self) -> list[Message]:
        """Accept nodes and return their messages."""
        while select.select([self._listener], [], [], 0)[0]:
            self._strangers.append(Connection(self._listener.accept()[0]))
        messages = []
        for stranger in list(self._strangers):
            first, *rest = stranger.receive() or [None]
            if first:
                if hmac.compare_digest(str(first.get("token")), self._token):
                    stranger.node = first["node"]
                    self.peers[stranger.node] = stranger
                    self.hellos[stranger.node] = first
                    messages += rest
                else:
                    stranger.closed = True
            if stranger.closed or stranger.node:
                self._strangers.remove(stranger)
                if not stranger.node:
                    stranger.close()
        for node, peer in list(self.peers.items()):
            for message in peer.receive():
                if message["event"] == "done":
                    self._done.add(node)
                else:
                    messages.append(message)
            if peer.closed:
                del self.peers[node]
                self.gone.append(node)
        return messages

    def broadcast(self, message: Message) -> None:
        """Send to every node that is still there."""
        for peer in self.peers.values():
            peer.send(message)

    def part(self, seconds: float) -> None:
        """Wait until the other nodes have stopped what they run; then let them go."""
        deadline = time.monotonic() + seconds
        while set(self.peers) - self._done and time.monotonic() < deadline:
            self.poll()
            time.sleep(0.05)
        self.close()

    def close(self) -> None:
        for connection in [*self.peers.values(), *self._strangers]:
            connection.close()
        self._listener.close()
        self._file.unlink(missing_ok=True)


class WorkerChannel:
    """Another node's end."""

    def __init__(self, connection: Connection):
        self._connection = connection

    @property
    def closed(self) -> bool:
        """Whether the head's program is gone."""
        return self._connection.closed

    def poll(self) -> list[Message]:
        """Messages of the head."""
        return self._connection.receive()

    def send(self, message: Message) -> None:
        self._connection.send(message)

    def part(self, seconds: float) -> None:
        """Say that everything here has stopped, and wait until the head, which waits for all, hangs up."""
        self.send({"event": "done"})
        deadline = time.monotonic() + seconds
        while not self.closed and time.monotonic() < deadline:
            self.poll()
            time.sleep(0.05)
        self.close()

    def close(self) -> None:
        self._connection.close()


def read_rendezvous(run_dir: Path) -> Message | None:
    """What the head of this attempt published, or None yet."""
    try:
        # Listing the folder makes network file systems look again; a remembered "no such file" can last a minute.
        if run_dir / RENDEZVOUS not in set(run_dir.iterdir()):
            return None
        value = json_files.load(run_dir / RENDEZVOUS)
    except (OSError, ValueError):
        return None
    return value if value.get("attempt") == attempt() else None


def join_head(found: Message, hello: Message) -> WorkerChannel | None:
    """Connect to the head and introduce this node; None if nothing listens there (yet, or any more).

    Args:
        found: content of ``rendezvous.json``.
        hello: this node's name under ``node``.
    """
    try:
        link = socket.create_connection((found["address"], found["port"]), timeout=5)
    except OSError:
        return None
    connection = Connection(link)
    connection.send({"event": "hello", "token": found["token"]} | hello)
    return WorkerChannel(connection)
