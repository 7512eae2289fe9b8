"""How a deployment ends before its time."""

import re
from typing import Any

from ..errors import BadInputError, CrashError
from .causes import Cause, named_in

KILLED = re.compile(r"killed by|is gone")
LOST = re.compile(r"has gone")
NO_MEMORY = re.compile(r"for lack of memory")
_KILLED_OR_LOST = re.compile(f"{KILLED.pattern}|{LOST.pattern}")
KILLED_WORKER = re.compile(r"WorkerProc.* died unexpectedly|worker.*died unexpectedly", re.IGNORECASE)
MEMORY_HINT = (
    "if nobody ended it, the kernel or Slurm did for lack of memory: compare the job's memory with `mem_mb` of this "
    "rule in the profile, and look at /dev/shm (what lies there counts as memory)"
)


def lack_of_memory(killed: int) -> str:
    """What is added to how a process ended, where the kernel has killed some of its node."""
    return f"; the kernel killed {killed} process{'es' if killed > 1 else ''} here for lack of memory"


class StopRequest(Exception):
    """The head ends the deployment in order."""


class NodeFailure(CrashError):
    """Processes that ended on their own, as the nodes reported them.

    Args:
        reports: ``{"node", "process", "exit", "log", "exceptions", "lines"}`` each.
    """

    def __init__(self, reports: list[dict[str, Any]]):
        # A killed process is a likelier cause than one that gave up with an exit code of its own.
        self.reports = sorted(reports, key=lambda report: not _KILLED_OR_LOST.search(report["exit"]))
        parts = []
        for report in self.reports:
            lines = "".join(f"\n  {report['node']}| {line}" for line in report["lines"])
            where = f"; last lines of {report['log']}:{lines}" if report["lines"] else ""
            named = "".join(f"\n  {report['node']}! {line}" for line in report["exceptions"])
            parts.append(f"{report['node']}: {report['process']} {report['exit']}{where}{named}")
        problem, fix = "the deployment ended because of a failure", ""
        found = find_cause(self.reports)
        without_memory = next((report for report in self.reports if NO_MEMORY.search(report["exit"])), None)
        if without_memory:
            problem = f"the deployment ended: {without_memory['node']}: out of host memory"
            fix = "raise `mem_mb` of this rule in the profile; what lies in /dev/shm counts too"
            self.exit_code = BadInputError.exit_code
        elif found:
            node, cause, line = found
            problem, fix = f"the deployment ended: {node}: {cause.problem} ({line})", cause.fix
            if cause.permanent:
                self.exit_code = BadInputError.exit_code
        elif any(_killed(report) for report in self.reports):
            fix = MEMORY_HINT
        super().__init__("\n".join([problem, *parts]), fix)


def find_cause(reports: list[dict[str, Any]]) -> tuple[str, Cause, str] | None:
    """Node, cause, and the line that names it; None where no known cause is named.

    A killed process is a cause in itself: what the others say is how they noticed.
    """
    if any(KILLED.search(report["exit"]) for report in reports):
        return None
    return named_in((report["node"], line) for report in reports for line in [*report["exceptions"], *report["lines"]])


def _killed(report: dict[str, Any]) -> bool:
    if "SIGKILL" in report["exit"] or LOST.search(report["exit"]):
        return True
    return any(KILLED_WORKER.search(line) for line in report["exceptions"])
