"""Asking Slurm with patience: a controller that is busy or restarted answers minutes later, and nothing is lost."""

import re
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

from ..errors import CrashError

# What Slurm's commands say while the controller is away or overloaded (src/common/slurm_errno.c and their own words).
TRANSIENT = re.compile(
    r"Unable to contact slurm controller|Socket timed out|Connection (refused|timed out|reset)|Zero Bytes were"
    r"|temporarily unable|job submit limit|Communication connection failure|Unexpected message received|standby mode"
    r"|Transport endpoint|[Tt]ry again later|Slurm is not responding|does not answer",
)
UNKNOWN_JOB = "Invalid job id"
LIVING = (
    "PENDING",
    "CONFIGURING",
    "RUNNING",
    "COMPLETING",
    "REQUEUED",
    "REQUEUE_FED",
    "REQUEUE_HOLD",
    "RESIZING",
    "SIGNALING",
    "STAGE_OUT",
    "SUSPENDED",
    "STOPPED",
)
OCCUPYING = ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT")  # its processes may be there
PATIENCE_S = 600.0
LONGEST_PAUSE_S = 30.0


def run(
    command: Sequence[str], timeout: float = 60, environment: Mapping[str, str] | None = None, **options
) -> subprocess.CompletedProcess[str]:
    """Run one of Slurm's commands; one that does not answer in time looks like any other that failed.

    Raises:
        FileNotFoundError: the command is not installed.
    """
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=timeout, check=False, env=environment, **options
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", f"{command[0]} does not answer")


def is_transient(answer: subprocess.CompletedProcess[str]) -> bool:
    """Whether a failed command may succeed some minutes later."""
    return answer.returncode != 0 and bool(TRANSIENT.search(answer.stderr))


def patiently(
    ask: Callable[[], subprocess.CompletedProcess[str]],
    patience: float | None = None,
    say: Callable[[str], None] | None = None,
    give_up: Callable[[], bool] = lambda: False,
) -> subprocess.CompletedProcess[str]:
    """Ask until the answer is no transient failure; returns the last answer.

    Args:
        patience: seconds to ask for, ``PATIENCE_S`` by default.
        say: told once when waiting begins.
        give_up: ends the waiting early.
    """
    patience = PATIENCE_S if patience is None else patience
    begin, pause = time.monotonic(), 1.0
    while True:
        answer = ask()
        if not is_transient(answer) or time.monotonic() - begin >= patience or give_up():
            return answer
        if say and pause == 1.0:
            say(f"Slurm does not answer ({answer.stderr.strip()}): asking again for up to {patience / 60:.0f} minutes")
        time.sleep(min(pause, max(0.0, patience - (time.monotonic() - begin))))
        pause = min(2 * pause, LONGEST_PAUSE_S)


def state(job: str, patience: float | None = None, say: Callable[[str], None] | None = None) -> str:
    """State of a job as squeue names it; an empty text for one that Slurm has forgotten.

    Raises:
        CrashError: squeue has not answered for ``patience`` seconds, or fails in a way of its own.
        FileNotFoundError: there is no squeue.
    """
    command = ["squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T"]
    answer = patiently(lambda: run(command), patience, say)
    if answer.returncode == 0:
        return (answer.stdout.split() or [""])[0]
    if UNKNOWN_JOB in answer.stderr:
        return ""
    raise CrashError(
        f"whether Slurm job {job} still runs cannot be told: squeue failed: {answer.stderr.strip()}",
        "run the same command again once Slurm answers",
    )


def submitted_job(output: str) -> str | None:
    """The job id in what ``sbatch --parsable`` printed; a site's wrapper may print lines of its own around it."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    for pattern in (r"(\d+)(?:;\S+)?", r".*[Ss]ubmitted batch job (\d+).*"):
        found = [match[1] for line in lines if (match := re.fullmatch(pattern, line))]
        if found:
            return found[-1]
    return None


def cancel(jobs: Iterable[str], timeout: float = 60) -> subprocess.CompletedProcess[str]:
    """Cancel jobs; those that have ended are no error."""
    return run(["scancel", *jobs], timeout)
