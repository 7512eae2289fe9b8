"""Whether the process that left a file still lives: by its Slurm job, or by its number on its own host."""

import os
import shutil
import socket
import time
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

from ..cli import say
from ..errors import CrashError
from . import queue

# Jobs that the batch script found ended, for programs in a container without squeue (train.sbatch.j2).
ENDED_JOBS = "DEEPSEEK_SFT_ENDED_JOBS"

# How often Slurm has started this job again, for stage.sh: Snakemake's jobstep plugin removes SLURM_RESTART_COUNT.
RESTARTS = "DEEPSEEK_SFT_RESTARTS"
UNCERTAIN = "cannot be told"


def own() -> dict[str, Any]:
    """What tells this process from every other one."""
    return {
        "host": socket.gethostname(),
        "job_id": os.environ.get("SLURM_JOB_ID"),
        "restarts": os.environ.get("SLURM_RESTART_COUNT", "0"),
        "pid": os.getpid(),
        "started": started(os.getpid()),
        "boot": _boot(),
        "pids": _numbering(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S"),
    }


def keep_restart_count(environment: MutableMapping[str, str] = os.environ) -> None:
    """Keep the restart count of a job for the commands that Snakemake starts in it.

    To be called in the Snakemake inside the job, which alone has the whole environment of the batch step.
    """
    if "SLURM_JOB_NODELIST" in environment:
        environment[RESTARTS] = environment.get("SLURM_RESTART_COUNT", "0")


def reason_to_respect(
    holder: dict[str, Any], patience: float | None = None, me: dict[str, Any] | None = None
) -> str | None:
    """Why what ``holder`` left must be respected; None where its process is known to be gone.

    Args:
        patience: seconds to ask squeue for.
        me: ``own`` of this process, where SLURM_* has been removed from the environment since.

    Raises:
        CrashError: only Slurm could tell, and it has not answered for ``patience`` seconds.
    """
    job, host, pid = holder.get("job_id"), holder.get("host"), holder.get("pid")
    me = me or own()
    own_job = me["job_id"]
    if job and job != own_job:
        return _reason_of_job(job, patience)
    # A job runs once at a time: what another host or another container left of this very job is from before a requeue.
    restarted = bool(job) and holder.get("restarts") != me["restarts"]
    if host == socket.gethostname():
        reason = _reason_of_process(holder)
        return None if restarted and reason and UNCERTAIN in reason else reason
    if job:
        return None if restarted else f"this job's process {pid} on {host} may still run"
    return f"whether process {pid} on {host} still runs {UNCERTAIN} from here"


def surely_lives(holder: dict[str, Any], patience: float | None = None, me: dict[str, Any] | None = None) -> bool:
    """Whether ``holder`` is known to live; False also where that cannot be told."""
    try:
        reason = reason_to_respect(holder, patience, me)
    except CrashError:
        return False
    return reason is not None and UNCERTAIN not in reason


def _reason_of_process(holder: dict[str, Any]) -> str | None:
    pid = holder.get("pid")
    if holder.get("boot") not in (None, _boot()):
        return None  # this host has been started anew
    if holder.get("pids") not in (None, _numbering()):
        return f"whether process {pid} of another container on this host still runs {UNCERTAIN} from here"
    return f"process {pid} runs on this host" if started(pid) == holder.get("started") else None


def _reason_of_job(job: str, patience: float) -> str | None:
    if shutil.which("squeue") is None:
        if job in os.environ.get(ENDED_JOBS, "").split():
            return None
        return f"whether Slurm job {job} still runs {UNCERTAIN}: no squeue in PATH"
    found = queue.state(job, patience, say)
    return f"Slurm job {job} is {found}" if found in queue.OCCUPYING else None


def started(pid: Any) -> str | None:
    """Start time of a living process in clock ticks since boot: process ids are used again, this pair is not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat.rsplit(")", 1)[1].split()
    return None if fields[0] in "ZX" else fields[19]


def _boot() -> str | None:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None


def _numbering() -> str | None:
    """The namespace in which process ids count: those of two containers say nothing about each other."""
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return None
