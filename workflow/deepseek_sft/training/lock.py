"""One owner per run folder: a lock file that names host, job and process, and is taken over from the dead."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import BadInputError

NAME = "lock.json"


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Hold the lock of ``folder`` while the block runs.

    Raises:
        BadInputError: a living process holds it, or it cannot be told whether its holder lives.
    """
    path, own = folder / NAME, _self()
    folder.mkdir(parents=True, exist_ok=True)
    while True:
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
            break
        except FileExistsError:
            _take_over(path)
    with os.fdopen(descriptor, "w") as stream:
        json.dump(own, stream)
    try:
        yield
    finally:
        if _read(path) == own:
            path.unlink(missing_ok=True)


def reason_to_respect(holder: dict[str, Any]) -> str | None:
    """Why the lock of ``holder`` must be respected; None where its process is known to be gone."""
    job, host, pid = holder.get("job_id"), holder.get("host"), holder.get("pid")
    own_job = os.environ.get("SLURM_JOB_ID")
    if job and job != own_job:
        return _reason_of_job(job)
    if host == socket.gethostname():
        return f"process {pid} runs on this host" if _started(pid) == holder.get("started") else None
    if job and job == own_job:
        # A job runs once at a time: another host's lock of this very job is from before a requeue.
        restarted = holder.get("restarts") != os.environ.get("SLURM_RESTART_COUNT", "0")
        return None if restarted else f"this job's process {pid} on {host} may still run"
    return f"whether process {pid} on {host} still runs cannot be told from here"


def _take_over(path: Path) -> None:
    holder = _read(path)
    if holder is None:
        time.sleep(0.2)  # being written, or just removed
        holder = _read(path)
        if holder is None and path.exists():
            path.unlink(missing_ok=True)
        if holder is None:
            return
    reason = reason_to_respect(holder)
    if reason:
        raise BadInputError(
            f"run folder {path.parent} is in use: {reason} (lock since {holder.get('time')})",
            f"wait for it or stop it; if it is certainly gone, remove {path}",
        )
    path.unlink(missing_ok=True)


def _reason_of_job(job: str) -> str | None:
    if shutil.which("squeue") is None:
        return f"whether Slurm job {job} still runs cannot be told: no squeue in PATH"
    command = ["squeue", "--noheader", "--jobs", job, "--format", "%T"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        return None if "Invalid job id" in result.stderr else f"squeue failed: {result.stderr.strip()}"
    state = result.stdout.strip()
    return f"Slurm job {job} is {state}" if state in ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED") else None


def _self() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "job_id": os.environ.get("SLURM_JOB_ID"),
        "restarts": os.environ.get("SLURM_RESTART_COUNT", "0"),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S"),
    }


def _started(pid: Any) -> str | None:
    """Start time of a living process in clock ticks since boot: process ids are used again, this pair is not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat.rsplit(")", 1)[1].split()
    return None if fields[0] in "ZX" else fields[19]


def _read(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None
