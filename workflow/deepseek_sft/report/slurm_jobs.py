"""This user's Slurm jobs as squeue shows them, asked once for a screen, and seldom for a page that stays open."""

import dataclasses
import re
import subprocess
import time
from collections.abc import Callable
from typing import Any

JOB_FIELDS = ("id", "state", "comment", "nodes", "partition", "elapsed", "left", "reason", "folder")
SQUEUE = ["squeue", "--me", "--noheader", "--format=%i|%T|%k|%N|%P|%M|%L|%r|%Z"]
ALIVE = ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "CONFIGURING")
SELDOM_S, RARELY_S = 30.0, 300.0  # between two questions of a page; where squeue is slow or does not answer
SLOW_S = 3.0


@dataclasses.dataclass(frozen=True)
class Job:
    """One Slurm job as squeue shows it; ``comment`` of Snakemake's is ``rule_<rule> <experiment> <fingerprint>``."""

    id: str
    state: str
    comment: str
    nodes: str
    partition: str
    elapsed: str
    left: str
    reason: str
    folder: str


def jobs() -> list[Job] | None:
    """This user's jobs; None where squeue is absent or does not answer."""
    try:
        answer = subprocess.run(SQUEUE, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if answer.returncode:
        return None
    rows = [line.strip().split("|", len(JOB_FIELDS) - 1) for line in answer.stdout.splitlines()]
    return [Job(*row) for row in rows if len(row) == len(JOB_FIELDS)]


def job_seconds(text: str) -> float | None:
    """Seconds of a time as squeue writes it, ``[days-][hours:]minutes:seconds``; None for UNLIMITED and the like."""
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text)
    if not match:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return ((24.0 * days + hours) * 60 + minutes) * 60 + seconds


@dataclasses.dataclass
class Seldom:
    """An answer that is asked for at most every ``SELDOM_S`` seconds, and less often the longer it takes.

    Attributes:
        ask: what asks; None is no answer.
        clock: seconds that only grow.
    """

    ask: Callable[..., Any]
    clock: Callable[[], float] = time.monotonic
    answer: Any = None
    wait: float = 0.0
    asked: float | None = None

    def __call__(self, *arguments: Any) -> Any:
        begun = self.clock()
        if self.asked is None or begun - self.asked >= self.wait:
            self.answer = self.ask(*arguments)
            self.asked = self.clock()
            bad = self.answer is None or self.asked - begun > SLOW_S
            self.wait = min(RARELY_S, 2 * max(self.wait, SELDOM_S)) if bad else SELDOM_S
        return self.answer

    def age(self) -> float:
        """Seconds since it was asked for."""
        return self.clock() - self.asked if self.asked is not None else 0.0
