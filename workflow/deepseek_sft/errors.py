"""Errors for the person who must act, and the exit code each one becomes.

Exit codes are a contract of every script (see docs/exit-codes.md):
0 done · 2 bad input · 3 a gate failed, do not retry · 4 stopped by signal and saved, retry resumes ·
5 crash or hang, retry resumes.
"""


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
