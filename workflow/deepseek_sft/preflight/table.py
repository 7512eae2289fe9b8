"""One line for each node: what every check found, for the log and ``preflight/table.txt``."""

from typing import Any

from ..settings.preflight import CHECKS
from .judge import SILENT, Problem

SHORT = {
    "host_memory": "memory",
    "shared_memory": "/dev/shm",
    "locked_memory": "memlock",
    "local_disk": "local disk",
    "own_disk": "own disk",
    "shared_files": "shared files",
    "memory_bandwidth": "memory GB/s",
    "nvlink": "in node",
    "all_reduce": "bandwidth",
}


def column(check: str) -> str:
    """Head of a check's column."""
    return SHORT.get(check, check)


def rows(
    hosts: list[str], reports: dict[int, dict[str, Any]], found: list[Problem], skip: tuple[str, ...]
) -> list[dict[str, str]]:
    """Cells by column for every node: the measured value, with ``BAD`` where that is the problem; ``-`` unchecked."""
    blamed = {(problem.node, problem.check) for problem in found}
    everywhere = {problem.check for problem in found if not problem.node}
    table = []
    for rank, host in enumerate(hosts):
        report = reports.get(rank)
        cells = {"node": host}
        findings = {finding["check"]: finding for finding in report["findings"]} if report else {}
        for check in CHECKS:
            finding = findings.get(check)
            if check in skip:
                cells[column(check)] = "off"
            elif (host, check) in blamed or check in everywhere:
                value = finding["value"] if finding else ""
                cells[column(check)] = f"BAD {value}".strip()
            elif report is None:
                cells[column(check)] = "silent" if (host, SILENT) in blamed else "-"
            elif finding is None or finding["passed"] is None:
                cells[column(check)] = "-"
            else:
                cells[column(check)] = finding["value"] or "ok"
        table.append(cells)
    return table


def text(table: list[dict[str, str]]) -> str:
    """The table in aligned columns; checks that applied to no node are left out."""
    columns = [name for name in table[0] if name == "node" or any(row[name] not in ("-", "silent") for row in table)]
    cells = [columns, *([row[name] for name in columns] for row in table)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells)
