"""Why a job can never start on a site: accounts, QOS and their limits, as slurmdbd keeps them. Pure functions.

Where a partition's QOS, the job's own and its account set the same limit, the first one counts (the job's own first if
it has the flag OverPartQOS). A limit on what an account or QOS uses in all is judged for this one job.
"""

from . import notation
from .answers import Problem, Record, Site, Wanted, account_of, association_of, qos_of

RESOURCES = {"node": "nodes", "cpu": "cpus_per_task", "mem": "mem_mb"}
MOST_OF_JOB = ("MaxTRES", "MaxTRESPU", "MaxTRESPA", "GrpTRES")  # columns: most that one job may ask for in all


def problems(wanted: Wanted, site: Site) -> list[Problem]:
    """Accounts and QOS that do not exist or are not this person's."""
    rows = site.associations
    if rows is None:
        return []
    if not rows:
        return [] if not site.enforces("associations") else [_nobody(site)]
    mine = sorted({row.get("Account", "") for row in rows})
    account = account_of(wanted, site)
    if account and account not in [name.lower() for name in mine]:
        text = f"account {account} is not one of yours"
        return [Problem("slurm_account", text, f"write one of: {', '.join(mine)}")]
    if wanted.qos and site.qos and wanted.qos not in site.qos:
        text = f"there is no QOS {wanted.qos} here"
        return [Problem("qos", text, f"yours: {', '.join(_qos_of_person(wanted, site)) or 'none'}")]
    allowed = _qos_of_person(wanted, site)
    if wanted.qos and allowed and wanted.qos not in allowed and site.enforces("qos"):
        text = f"QOS {wanted.qos} is not one of yours with account {account or '(default)'}"
        return [Problem("qos", text, f"write one of: {', '.join(allowed)}")]
    return []


def _nobody(site: Site) -> Problem:
    text = f"user {site.person.name} has no account on cluster {site.settings.get('ClusterName', '')}"
    return Problem(
        "slurm_account", text, "ask an administrator for one; `sacctmgr show associations user=$USER` lists yours"
    )


def _qos_of_person(wanted: Wanted, site: Site) -> list[str]:
    account = account_of(wanted, site)
    rows = [row for row in site.associations or [] if not account or row.get("Account", "").lower() == account]
    return sorted({name for row in rows for name in row.get("QOS", "").split(",") if name})


def of_partition(wanted: Wanted, row: Record, site: Site) -> list[Problem]:
    """Groups, accounts and QOS that a partition takes."""
    name, person = row["PartitionName"], site.person
    found = []
    groups = _listed(row.get("AllowGroups", "ALL"))
    if groups and not person.root and not set(groups) & set(person.groups):
        text = f"partition {name} is for the groups {', '.join(groups)}, and you are in none of them"
        found.append(Problem("slurm_partition", text, "name another one (`sinfo`)"))
    if row.get("RootOnly") == "YES" and not person.root:
        found.append(Problem("slurm_partition", f"partition {name} is root's", "name another one (`sinfo`)"))
    checks = (
        ("slurm_account", "account", account_of(wanted, site), "AllowAccounts", "DenyAccounts", str.lower),
        ("qos", "QOS", qos_of(wanted, site, name), "AllowQos", "DenyQos", str),
    )
    for resource, word, value, allow, deny, same in checks:
        allowed, denied = _listed(row.get(allow, "ALL")), _listed(row.get(deny, ""))
        if not value:
            continue  # Slurm does not tell what the job would get
        if allowed and value not in map(same, allowed):
            text = f"{word} {value}, but partition {name} takes {', '.join(allowed)} only ({allow})"
            found.append(Problem(resource, text, f"write {resource}: {allowed[0]}, or another partition"))
        elif not allowed and value in map(same, denied):
            text = f"{word} {value}, which partition {name} does not take ({deny})"
            found.append(Problem(resource, text, f"write another {resource}, or another partition"))
    return found


def _listed(text: str) -> list[str]:
    return [] if text == "ALL" or text in notation.UNLIMITED else [part for part in text.split(",") if part]


def limits(wanted: Wanted, partition: Record, site: Site) -> list[Problem]:
    """Limits of QOS and account that this one job exceeds."""
    if not site.enforces("limits"):
        return []
    holders = _holders(wanted, partition, site)
    found = []
    if limit := _first(holders, "MaxWall"):
        holder, text = limit
        longest = notation.minutes(text)
        if longest is not None and wanted.runtime > longest:
            said = f"{notation.duration(wanted.runtime)}, but {holder} allows {notation.duration(longest)} (MaxWall)"
            found.append(Problem("runtime", said, f"write runtime: {longest} or less"))
    for column in MOST_OF_JOB:
        for holder, most in _each(holders, column):
            found += _over(wanted, most, wanted.nodes, f"{holder} allows a job", column)
    for holder, most in _each(holders, "MaxTRESPerNode"):
        found += _over(wanted, most, 1, f"{holder} allows on a node", "MaxTRESPerNode")
    for holder, most in _each(holders, "MaxTRESMins"):
        for name, amount in most.items():
            asked = _asked(wanted, name, wanted.nodes)
            if asked and asked * wanted.runtime > amount:
                said = f"{asked} {name} for {wanted.runtime} minutes, but {holder} allows {amount} {name}-minutes"
                found.append(Problem("runtime", f"{said} (MaxTRESMins)", f"write runtime: {amount // asked} or less"))
    for holder, least in _each(holders, "MinTRES"):
        for name, amount in least.items():
            asked = _asked(wanted, name, wanted.nodes)
            if asked is not None and asked < amount:
                said = f"{asked} {name} in all, but {holder} takes jobs from {amount} on (MinTRES)"
                found.append(Problem(_resource(name), said, "ask for more, or write another qos"))
    return list({one.resource: one for one in reversed(found)}.values())


def most_submitted(wanted: Wanted, site: Site) -> tuple[str, int] | None:
    """Whose limit it is and how many jobs it lets this person submit at a time; None without a limit."""
    if not site.enforces("limits"):
        return None
    names = [name for name in wanted.partition.split(",") if name] or [site.default_partition()]
    found = []
    for holder, row in _holders(wanted, site.partitions.get(names[0], {}), site):
        for column in ("MaxSubmit", "MaxSubmitPU", "MaxSubmitPA", "GrpSubmit"):
            if (count := notation.number(row.get(column, ""))) is not None:
                found.append((holder, count))
    return min(found, key=lambda one: one[1]) if found else None


def _holders(wanted: Wanted, partition: Record, site: Site) -> list[tuple[str, Record]]:
    """Rows with limits, in the order in which they count, each with its name."""
    name, account = partition.get("PartitionName", ""), account_of(wanted, site)
    own, of_partition = qos_of(wanted, site, name), partition.get("QoS", "N/A")
    chosen = [(f"the QOS {of_partition} of partition {name}", site.qos.get(of_partition, {}))]
    chosen.append((f"QOS {own}", site.qos.get(own, {})))
    if "OverPartQOS" in chosen[1][1].get("Flags", ""):
        chosen.reverse()
    if row := association_of(wanted, site, name):
        chosen.append((f"account {row.get('Account')}", row))
    chosen += [(f"account {row['Account']}", row) for row in site.of_accounts if row["Account"].lower() == account]
    return chosen


def _first(holders: list[tuple[str, Record]], column: str) -> tuple[str, str] | None:
    return next(((holder, row[column]) for holder, row in holders if row.get(column)), None)


def _each(holders: list[tuple[str, Record]], column: str) -> list[tuple[str, dict[str, int]]]:
    """Holder and amounts of a column; of each resource only the first holder's."""
    seen: set[str] = set()
    found = []
    for holder, row in holders:
        amounts = {name: amount for name, amount in notation.tres(row.get(column, "")).items() if name not in seen}
        seen |= set(amounts)
        if amounts:
            found.append((holder, amounts))
    return found


def _asked(wanted: Wanted, name: str, nodes: int) -> int | None:
    """What a job asks for of one trackable resource; None where that cannot be told beforehand."""
    if name == "node":
        return nodes
    if name == "cpu":
        return nodes * wanted.cpus
    if name == "mem":
        return nodes * wanted.mem_mb
    kind = name.removeprefix("gres/gpu").removeprefix(":")
    return nodes * wanted.gpus(kind) if name.startswith("gres/gpu") else None


def _resource(name: str) -> str:
    return RESOURCES.get(name, "gres")


def _over(wanted: Wanted, most: dict[str, int], nodes: int, who: str, column: str) -> list[Problem]:
    found = []
    for name, amount in most.items():
        asked = _asked(wanted, name, nodes)
        if asked is not None and asked > amount:
            unit = " MB" if name == "mem" else ""
            fix = (
                f"write {_resource(name)} so that it is {amount}{unit} or less in all, or another qos or slurm_account"
            )
            found.append(Problem(_resource(name), f"{asked}{unit} {name}, but {who} {amount}{unit} ({column})", fix))
    return found
