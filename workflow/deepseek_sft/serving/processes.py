"""Child processes whose output goes to a log file and of which nothing is left behind."""

import contextlib
import ctypes
import dataclasses
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import psutil

from ..cli import say

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
LIBC = ctypes.CDLL(None, use_errno=True)
SHARED_MEMORY = Path("/dev/shm")
# What vLLM, torch, NCCL and Python's multiprocessing name there; other programs' segments are never touched.
OURS = re.compile(r"^(psm_|sem\.mp-|torch_|nccl-|vllm|VLLM|plasma|.*cpushm)")

# Behind the prefixes of vLLM's log: the line that ends a traceback, or tells which process died.
EXCEPTION = re.compile(
    r"^(?:\([^\n]*?\) )*(?:ERROR [^\n]*?\] )?"
    r"([A-Za-z_][\w.]*(?:Error|Exception)\b[^\n]*|[A-Z]\w+[^\n]* died unexpectedly[^\n]*)",
    re.MULTILINE,
)
ANSI_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
LONGEST_READ = 4 << 20  # bytes
SHOWN_EXCEPTIONS = 4

# Milestones of a start in vLLM's log, in no order: the one that comes last in the log is where it is.
PHASES = (
    (re.compile(r"Loading (?:safetensors|pt) checkpoint shards:\s*(\d+)% Completed"), "loading weights, {} %"),
    (re.compile(r"Starting to load model"), "loading weights"),
    (re.compile(r"Loading weights took"), "weights loaded, preparing the engine"),
    (re.compile(r"Dynamo bytecode transform|[Cc]ompiling a graph|torch\.compile takes"), "compiling"),
    (re.compile(r"Capturing CUDA graph[^:]*:\s*(\d+)%"), "capturing CUDA graphs, {} %"),
    (re.compile(r"Capturing CUDA graph|Graph capturing"), "capturing CUDA graphs"),
    (re.compile(r"init engine .*took"), "engine ready, starting the API"),
    (re.compile(r"Starting vLLM (?:API )?server"), "starting the API"),
    (re.compile(r"DP group leader"), "connecting the engine's processes"),
    (re.compile(r"Initializing a V1 LLM engine"), "starting the engine's processes"),
    (re.compile(r"[Pp]lacement group"), "waiting for Ray to place the engine's processes"),
)


def adopt_orphans() -> None:
    """Make this process the parent of descendants whose own parent dies, so that ``stop`` finds all of them."""
    LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _die_with_parent() -> None:
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


@dataclasses.dataclass
class Child:
    """A started process.

    Attributes:
        name: for messages.
        process: in a process group of its own.
        log: file its output is appended to, or None where it goes to this process's own output.
    """

    name: str
    process: subprocess.Popen
    log: Path | None

    @property
    def pid(self) -> int:
        return self.process.pid

    def exit_code(self) -> int | None:
        """Exit code, negative for a signal, None while it runs."""
        return self.process.poll()


def start(name: str, command: list[str], environment: dict[str, str], log: Path | None) -> Child:
    """Start ``command`` in a process group of its own; it gets TERM should this process be killed.

    Call from the main thread of a program without other threads (code runs between fork and exec).
    """
    with contextlib.ExitStack() as stack:
        output = stack.enter_context(open(log, "ab")) if log else None
        if output:
            output.write(f"\n== {name}: {' '.join(command)}\n".encode())
            output.flush()
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT if output else None,
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )
    return Child(name, process, log)


def describe_exit(code: int) -> str:
    """An exit code in words."""
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"


def stop(children: list[Child], grace_s: float) -> None:
    """End ``children`` and everything below them: TERM, after ``grace_s`` seconds KILL, until nothing is left."""
    me = psutil.Process()
    for child in reversed(children):
        if child.exit_code() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGTERM)
    deadline = time.monotonic() + grace_s
    while time.monotonic() < deadline and any(child.exit_code() is None for child in children):
        time.sleep(0.1)
    asked = False
    end = max(deadline, time.monotonic() + 2) + 10
    while time.monotonic() < end:
        for child in children:
            child.exit_code()  # reaps it
        rest = [each for each in me.children(recursive=True) if each.status() != psutil.STATUS_ZOMBIE]
        _reap()
        if not rest:
            return
        late = time.monotonic() > deadline or asked
        for each in rest:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill() if late else each.terminate()
        time.sleep(1 if not asked else 0.2)
        asked = True
    say(f"warning: processes that cannot be ended: {[each.pid for each in me.children(recursive=True)]}")


def _reap() -> None:
    """Collect adopted orphans that have ended."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def shared_memory_names() -> set[str]:
    """Segments of this user in /dev/shm that serving programs make."""
    names = set()
    with contextlib.suppress(OSError):
        for entry in os.scandir(SHARED_MEMORY):
            with contextlib.suppress(OSError):
                if OURS.match(entry.name) and entry.stat(follow_symlinks=False).st_uid == os.getuid():
                    names.add(entry.name)
    return names


def remove_shared_memory(before: set[str]) -> list[str]:
    """Remove segments made since ``before`` that no living process uses; returns their names."""
    new = shared_memory_names() - before
    if not new:
        return []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            used = (process / "maps").read_text(errors="replace")
            new = {name for name in new if f"{SHARED_MEMORY}/{name}" not in used}
            for link in (process / "fd").iterdir():
                new.discard(link.readlink().name)
    for name in new:
        (SHARED_MEMORY / name).unlink(missing_ok=True)
    return sorted(new)


def last_lines(log: Path, count: int) -> list[str]:
    """The last ``count`` lines of a log; progress bars (carriage returns) show their last state."""
    try:
        with open(log, "rb") as stream:
            stream.seek(max(0, log.stat().st_size - 400 * count))
            text = stream.read().decode(errors="replace")
    except OSError:
        return []
    lines = [line.rstrip("\r").rsplit("\r", 1)[-1] for line in text.split("\n")]
    return [line[:400] for line in lines if line.strip()][-count:]


def exceptions(log: Path, since: int = 0) -> list[str]:
    """The first few different exceptions that a log names: the last lines often only say "see root cause above".

    Args:
        since: byte offset from which the log belongs to this start.
    """
    try:
        with open(log, "rb") as stream:
            stream.seek(max(since, log.stat().st_size - LONGEST_READ))
            text = ANSI_COLOUR.sub("", stream.read().decode(errors="replace"))
    except OSError:
        return []
    found = dict.fromkeys(match.group(1)[:400] for match in EXCEPTION.finditer(text))
    return list(found)[:SHOWN_EXCEPTIONS]


class PhaseReader:
    """Reads how far a start is from a growing log."""

    def __init__(self, log: Path):
        self._log = log
        self._offset = log.stat().st_size if log.exists() else 0
        self.phase = "starting Python"

    def update(self) -> str:
        """Read what is new and return the current phase in words."""
        try:
            with open(self._log, "rb") as stream:
                stream.seek(self._offset)
                block = stream.read()
        except OSError:
            return self.phase
        self._offset += len(block)
        found = (-1, self.phase)
        text = block.decode(errors="replace")
        for pattern, words in PHASES:
            for match in pattern.finditer(text):
                found = max(found, (match.start(), words.format(*match.groups())))
        self.phase = found[1]
        return self.phase
