"""The target ``stop``: training saves, ends with exit code 4 and is not started again."""

import time
from collections.abc import Callable
from pathlib import Path

from ..cli import say
from ..engines import MARKER
from ..errors import CrashError
from . import jobs, queue
from .record import marker_of

POLL_S = 2.0
PROGRESS_EVERY_S = 60.0


def stop(
    results: Path, logs: Path, project: Path, wait: bool = True, pause: Callable[[float], None] = time.sleep
) -> str:
    """Ask for the end, cancel what has not begun, wait for what runs; returns what to tell the person.

    Raises:
        CrashError: Slurm does not answer for minutes; the stop file is there by then.
    """
    stop_file = results / "train" / "stop"
    stop_file.parent.mkdir(parents=True, exist_ok=True)
    stop_file.touch()
    go_on = f"to train on later: rm {stop_file}, then the same command as before"
    try:
        found = _training(results, logs, project)
    except FileNotFoundError:
        return f"asked through {stop_file}; without squeue nothing is known of jobs here\n{go_on}"
    if waiting := [job.id for job in found if job.state not in queue.OCCUPYING]:
        marker = marker_of(logs, "train")
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.write_text("training was told to stop\n")
        answer = queue.patiently(lambda: queue.cancel(waiting), say=say)
        if answer.returncode:
            raise CrashError(f"scancel failed: {answer.stderr.strip()}", f"scancel {' '.join(waiting)}")
        say(f"cancelled Slurm job {', '.join(waiting)}, which had not begun")
    running = [job.id for job in found if job.id not in waiting]
    if not running:
        return f"nothing of training runs\n{go_on}"
    say(f"Slurm job {', '.join(running)} saves after its current step and ends; Ctrl-C ends only the waiting here")
    begin = said = time.monotonic()
    while wait and {job.id for job in _training(results, logs, project)} & set(running):
        if time.monotonic() - said >= PROGRESS_EVERY_S:
            said = time.monotonic()
            say(f"{said - begin:.0f} s: still saving")
        pause(POLL_S)
    newest = max(results.glob(f"train/runs/*/step_*/{MARKER}"), key=lambda path: path.stat().st_mtime, default=None)
    saved = f"the newest checkpoint is {newest.parent}" if newest else "there is no checkpoint"
    return f"training has ended; {saved}\n{go_on}"


def _training(results: Path, logs: Path, project: Path) -> list[jobs.Job]:
    """Living jobs of this training: Snakemake's, and those of its script submitted by hand."""
    script = (results / "train" / "train.sbatch").resolve()
    return [
        job
        for job in jobs.listed(say=say)
        if job.belongs_to(str(project), logs.name, "train") or _is(job.command, job.folder, script)
    ]


def _is(command: str, folder: str, script: Path) -> bool:
    return bool(command) and (Path(folder) / command.split()[0]).resolve() == script
