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
from typing import Any

import psutil

from ..cli import say

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
ENGINE_PROCESS = re.compile(r"VLLM::(Worker|EngineCore)|ray::RayWorker")  # titles that vLLM and Ray set
LIBC = ctypes.CDLL(None, use_errno=True)


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
        rest = [each for each in me.children(recursive=True) if _runs(each)]
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


def _runs(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:  # its parent, which still runs, has just reaped it
        return False


def engine_processes(descendants: list[psutil.Process]) -> dict[psutil.Process, str]:
    """Those of ``descendants`` that hold a part of the model or drive it, with the names they give themselves."""
    found = {}
    for process in descendants:
        with contextlib.suppress(psutil.Error):
            title = " ".join(process.cmdline())
            if ENGINE_PROCESS.match(title):
                found[process] = title.split(" ")[0]
    return found


def describe(children: list[Child]) -> list[dict[str, Any]]:
    """Name and id of the processes that run, and of the engine's own processes below them."""
    found = [{"name": child.name, "pid": child.pid} for child in children if child.exit_code() is None]
    engine = engine_processes(psutil.Process().children(recursive=True))
    return found + [{"name": name, "pid": process.pid} for process, name in engine.items()]


def _reap() -> None:
    """Collect adopted orphans that have ended."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
