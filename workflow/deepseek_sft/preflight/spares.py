"""Which nodes of an allocation with spare ones train. Pure functions over reports."""

from collections.abc import Collection
from typing import Any

from . import judge

STEP = 0.02  # of speed that makes one node better than another: less is noise


def choose(
    hosts: list[str], bad: Collection[str], avoided: Collection[str], reports: dict[int, dict[str, Any]], wanted: int
) -> list[str]:
    """The ``wanted`` best nodes that passed, in the order of ``hosts``; fewer where not so many did.

    Those that an earlier start of training has named slow come last; then the slowest devices. The first node, which
    runs the job's script and stays allocated in any case, is preferred among equals.

    Args:
        bad: nodes with a problem.
        avoided: nodes that training has named slow.
        reports: rank of the node in ``hosts`` → its report, with ``load``.
    """
    ranks = [rank for rank, host in enumerate(hosts) if host not in bad]
    speeds = {rank: min(reports[rank]["load"].get("gemm_tflops") or [0.0]) for rank in ranks}
    most = max(speeds.values(), default=0.0) or 1.0

    def order(rank: int) -> tuple[bool, int, int]:
        return hosts[rank] in avoided, -round(speeds[rank] / most / STEP), rank

    return [hosts[rank] for rank in sorted(sorted(ranks, key=order)[:wanted])]


def why_left_out(
    hosts: list[str], chosen: Collection[str], problems: list[judge.Problem], avoided: dict[str, Any]
) -> dict[str, str]:
    """Node that does not train → the reason, in words."""
    found = {}
    for host in hosts:
        if host in chosen:
            continue
        mine = [f"{problem.check}: {problem.text}" for problem in problems if problem.node == host]
        slow = [str(avoided[host].get("text", "slow in an earlier start"))] if host in avoided else []
        found[host] = "; ".join([*mine, *slow]) or "fit, and not needed"
    return found
