"""Errors for the person who must act, and the exit code each one becomes.

Exit codes are a contract of every script (see docs/exit-codes.md):
0 done · 2 bad input · 3 a gate failed, do not retry · 4 stopped by signal and saved, retry resumes ·
5 crash or hang, retry resumes.
"""

import os
import socket
from pathlib import Path

NODE_LOCAL = ("/tmp", "/var/tmp", "/dev/shm", "/run")


def looked_for(path: str | Path) -> str:
    """Words for a fix: on which machine a path was looked for, and what that means where it exists on another one."""
    host = socket.gethostname()
    if "SLURM_JOB_ID" not in os.environ:
        return f"looked for on {host}"
    local = next((folder for folder in NODE_LOCAL if Path(path).is_relative_to(folder)), "")
    why = f"each machine has its own {local}: " if local else ""
    return (
        f"looked for on {host}, a node of this job; if it is there where you start snakemake, {why}it must lie on "
        "storage that every node sees"
    )


class StageError(Exception):
    """Base of every error that is shown as one message, without a traceback.

    Args:
        problem: what is wrong and where (file, line, key, node).
        fix: what the reader can do about it; empty if the problem says it already.
    """

    exit_code = 5

    def __init__(self, problem: str, fix: str = ""):
        super().__init__(problem)
        self.problem = problem
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.problem}\n  fix: {self.fix}" if self.fix else self.problem


class BadInputError(StageError):
    """The input or the settings are wrong: running again without a change cannot help."""

    exit_code = 2


class GateError(StageError):
    """A check that guards the next stage failed: a retry would only repeat it."""

    exit_code = 3


class StoppedError(StageError):
    """Stopped on request after saving: the same command continues from there."""

    exit_code = 4


class CrashError(StageError):
    """A process died or hung: the same command continues from the last committed state."""

    exit_code = 5
