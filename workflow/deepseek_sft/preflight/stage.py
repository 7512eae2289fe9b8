"""Preflight on one node: check this node, talk to the others, and (first node) judge.

Phase 1: every node checks itself, its ports and the shared folder, and reports. Phase 2, only where nothing is wrong:
all nodes put devices and network under load together. The first node decides after each phase; the others follow. Where
the job has spare nodes, the bad ones stay out of phase 2, which is repeated without those that it shows.
"""

import dataclasses
import socket
import time
from typing import Any

from .. import files, time_limits
from ..cli import say
from ..errors import CrashError, GateError
from ..settings.preflight import CHECKS
from ..slurm.nodes import address_of
from . import bandwidth, judge, node_report, spares, table
from .exchange import Folder, Service, ask
from .node_report import Place
from .own_disk import OwnDisk
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
    chosen: list[str] = dataclasses.field(default_factory=list)  # nodes to train on, where there are spare ones
    left_out: dict[str, str] = dataclasses.field(default_factory=dict)  # the others, and why


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
        if settings.checkpoints:
            OwnDisk(settings.checkpoints, place.node.attempt, place.node.node_rank).forget()
        if service is not None:
            service.shutdown()
            service.server_close()


def gate(place: Place, outcome: Outcome) -> None:
    """Raises GateError where something is wrong, with the line that leaves the bad nodes out."""
    if not outcome.problems or outcome.chosen:
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
    if place.spare and bad:
        fixes.append(f"or more of train.spare_nodes: {len(bad)} nodes are bad, {place.spare} may be")
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
        **({"chosen": outcome.chosen, "left_out": outcome.left_out} if outcome.chosen else {}),
        "table": {row["node"]: {name: cell for name, cell in row.items() if name != "node"} for row in outcome.rows},
    }


def _listen(place: Place) -> tuple[Service | None, str | None]:
    """The service on the rendezvous port, or why it could not be opened."""
    try:
        return Service(place.node.main_port, place.host, place.node.attempt), None
    except OSError as error:
        return None, f"port {place.node.main_port} cannot be opened: {error.strerror}"


def _measures(place: Place, settings: Settings, nodes: int) -> tuple[str, ...]:
    """What so many nodes measure together; nothing where it would say nothing.

    A single CPU node is not worth the import of torch, and plain sockets do without it.
    """
    backend = settings.backend(place.accelerator, nodes)
    ranks = place.node.ranks_per_node
    sensible = {
        "gemm": backend == "nccl" or (backend == "gloo" and nodes > 1),
        "memory_bandwidth": backend == "nccl" or (backend == "gloo" and nodes > 1),
        "nvlink": ranks > 1 and (backend == "nccl" or (backend == "gloo" and nodes > 1)),
        "all_reduce": nodes > 1 or (backend == "nccl" and ranks > 1),
    }
    return tuple(name for name in bandwidth.MEASURES if sensible[name] and settings.wants(name))


def _patience(place: Place, settings: Settings, nodes: int) -> float:
    """Longest time in seconds that a phase under load takes."""
    if settings.backend(place.accelerator, nodes) == "sockets":
        return bandwidth.SOCKETS_S
    return time_limits.under_load(nodes * place.node.ranks_per_node).total


def _load(place: Place, settings: Settings, decision: dict[str, Any]) -> dict[str, Any]:
    """A phase under load on this node, which is one of ``decision["ranks"]``."""
    ranks, port = decision["ranks"], decision["load"]
    hosts = [place.hosts[rank] for rank in ranks]
    own = ranks.index(place.node.node_rank)
    backend, measures = settings.backend(place.accelerator, len(hosts)), _measures(place, settings, len(hosts))
    megabytes = settings.all_reduce_mb or bandwidth.DEFAULT_MB[backend]
    say(f"{place.host}: {', '.join(measures)} with {backend}, {megabytes:g} MB")
    if backend == "sockets":
        finding, facts = bandwidth.over_sockets(hosts, own, place.node.main_port, megabytes)
        findings = [finding]
    else:
        main = place.node.main_host if ranks[0] == 0 else address_of(hosts[0])
        node = dataclasses.replace(place.node, nodes=len(hosts), node_rank=own, main_host=main, hosts=tuple(hosts))
        floor = settings.all_reduce_min_gb_per_second
        findings, facts = bandwidth.over_torch(node, backend, port, megabytes, floor, measures)
    return {
        "host": place.host,
        "rank": place.node.node_rank,
        "findings": [finding.as_json() for finding in findings],
        "load": facts,
    }


# ---------------------------------------------------------------------------------------------------- other nodes


def _follow(place: Place, settings: Settings, folder: Folder, report: dict[str, Any]) -> None:
    phase = 1
    _send(place, folder, phase, report)
    decision = _await_decision(place, settings, folder, phase)
    while "load" in decision:
        phase += 1
        if place.node.node_rank in decision["ranks"]:
            _send(place, folder, phase, _load(place, settings, decision))
        decision = _await_decision(place, settings, folder, phase)


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
    deadline = time.monotonic() + settings.timeout_s + _patience(place, settings, len(place.hosts))
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
    hosts = place.hosts
    everyone = list(range(len(hosts)))
    reports = _collect(place, settings, folder, service, 1, report, started + settings.timeout_s, everyone)
    found = judge.problems(hosts, reports, settings.skip, settings.clock_skew_s)
    speed, phase = None, 1
    while (left := _worth_loading(place, settings, found)) and phase <= place.spare + 1:
        decision = {"load": _free_port(), "ranks": left}
        _decide(place, folder, service, phase, decision)
        phase += 1
        names = [hosts[rank] for rank in left]
        own = _load(place, settings, decision) if 0 in left else None
        deadline = time.monotonic() + _patience(place, settings, len(left))
        loads = _collect(place, settings, folder, service, phase, own, deadline, left)
        renumbered = {left.index(rank): one for rank, one in loads.items()}
        floor = settings.all_reduce_min_gb_per_second
        shown, speed = judge.under_load(names, renumbered, floor)
        for rank, one in loads.items():
            reports[rank]["load"] = one["load"]
            again = {finding["check"] for finding in one["findings"]}
            kept = [finding for finding in reports[rank]["findings"] if finding["check"] not in again]
            reports[rank]["findings"] = kept + one["findings"]
        network = any(problem.check == "all_reduce" for problem in shown)
        shown += judge.slower(names, renumbered, settings.slower_than(place.accelerator))
        found += shown
        if not network:  # a slow device spoils no other node's figures
            break
    _decide(place, folder, service, phase, {})
    chosen = _chosen(place, found, reports)
    outcome = Outcome(
        found,
        table.rows(hosts, reports, found, settings.skip),
        speed,
        time.monotonic() - started,
        chosen,
        spares.why_left_out(hosts, chosen, found, place.avoided) if chosen else {},
    )
    _publish(place, outcome, reports)
    _farewell(service, set(reports) - {0}, phase)
    return outcome


def _worth_loading(place: Place, settings: Settings, found: list[judge.Problem]) -> list[int]:
    """Ranks of the nodes to put under load; none where what is wrong decides already, or nothing would be measured."""
    bad = judge.bad_nodes(found)
    if len(bad) > place.spare or any(not problem.node for problem in found):
        return []
    left = [rank for rank, host in enumerate(place.hosts) if host not in bad]
    return left if _measures(place, settings, len(left)) else []


def _chosen(place: Place, found: list[judge.Problem], reports: dict[int, dict[str, Any]]) -> list[str]:
    """The nodes to train on where there are spare ones and enough nodes are fit; else none."""
    bad = judge.bad_nodes(found)
    if not place.wanted or any(not problem.node for problem in found):
        return []
    chosen = spares.choose(place.hosts, bad, place.avoided, reports, place.wanted)
    return chosen if len(chosen) == place.wanted else []


def _collect(
    place: Place,
    settings: Settings,
    folder: Folder,
    service: Service | None,
    phase: int,
    own: dict[str, Any] | None,
    deadline: float,
    ranks: list[int],
) -> dict[int, dict[str, Any]]:
    """Reports of the nodes ``ranks``, by rank; those that stay silent until the deadline are absent.

    Args:
        own: the first node's report; None where it is not among them.
    """
    reports = {} if own is None else {0: own}
    told = time.monotonic()
    while True:
        if service is not None:
            reports |= service.board.reports(phase)
        for rank in ranks:
            if rank not in reports and (found := folder.read(f"report-{phase}-{rank}")):
                reports[rank] = found
        missing = [place.hosts[rank] for rank in ranks if rank not in reports]
        if not missing or time.monotonic() > deadline:
            return reports
        if time.monotonic() - told > 10:
            told = time.monotonic()
            left = f"{deadline - told:.0f} s"
            say(f"waiting for {len(missing)} of {len(ranks)} nodes, {left} at most: {', '.join(missing[:8])}")
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
    for host, why in outcome.left_out.items():
        say(f"{host} does not train: {why}")
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
