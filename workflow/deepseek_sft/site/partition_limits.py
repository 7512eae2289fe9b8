"""Why a job can never start on a site: partitions, nodes, reservations. Pure functions; accounts: ``accounts``."""

import collections
import re
from collections.abc import Callable

from . import accounts, notation
from .answers import Problem, Record, Site, Wanted, account_of, qos_of

OUT_OF_SERVICE = {"DOWN", "DRAIN", "DRAINED", "DRAINING", "FAIL", "FAILING", "NOT_RESPONDING", "INVAL", "FUTURE"}
CLOSED = {
    "DOWN": "jobs wait there until an administrator sets it up",
    "DRAIN": "it takes no new jobs",
    "INACTIVE": "it takes no jobs",
}


def problems(wanted: Wanted, site: Site) -> list[Problem]:
    """Everything that keeps a job from ever starting; empty if nothing that Slurm tells does."""
    found = _names(wanted, site) or accounts.problems(wanted, site)
    if found:
        return found
    names = _partitions(wanted, site)
    each = {name: _in_partition(wanted, site.partitions[name], site) for name in names}
    failing = {name: found for name, found in each.items() if found}
    if not failing or (len(failing) < len(each) and not site.needs_all_partitions()):
        return []
    first = next(iter(failing))
    others = [name for name in site.partitions if name not in names and _all_fits(wanted, name, site)]
    hint = f", or slurm_partition: {' or '.join(others[:3])}, where it fits" if others else ""
    return [Problem(one.resource, one.text, one.fix + hint) for one in failing[first]]


def warnings(wanted: Wanted, site: Site) -> list[str]:
    """What may keep a job waiting for long, in sentences."""
    found = []
    for name in _partitions(wanted, site):
        fitting = _fitting(wanted, site.partitions.get(name, {}), site)
        out = {node: row for node, row in fitting.items() if _out_of_service(row)}
        if out and len(fitting) - len(out) < wanted.nodes:
            reasons = "; ".join(f"{node}: {_why(row)}" for node, row in list(out.items())[:3])
            more = f" and {len(out) - 3} more" if len(out) > 3 else ""
            found.append(
                f"nodes: {wanted.nodes} are asked for, but of the {len(fitting)} fitting nodes of partition {name} "
                f"{len(out)} are out of service ({reasons}{more}): the job waits for them"
            )
        kinds = _kinds_of_gpus(fitting)
        if wanted.nodes > 1 and wanted.gpus() and len(kinds) > 1:
            counts = ", ".join(f"{count} of {kind}" for kind, count in sorted(kinds.items()))
            first = max(kinds, key=lambda kind: kinds[kind])
            found.append(
                f"gres: {wanted.gres} fits nodes of several kinds of GPU in partition {name} ({counts}): a job that "
                f"gets both is as slow as the slowest, and preflight refuses it; write gres: gpu:{first}:"
                f"{wanted.gpus()}, or choose by constraint"
            )
    return found


def _kinds_of_gpus(nodes: dict[str, Record]) -> collections.Counter[str]:
    """Type of GPU → nodes that have it; those without a type are not counted."""
    found: collections.Counter[str] = collections.Counter()
    for record in nodes.values():
        found.update(
            {kind for (name, kind), _ in notation.gres(record.get("Gres", "")).items() if name == "gpu" and kind}
        )
    return found


def _all_fits(wanted: Wanted, name: str, site: Site) -> bool:
    return not _in_partition(wanted, site.partitions[name], site)


def _partitions(wanted: Wanted, site: Site) -> list[str]:
    named = [name.strip() for name in wanted.partition.split(",") if name.strip()]
    return named or [name for name in [site.default_partition()] if name]


def _names(wanted: Wanted, site: Site) -> list[Problem]:
    """Names that the site does not know."""
    found = []
    known = ", ".join(site.partitions)
    if not _partitions(wanted, site):
        text = "no partition is named, and this cluster has no default one"
        found.append(Problem("slurm_partition", text, f"name one of: {known}"))
    for name in _partitions(wanted, site):
        if name not in site.partitions:
            found.append(Problem("slurm_partition", f"there is no partition {name} here", f"name one of: {known}"))
    if wanted.reservation:
        found += _reservation(wanted, site)
    for resource in ("exclude", "nodelist"):
        unknown = [name for name in notation.hosts(getattr(wanted, resource)) if name not in site.nodes]
        if unknown and site.nodes:
            text = f"there is no node {', '.join(unknown[:5])} here"
            found.append(Problem(resource, text, "write names as `sinfo -N` prints them"))
    return found


def _reservation(wanted: Wanted, site: Site) -> list[Problem]:
    here = f"reservations here: {', '.join(site.reservations) or 'none'}"
    found = []
    for name in wanted.reservation.split(","):
        row = site.reservations.get(name)
        if row is None:
            found.append(Problem("reservation", f"there is no reservation {name}", f"{here}; or leave it out"))
        elif not _may_use(row, wanted, site):
            whom = "; ".join(
                f"{key}={row[key]}" for key in ("Users", "Accounts", "Groups") if row.get(key, "") != "(null)"
            )
            text = f"reservation {name} is not yours ({whom})"
            found.append(Problem("reservation", text, "leave it out, or have its owner add you"))
    return found


def _may_use(row: Record, wanted: Wanted, site: Site) -> bool:
    """Whether a reservation takes this person's jobs; one match of user, group or account is enough."""
    account = account_of(wanted, site)
    mine = {"Users": {site.person.name}, "Groups": set(site.person.groups), "Accounts": {account}}
    restricted = False
    for key, own in mine.items():
        names = [name.strip().lower() if key == "Accounts" else name.strip() for name in row.get(key, "").split(",")]
        if any(name.startswith("-") and name[1:] in own for name in names):
            return False
        allowed = {name for name in names if not name.startswith("-") and name not in ("", "(null)")}
        if allowed & own or (allowed and key == "Accounts" and not account):  # Slurm does not tell which account it is
            return True
        restricted |= bool(allowed)
    return not restricted


def _in_partition(wanted: Wanted, row: Record, site: Site) -> list[Problem]:
    """Why a job can never start in one partition."""
    name, state = row["PartitionName"], row.get("State", "UP").upper()
    if state in CLOSED:
        text = f"partition {name} is {state}: {CLOSED[state]}"
        return [Problem("slurm_partition", text, "name another one (`sinfo`)")]
    return (
        accounts.of_partition(wanted, row, site) + _sizes(wanted, row, site) or _on_nodes(wanted, row, site)
    ) + accounts.limits(wanted, row, site)


def _sizes(wanted: Wanted, row: Record, site: Site) -> list[Problem]:
    """Limits of the partition itself."""
    name = row["PartitionName"]
    flags = site.qos.get(qos_of(wanted, site, name), {}).get("Flags", "")
    found = []
    longest = notation.minutes(row.get("MaxTime", ""))
    if longest is not None and wanted.runtime > longest and "PartitionTimeLimit" not in flags:
        text = f"{notation.duration(wanted.runtime)}, but partition {name} allows {notation.duration(longest)}"
        unquoted = "; 24:00:00 without quotes is 86400 in YAML" if wanted.runtime % 3600 == 0 else ""
        fix = f"write runtime: {longest} or less (minutes; MaxTime={row['MaxTime']}{unquoted})"
        found.append(Problem("runtime", text, fix))
    most, least = notation.number(row.get("MaxNodes", "")), notation.number(row.get("MinNodes", ""))
    if most is not None and wanted.nodes > most and "PartitionMaxNodes" not in flags:
        text = f"{wanted.nodes} nodes, but partition {name} allows {most} a job (MaxNodes)"
        found.append(Problem("nodes", text, f"write nodes: {most} or less"))
    if least is not None and wanted.nodes < least and "PartitionMinNodes" not in flags:
        text = f"{wanted.nodes} nodes, but partition {name} takes jobs from {least} nodes on (MinNodes)"
        found.append(Problem("nodes", text, f"write nodes: {least} or more"))
    cores = notation.number(row.get("MaxCPUsPerNode", ""))
    if cores is not None and wanted.cpus > cores:
        text = f"{wanted.cpus} CPUs, but partition {name} allows {cores} on a node (MaxCPUsPerNode)"
        found.append(Problem("cpus_per_task", text, f"write cpus_per_task: {cores} or less"))
    memory = notation.memory_mb(row.get("MaxMemPerNode", ""))
    if memory and wanted.mem_mb > memory:
        text = f"{wanted.mem_mb} MB, but partition {name} allows {memory} MB on a node (MaxMemPerNode)"
        found.append(Problem("mem_mb", text, f"write mem_mb: {memory} or less"))
    if row.get("ReqResv") == "YES" and not wanted.reservation:
        text = f"partition {name} takes jobs with a reservation only (ReqResv)"
        found.append(Problem("reservation", text, "name one: `scontrol show reservation`"))
    return found


def _on_nodes(wanted: Wanted, row: Record, site: Site) -> list[Problem]:
    """The first requirement that fewer nodes than asked for can meet."""
    all_nodes = site.nodes_of(row)
    if not all_nodes:
        return []  # Slurm shows none of them: nothing to judge by
    nodes, where = all_nodes, f"partition {row['PartitionName']}"
    for _, left, describe in _steps(wanted, row, site):
        remaining = {name: record for name, record in nodes.items() if left(name, record)}
        if len(remaining) < wanted.nodes:
            return [describe(nodes, remaining, where)]
        nodes = remaining
    return []


def _fitting(wanted: Wanted, row: Record, site: Site) -> dict[str, Record]:
    nodes = site.nodes_of(row)
    for _, left, _ in _steps(wanted, row, site):
        nodes = {name: record for name, record in nodes.items() if left(name, record)}
    return nodes


Step = tuple[str, Callable[[str, Record], bool], Callable[[dict[str, Record], dict[str, Record], str], Problem]]


def _steps(wanted: Wanted, row: Record, site: Site) -> list[Step]:
    """What each node must have, in the order in which it is looked at."""
    excluded = set(notation.hosts(wanted.exclude))
    reserved = [
        set(notation.hosts(site.reservations[name].get("Nodes", "")))
        for name in wanted.reservation.split(",")
        if name in site.reservations and not re.search("ANY_NODES|FLEX", site.reservations[name].get("Flags", ""))
    ]
    per_cpu = notation.memory_mb(row.get("MaxMemPerCPU", "")) or 0

    def count(nodes: dict, left: dict, where: str) -> Problem:
        text = f"{wanted.nodes} nodes, but {where} has {len(left)}"
        return Problem("nodes", text, f"write nodes: {len(left)} or less")

    def not_excluded(nodes: dict, left: dict, where: str) -> Problem:
        text = f"without {wanted.exclude} only {len(left)} of the {wanted.nodes} nodes asked for are left in {where}"
        return Problem("exclude", text, f"exclude fewer, or write nodes: {len(left)} or less")

    def in_reservation(nodes: dict, left: dict, where: str) -> Problem:
        text = f"{wanted.nodes} nodes, but reservation {wanted.reservation} holds {len(left)} of {where}"
        return Problem("reservation", text, f"write nodes: {len(left)} or less, or leave the reservation out")

    def featured(nodes: dict, left: dict, where: str) -> Problem:
        known = sorted({name for record in nodes.values() for name in _features(record)})
        unknown = [name for name in notation.features(wanted.constraint) if name not in known]
        if unknown:
            text = f"no node of {where} has the feature {', '.join(unknown)}"
            return Problem("constraint", text, f"features there: {', '.join(known) or 'none'}")
        text = f"{wanted.nodes} nodes, but {len(left)} of {where} have {wanted.constraint}"
        return Problem("constraint", text, f"write nodes: {len(left)} or less")

    def with_gpus(nodes: dict, left: dict, where: str) -> Problem:
        there = sorted({notation.gres_without_sockets(record.get("Gres", "")) for record in nodes.values()})
        text = f"{wanted.gres} on each of {wanted.nodes} nodes, but {len(left)} nodes of {where} have that"
        shown = ", ".join(one for one in there if one not in notation.UNLIMITED)
        return Problem("gres", text, f"nodes there have: {shown or 'none'}")

    def at_most(resource: str, amount: int, unit: str, of: Callable[[Record], int]) -> Callable:
        def describe(nodes: dict, left: dict, where: str) -> Problem:
            most = sorted((of(record) for record in nodes.values()), reverse=True)[wanted.nodes - 1]
            text = f"{amount} {unit} on each of {wanted.nodes} nodes, but {len(left)} nodes of {where} have that"
            return Problem(resource, text, f"write {resource}: {most} or less")

        return describe

    return [
        ("nodes", lambda name, record: True, count),
        ("exclude", lambda name, record: name not in excluded, not_excluded),
        ("reservation", lambda name, record: all(name in nodes for nodes in reserved), in_reservation),
        ("constraint", lambda name, record: _has(wanted.constraint, record), featured),
        ("gres", lambda name, record: _has_gres(wanted.gres, record), with_gpus),
        (
            "cpus_per_task",
            lambda name, record: wanted.cpus <= _cpus(record),
            at_most("cpus_per_task", wanted.cpus, "CPUs", _cpus),
        ),
        (
            "mem_mb",
            lambda name, record: wanted.mem_mb <= _memory(record, per_cpu),
            at_most("mem_mb", wanted.mem_mb, "MB", lambda record: _memory(record, per_cpu)),
        ),
    ]


def _features(record: Record) -> set[str]:
    text = f"{record.get('AvailableFeatures', '')},{record.get('ActiveFeatures', '')}"
    return {name for name in text.split(",") if name not in notation.UNLIMITED}


def _has(constraint: str, record: Record) -> bool:
    return not constraint or notation.has_features(_features(record), constraint)


def _has_gres(wanted: str, record: Record) -> bool:
    there = notation.gres(record.get("Gres", ""))
    return all(
        sum(held for (other, of), held in there.items() if other == name and kind.casefold() in ("", of.casefold()))
        >= count
        for (name, kind), count in notation.gres(wanted).items()
    )


def _cpus(record: Record) -> int:
    return int(record.get("CPUEfctv") or record.get("CPUTot") or 0)


def _memory(record: Record, per_cpu: int) -> int:
    free = int(record.get("RealMemory") or 0) - (notation.memory_mb(record.get("MemSpecLimit", "0")) or 0)
    return min(free, per_cpu * _cpus(record)) if per_cpu else free


def _out_of_service(record: Record) -> bool:
    state = record.get("State", "")
    return bool(OUT_OF_SERVICE & set(state.rstrip("*").upper().split("+"))) or state.endswith("*")


def _why(record: Record) -> str:
    reason = record.get("Reason", "").partition(" [")[0]
    return record.get("State", "").lower() + (f", {reason}" if reason else "")
