"""Slurm jobs of this user that belong to an experiment of this project, by their comment and folder."""

import dataclasses
from pathlib import Path

from ..errors import CrashError
from . import queue

FIELDS = ("id", "state", "name", "command", "folder", "comment")
APPEND = "--open-mode=append"  # a requeued job must not empty its own log
COMMAND = ["squeue", "--me", "--noheader", "--format=%i|%T|%j|%o|%Z|%k"]


@dataclasses.dataclass(frozen=True)
class Job:
    """One job as squeue shows it; ``comment`` is ``rule_<rule> <experiment> <fingerprint>``."""

    id: str
    state: str
    name: str
    command: str
    folder: str
    comment: str

    def belongs_to(self, project: str, experiment: str, rule: str) -> bool:
        words = self.comment.split()
        return words[:2] == [f"rule_{rule}", experiment] and _same(self.folder, project)

    @property
    def fingerprint(self) -> str:
        return [*self.comment.split(), "", "", ""][2]


def comment(rule: str, experiment: str, fingerprint: str) -> str:
    return f"rule_{rule} {experiment} {fingerprint}"


def listed(patience: float | None = None, **how) -> list[Job]:
    """This user's jobs that have not ended.

    Raises:
        CrashError: squeue does not answer for ``patience`` seconds.
        FileNotFoundError: there is no squeue.
    """
    answer = queue.patiently(lambda: queue.run(COMMAND), patience, **how)
    if answer.returncode:
        raise CrashError(f"squeue failed: {answer.stderr.strip()}", "run the same command again once Slurm answers")
    rows = [line.strip().split("|", len(FIELDS) - 1) for line in answer.stdout.splitlines()]
    found = [Job(*row) for row in rows if len(row) == len(FIELDS)]
    return [job for job in found if job.state in queue.LIVING]


def _same(one: str, other: str) -> bool:
    return Path(one).resolve() == Path(other).resolve()
