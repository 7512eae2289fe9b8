"""How a deployment ends before its time."""

import re
from typing import Any

from ..errors import BadInputError, CrashError

REFUSED = re.compile(r"^(vllm|ray)( \w+)?: error: ")  # argparse: trying again cannot help
CAUSE = re.compile(r"killed by|is gone")


class StopRequest(Exception):
    """The head ends the deployment in order."""


class NodeFailure(CrashError):
    """Processes that ended on their own, as the nodes reported them.

    Args:
        reports: ``{"node", "process", "exit", "log", "exceptions", "lines"}`` each.
    """

    def __init__(self, reports: list[dict[str, Any]]):
        # A killed process is a likelier cause than one that gave up with an exit code of its own.
        self.reports = sorted(reports, key=lambda report: not CAUSE.search(report["exit"]))
        parts = []
        for report in self.reports:
            lines = "".join(f"\n  {report['node']}| {line}" for line in report["lines"])
            where = f"; last lines of {report['log']}:{lines}" if report["lines"] else ""
            named = "".join(f"\n  {report['node']}! {line}" for line in report["exceptions"])
            parts.append(f"{report['node']}: {report['process']} {report['exit']}{where}{named}")
        refused = [line for report in reports for line in report["lines"] if REFUSED.search(line)]
        if refused:
            self.exit_code = BadInputError.exit_code
            parts.append(f"vLLM does not accept its command line: {refused[-1]}; see serve.engine_args")
        super().__init__("the deployment ended because of a failure\n" + "\n".join(parts))
