"""What the reports of all nodes say together: who is bad, and why. Pure functions over reports.

A report (JSON) of a node::

    {"host", "rank", "findings": [Finding…], "same": {check: {what: value}}, "reached": {host: null or error},
     "clock": [offset to the first node, uncertainty] or null, "shared": {"wrote", "reads"}, "load": {…}}
"""

import statistics
from collections import Counter
from dataclasses import dataclass
from typing import Any

from ..settings.preflight import CHECKS

SILENT = "report"
EXPLAINED = {  # check → what a difference means and what to do about it
    "code": "the workflow's code differs: a stale cache of the shared folder, or another checkout",
    "software": "build the environment on the shared folder, or again on that node, so that all have the same",
    "model": "the node sees other files: a stale cache or another mount",
}


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        node: host name; empty where no single node is to blame.
        check: a key of ``CHECKS``, or ``report``.
    """

    node: str
    check: str
    text: str

    def __str__(self) -> str:
        return f"{self.node or 'all nodes'}: {self.check}: {self.text}"


def problems(
    hosts: list[str], reports: dict[int, dict[str, Any]], skip: tuple[str, ...], clock_skew_s: float
) -> list[Problem]:
    """Everything that is wrong before the network is put under load.

    Args:
        hosts: all nodes of the job.
        reports: rank of the node → its report; silent ones are absent.
        skip: checks that are switched off.
    """
    heard = [reports[rank] for rank in sorted(reports)]
    silent = [host for rank, host in enumerate(hosts) if rank not in reports]
    found = [Problem(host, SILENT, "no word, neither over the network nor in the results folder") for host in silent]
    unwritten = {report["host"] for report in heard if not report["shared"].get("wrote", True)} | set(silent)
    for report in heard:
        for finding in report["findings"]:
            blames_other = finding["check"] == "shared_files" and report["shared"].get("reads") in unwritten
            innocent = blames_other and report["host"] not in unwritten
            if finding["passed"] is False and not innocent:
                found.append(Problem(report["host"], finding["check"], finding["detail"]))
    if "ports" not in skip:
        found += _unreachable(heard, set(silent))
    found += _different(heard)
    if "clock" not in skip:
        found += _clocks(heard, clock_skew_s)
    return _merged(found, hosts)


def _unreachable(heard: list[dict[str, Any]], silent: set[str]) -> list[Problem]:
    """Nodes that most of their callers cannot reach are to blame; of what is left, the callers."""
    failed = {
        (report["host"], to): error
        for report in heard
        for to, error in report["reached"].items()
        if error is not None and to not in silent
    }
    names = [report["host"] for report in heard]
    found: list[Problem] = []
    deaf: set[str] = set()
    for host in names:
        callers = [caller for caller, to in failed if to == host]
        asked = [report["host"] for report in heard if host in report["reached"]]
        if callers and len(callers) >= len(asked) / 2:
            deaf.add(host)
            error = Counter(failed[caller, host] for caller in callers).most_common(1)[0][0]
            text = f"its port cannot be reached from {_names(callers)}: {error}"
            found.append(Problem(host, "ports", text))
    left = {link: error for link, error in failed.items() if link[1] not in deaf}
    for host in names:
        targets = [to for caller, to in left if caller == host]
        if targets:
            text = f"cannot reach {_names(targets)}: {left[host, targets[0]]}"
            found.append(Problem(host, "ports", text))
    return found


def _different(heard: list[dict[str, Any]]) -> list[Problem]:
    """Values that differ from what most nodes have; where no value is in the majority, all that differ are named."""
    found = []
    for check in CHECKS:
        tables = {report["host"]: report["same"][check] for report in heard if check in report["same"]}
        texts: dict[str, list[str]] = {}
        for what in sorted({key for table in tables.values() for key in table}):
            values = {host: table.get(what, "absent") for host, table in tables.items()}
            counts = Counter(values.values()).most_common()
            if len(counts) < 2:
                continue
            usual = counts[0][0] if counts[0][1] * 2 > len(values) else None
            for host, value in values.items():
                if usual is None:
                    texts.setdefault(host, []).append(f"{what} {value}")
                elif value != usual:
                    texts.setdefault(host, []).append(f"{what} {value}, {usual} on the others")
        why = f" ({EXPLAINED[check]})" if check in EXPLAINED else ""
        for host, listed in texts.items():
            more = f" and {len(listed) - 5} more" if len(listed) > 5 else ""
            found.append(Problem(host, check, "; ".join(listed[:5]) + more + why))
    return found


def _clocks(heard: list[dict[str, Any]], limit: float) -> list[Problem]:
    offsets = {report["host"]: report["clock"] for report in heard if report["clock"] is not None}
    if len(offsets) < 2:
        return []
    # Each offset is of the first node's clock to the node's own.
    middle = statistics.median(offset for offset, _ in offsets.values())
    return [
        Problem(host, "clock", f"its clock is {middle - offset:+.3f} s off (± {uncertain:.3f}), allowed is {limit:g}")
        for host, (offset, uncertain) in offsets.items()
        if not abs(offset - middle) - uncertain <= limit
    ]


def under_load(
    hosts: list[str], reports: dict[int, dict[str, Any]], floor: float | None
) -> tuple[list[Problem], float | None]:
    """What the all-reduce showed, and its bandwidth in GB/s (the least of all nodes')."""
    silent = [host for rank, host in enumerate(hosts) if rank not in reports]
    found = [Problem(host, "all_reduce", "no word after the measurement began") for host in silent]
    heard = [reports[rank] for rank in sorted(reports)]
    broken = [(report, f) for report in heard for f in report["findings"] if f["passed"] is False]
    if broken:
        # Who fails first takes the others along, so only the earliest is to blame.
        earliest = min(broken, key=lambda entry: entry[0]["load"].get("failed_at", 0.0))
        report, finding = earliest
        others = f" ({len(broken) - 1} more nodes failed with it)" if len(broken) > 1 else ""
        found.append(Problem(report["host"], "all_reduce", finding["detail"] + others))
        return found, None
    speeds = {report["host"]: report["load"]["gb_per_second"] for report in heard if "gb_per_second" in report["load"]}
    if not speeds:
        return found, None
    least = min(speeds.values())
    if floor is None or all(speed >= floor for speed in speeds.values()):
        return found, least
    slow = _slow_by_pairs(hosts, heard, floor) or _slow_by_ring(heard, floor)
    found += [
        Problem(host, "all_reduce", f"{text}; wanted are {floor:g} GB/s (preflight.all_reduce_min_gb_per_second)")
        for host, text in slow.items()
    ]
    if not slow:
        text = f"{least:.2f} GB/s over all nodes, wanted are {floor:g} GB/s, but each pair of nodes is fast enough"
        found.append(Problem("", "all_reduce", text))
    return _merged(found, hosts), least


COMPARED = {  # check → figure of the load, unit, tolerance in multiples of the allowed percent
    "gemm": ("gemm_tflops", "TFLOP/s", 1.0),
    "memory_bandwidth": ("memory_gb_per_second", "GB/s of copies in host memory", 2.0),  # varies more between runs
    "nvlink": ("nvlink_gb_per_second", "GB/s inside the node", 1.0),
}


def slower(hosts: list[str], reports: dict[int, dict[str, Any]], percent: float | None) -> list[Problem]:
    """Devices and nodes that are slower than the median of all by more than ``percent``; None judges nothing."""
    found: list[Problem] = []
    if percent is None:
        return found
    for check, (key, unit, tolerance) in COMPARED.items():
        figures: list[tuple[str, str, float]] = []
        for rank in sorted(reports):
            value = reports[rank]["load"].get(key)
            if isinstance(value, list):
                figures += [(hosts[rank], f"device {local}: ", one) for local, one in enumerate(value)]
            elif value is not None:
                figures.append((hosts[rank], "", value))
        if len(figures) < 2:
            continue
        middle = statistics.median_high(value for _, _, value in figures)  # of two, the faster
        for host, device, value in figures:
            if not value >= middle * (1 - tolerance * percent / 100):
                text = (
                    f"{device}{value:.3g} {unit}, {100 * (1 - value / middle):.0f} % below the median {middle:.3g} of "
                    f"{len(figures)} (allowed are {tolerance * percent:g} %, preflight.slow_percent)"
                )
                found.append(Problem(host, check, text))
    return found


def _slow_by_pairs(hosts: list[str], heard: list[dict[str, Any]], floor: float) -> dict[str, str]:
    """Nodes that are slow with every partner they were measured with."""
    slow = {}
    for report in heard:
        pairs = {hosts[int(peer)]: speed for peer, speed in report["load"].get("pairs", {}).items()}
        if pairs and not any(speed >= floor for speed in pairs.values()):
            slow[report["host"]] = ", ".join(f"{speed:.2f} GB/s with {peer}" for peer, speed in pairs.items())
    return slow


def _slow_by_ring(heard: list[dict[str, Any]], floor: float) -> dict[str, str]:
    """Nodes slow in both directions of a ring; of a single slow link both ends."""
    to = {report["host"]: report["load"] for report in heard if "to" in report["load"]}
    slow = {host: load for host, load in to.items() if not load["gb_per_second"] >= floor}
    if not slow:
        return {}
    receivers = {load["to"] for load in slow.values()}
    both = {host for host in slow if host in receivers}
    found = {}
    for host, load in slow.items():
        text = f"{load['gb_per_second']:.2f} GB/s from {host} to {load['to']}"
        for end in (both & {host, load["to"]}) or {host, load["to"]}:
            found.setdefault(end, text)
    return found


def _merged(found: list[Problem], hosts: list[str]) -> list[Problem]:
    """A check that fails on every node is no node's fault: one problem of all instead of one for each."""
    merged = []
    for check in dict.fromkeys(problem.check for problem in found):
        mine = [problem for problem in found if problem.check == check]
        nodes = {problem.node for problem in mine}
        if len(hosts) > 1 and nodes >= set(hosts):
            merged.append(Problem("", check, f"{mine[0].text} (as {mine[0].node} says)"))
        else:
            merged += mine
    return merged


def bad_nodes(found: list[Problem]) -> list[str]:
    """Hosts to leave out, in the order found."""
    return list(dict.fromkeys(problem.node for problem in found if problem.node))


def _names(hosts: list[str], most: int = 4) -> str:
    return ", ".join(hosts[:most]) + (f" and {len(hosts) - most} more" if len(hosts) > most else "")
