"""Preflight on one node: check this node, talk to the others, and (first node) judge.

Phase 1: every node checks itself, its ports and the shared folder, and reports. Phase 2, only where nothing is wrong:
all nodes put the network under load together. The first node decides after each phase; the others follow.
"""

import dataclasses
import socket
import time
from typing import Any

from .. import files
from ..cli import say
from ..errors import CrashError, GateError
from . import bandwidth, judge, node_report, table
from .exchange import Folder, Service, ask
from .findings import CHECKS
from .node_report import Place
from .settings import Needs, Settings

POLL_S = 0.5
FAREWELL_S = 10.0  # how long the first node waits for the others to learn the verdict


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What the first node knows in the end."""

    problems: list[judge.Problem]
    rows: list[dict[str, str]]
    gb_per_second: float | None
    seconds: float


def run(place: Place, settings: Settings, needs: Needs) -> Outcome | None:
    """All of preflight on this node; the first node returns what it found, the others None.

    Raises:
        CrashError: the first node gives no answer.
    """
    started = time.monotonic()
    folder = Folder(place.output / place.node.attempt)
    service, taken = _listen(place)
    try:
        folder.write(f"up-{place.node.node_rank}", {"host": place.host})
        report = node_report.make(place, settings, needs, folder, taken)
        if not place.first:
            _follow(place, settings, folder, report)
            return None
        return _lead(place, settings, folder, service, report, started)
    finally:
        (folder.path / f"probe-{place.node.node_rank}").unlink(missing_ok=True)
        if service is not None:
            service.shutdown()
            service.server_close()


def gate(place: Place, outcome: Outcome) -> None:
    """Raises GateError where something is wrong, with the line that leaves the bad nodes out."""
    if not outcome.problems:
        return
    listed = "\n".join(f"  - {problem}" for problem in outcome.problems)
    bad = judge.bad_nodes(outcome.problems)
    general = [problem for problem in outcome.problems if not problem.node]
    fixes = []
    if bad and len(bad) < len(place.hosts):
        names = ",".join(bad)
        fixes.append(
            f"leave out what is bad: in the profile, set-resources: train: exclude: {names} "
            f"(by hand: sbatch --exclude={names} …)"
        )
    if general or len(bad) == len(place.hosts):
        fixes.append("what is wrong on all nodes is a matter of the profile, the plan or the cluster, not of a node")
    fixes.append("a check is switched off by its name in preflight.skip")
    raise GateError(f"preflight: not fit for training\n{listed}", "; ".join(fixes))


def figures(outcome: Outcome, settings: Settings, nodes: int) -> dict[str, Any]:
    """What the receipt says."""
    applied = [check for check in CHECKS if any(row[table.column(check)] not in ("-", "off") for row in outcome.rows)]
    return {
        "nodes": nodes,
        "checks": {check: {"passed": True, "detail": CHECKS[check]} for check in applied},
        "skipped": {
            check: "switched off" if not settings.wants(check) else "does not apply here"
            for check in CHECKS
            if check not in applied
        },
        "all_reduce_gb_per_second": None if outcome.gb_per_second is None else round(outcome.gb_per_second, 3),
        "preflight_s": round(outcome.seconds, 1),
        "table": {row["node"]: {name: cell for name, cell in row.items() if name != "node"} for row in outcome.rows},
    }


def _listen(place: Place) -> tuple[Service | None, str | None]:
    """The service on the rendezvous port, or why it could not be opened."""
    try:
        return Service(place.node.main_port, place.host, place.node.attempt), None
    except OSError as error:
        return None, f"port {place.node.main_port} cannot be opened: {error.strerror}"


def _load(place: Place, settings: Settings, port: int) -> dict[str, Any]:
    """Phase 2 on this node."""
    node, backend = place.node, settings.backend(place.accelerator, place.node.nodes)
    megabytes = settings.all_reduce_mb or bandwidth.DEFAULT_MB[backend]
    say(f"{place.host}: all_reduce with {backend}, {megabytes:g} MB")
    if backend == "sockets":
        finding, facts = bandwidth.over_sockets(place.hosts, node.node_rank, node.main_port, megabytes)
    else:
        floor = settings.all_reduce_min_gb_per_second
        finding, facts = bandwidth.over_torch(node, backend, port, megabytes, floor)
    return {"host": place.host, "rank": node.node_rank, "findings": [finding.as_json()], "load": facts}


# ---------------------------------------------------------------------------------------------------- other nodes


def _follow(place: Place, settings: Settings, folder: Folder, report: dict[str, Any]) -> None:
    _send(place, folder, 1, report)
    decision = _await_decision(place, settings, folder, 1)
    if "load" not in decision:
        return
    _send(place, folder, 2, _load(place, settings, decision["load"]))
    _await_decision(place, settings, folder, 2)


def _send(place: Place, folder: Folder, phase: int, report: dict[str, Any]) -> None:
    """Both ways; what gets through on neither is a silent node to the first one, which then names it."""
    folder.write(f"report-{phase}-{place.node.node_rank}", report)
    request = {"ask": "report", "phase": phase, "rank": place.node.node_rank, "attempt": place.node.attempt}
    for _ in range(3):
        try:
            ask(place.hosts[0], place.node.main_port, request | {"report": report})
            return
        except OSError:
            time.sleep(POLL_S)


def _await_decision(place: Place, settings: Settings, folder: Folder, phase: int) -> dict[str, Any]:
    request = {"ask": "decision", "phase": phase, "rank": place.node.node_rank, "attempt": place.node.attempt}
    deadline = time.monotonic() + settings.timeout_s + bandwidth.LIMIT_S
    while time.monotonic() < deadline:
        decision = folder.read(f"decision-{phase}")
        if decision is None:
            try:
                decision = ask(place.hosts[0], place.node.main_port, request).get("decision")
            except OSError:
                decision = None
        else:
            # Known from the file; the first node is told, so that it need not wait for us.
            try:
                ask(place.hosts[0], place.node.main_port, request)
            except OSError:
                say(f"{place.host}: the first node is not reached over the network, only through the results folder")
        if decision is not None:
            return decision
        time.sleep(POLL_S)
    raise CrashError(f"{place.host}: the first node {place.hosts[0]} has not decided; see its log")


# ----------------------------------------------------------------------------------------------------- first node


def _lead(
    place: Place, settings: Settings, folder: Folder, service: Service | None, report: dict[str, Any], started: float
) -> Outcome:
    nodes = len(place.hosts)
    reports = _collect(place, settings, folder, service, 1, report, started + settings.timeout_s)
    found = judge.problems(place.hosts, reports, settings.skip, settings.clock_skew_s)
    backend = settings.backend(place.accelerator, nodes)
    alone = place.node.world_size == 1 or (nodes == 1 and backend != "nccl")
    speed = None
    if found or alone or not settings.wants("all_reduce"):
        _decide(place, folder, service, 1, {})
        last = 1
    else:
        port = _free_port()
        _decide(place, folder, service, 1, {"load": port})
        load = _load(place, settings, port)
        deadline = time.monotonic() + bandwidth.LIMIT_S
        loads = _collect(place, settings, folder, service, 2, load, deadline)
        found, speed = judge.under_load(place.hosts, loads, settings.all_reduce_min_gb_per_second)
        for rank, extra in loads.items():
            reports[rank]["findings"] += extra["findings"]
        _decide(place, folder, service, 2, {})
        last = 2
    outcome = Outcome(found, table.rows(place.hosts, reports, found, settings.skip), speed, time.monotonic() - started)
    _publish(place, outcome, reports)
    _farewell(service, set(reports) - {0}, last)
    return outcome


def _collect(
    place: Place,
    settings: Settings,
    folder: Folder,
    service: Service | None,
    phase: int,
    own: dict[str, Any],
    deadline: float,
) -> dict[int, dict[str, Any]]:
    """Reports of all nodes, by rank; those that stay silent until the deadline are absent."""
    reports = {0: own}
    told = time.monotonic()
    while True:
        if service is not None:
            reports |= service.board.reports(phase)
        for rank in range(len(place.hosts)):
            if rank not in reports and (found := folder.read(f"report-{phase}-{rank}")):
                reports[rank] = found
        missing = [host for rank, host in enumerate(place.hosts) if rank not in reports]
        if not missing or time.monotonic() > deadline:
            return reports
        if time.monotonic() - told > 10:
            told = time.monotonic()
            left = f"{deadline - told:.0f} s"
            say(f"waiting for {len(missing)} of {len(place.hosts)} nodes, {left} at most: {', '.join(missing[:8])}")
        time.sleep(POLL_S / 2)


def _decide(place: Place, folder: Folder, service: Service | None, phase: int, decision: dict[str, Any]) -> None:
    if service is not None:
        service.board.decide(phase, decision)
    folder.write(f"decision-{phase}", decision)


def _free_port() -> int:
    """A port that the kernel hands out, as the ports are that NCCL and gloo use among each other."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        return listener.getsockname()[1]


def _publish(place: Place, outcome: Outcome, reports: dict[int, dict[str, Any]]) -> None:
    """Table and reports for reading; a results folder that cannot be written is a problem that is told already."""
    text = table.text(outcome.rows)
    say(text)
    say(f"{len(place.hosts)} nodes checked in {outcome.seconds:.0f} s, {len(outcome.problems)} problems")
    listed = "".join(f"{problem}\n" for problem in outcome.problems)
    try:
        files.write_text(place.output / "table.txt", f"{text}\n{listed}")
        files.write_json(place.output / "nodes.json", [reports[rank] for rank in sorted(reports)])
    except OSError as error:
        say(f"warning: {place.output} cannot be written: {error.strerror}")


def _farewell(service: Service | None, others: set[int], phase: int) -> None:
    """Stay until those that were heard know the verdict: the port must answer so long."""
    deadline = time.monotonic() + FAREWELL_S
    while service is not None and time.monotonic() < deadline and not others <= service.board.fetched(phase):
        time.sleep(POLL_S / 5)
