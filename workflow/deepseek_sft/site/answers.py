"""What the site's Slurm says of itself, and what it is asked for; plain data, from captured text in tests."""

import dataclasses
import getpass
import grp
import os
import re

from . import notation

Record = dict[str, str]


@dataclasses.dataclass(frozen=True)
class Problem:
    """Why a job can never start.

    Attributes:
        resource: the profile's name of what is wrong, such as ``runtime``.
        text: what is wrong, with the value asked for and the one allowed.
        fix: what to write instead.
    """

    resource: str
    text: str
    fix: str


@dataclasses.dataclass(frozen=True)
class Wanted:
    """One job as it will be asked for; memory in MB per node, time in minutes."""

    nodes: int
    cpus: int
    mem_mb: int
    runtime: int
    gres: str = ""
    partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""
    reservation: str = ""
    exclude: str = ""
    nodelist: str = ""

    def gpus(self, kind: str = "") -> int:
        """GPUs per node; of one type only where that is named."""
        return sum(
            count for (name, type_), count in notation.gres(self.gres).items() if name == "gpu" and kind in ("", type_)
        )


@dataclasses.dataclass(frozen=True)
class Person:
    """Who submits."""

    name: str = dataclasses.field(default_factory=getpass.getuser)
    groups: tuple[str, ...] = dataclasses.field(default_factory=lambda: _groups())
    root: bool = dataclasses.field(default_factory=lambda: os.geteuid() == 0)


def _groups() -> tuple[str, ...]:
    found = []
    for number in {os.getegid(), *os.getgroups()}:
        try:
            found.append(grp.getgrgid(number).gr_name)
        except KeyError:
            found.append(str(number))
    return tuple(found)


@dataclasses.dataclass(frozen=True)
class Site:
    """Slurm's answers.

    Attributes:
        settings: ``scontrol show config``.
        partitions: name → record.
        nodes: name → record.
        reservations: name → record.
        associations: rows of this person's accounts; None without slurmdbd, or where it does not answer.
        of_accounts: rows of these accounts themselves, whose group limits hold for all of their people.
        qos: name → row.
        default_account: of this person.
    """

    settings: Record
    partitions: dict[str, Record]
    nodes: dict[str, Record]
    reservations: dict[str, Record] = dataclasses.field(default_factory=dict)
    associations: list[Record] | None = None
    of_accounts: list[Record] = dataclasses.field(default_factory=list)
    qos: dict[str, Record] = dataclasses.field(default_factory=dict)
    default_account: str = ""
    person: Person = dataclasses.field(default_factory=Person)

    @classmethod
    def from_text(
        cls,
        config: str,
        partitions: str,
        nodes: str,
        reservations: str = "",
        associations: str | None = None,
        of_accounts: str = "",
        qos: str = "",
        users: str = "",
        person: Person | None = None,
    ) -> "Site":
        """From what scontrol (``--oneliner``) and sacctmgr (``--parsable2``) print."""
        settings = notation.settings(config)
        cluster = settings.get("ClusterName", "")
        here = [row for row in notation.table(associations or "") if row.get("Cluster", cluster) in ("", cluster)]
        groups = [row for row in notation.table(of_accounts) if row.get("Cluster", cluster) in ("", cluster)]
        persons = notation.table(users)
        return cls(
            settings=settings,
            partitions={row["PartitionName"]: row for row in notation.records(partitions) if "PartitionName" in row},
            nodes={row["NodeName"]: row for row in notation.records(nodes) if "NodeName" in row},
            reservations={
                row["ReservationName"]: row for row in notation.records(reservations) if "ReservationName" in row
            },
            associations=None if associations is None else here,
            of_accounts=[row for row in groups if not row.get("User")],
            qos={row["Name"]: row for row in notation.table(qos) if row.get("Name")},
            default_account=persons[0].get("Def Acct", "") if persons else "",
            person=person or Person(),
        )

    def enforces(self, what: str) -> bool:
        """Whether slurmctld holds people to ``associations``, ``limits`` or ``qos``."""
        words = set(re.split(r"[,\s]+", self.settings.get("AccountingStorageEnforce", "").lower()))
        implied = {
            "associations": {"limits", "qos", "safe", "wckeys", "all"},
            "limits": {"safe", "all"},
            "qos": {"all"},
        }
        return self.associations is not None and bool(words & {what, *implied[what]})

    def needs_all_partitions(self) -> bool:
        """Whether a job that names several partitions must be able to run in each of them."""
        return self.settings.get("EnforcePartLimits", "").upper() in ("ALL", "YES")

    def default_partition(self) -> str:
        """Name of the partition of jobs that name none; empty without one."""
        return next((name for name, row in self.partitions.items() if row.get("Default") == "YES"), "")

    def nodes_of(self, partition: Record) -> dict[str, Record]:
        """Records of a partition's nodes; those that Slurm does not show are left out."""
        return {name: self.nodes[name] for name in notation.hosts(partition.get("Nodes", "")) if name in self.nodes}


def account_of(wanted: Wanted, site: Site) -> str:
    """The account a job is charged to; empty where Slurm does not tell."""
    return (wanted.account or site.default_account).lower()


def association_of(wanted: Wanted, site: Site, partition: str = "") -> Record | None:
    """The row of account and partition that holds for a job; None where there is none."""
    account = account_of(wanted, site)
    rows = [row for row in site.associations or [] if row.get("Account", "").lower() == account]
    own = [row for row in rows if partition and row.get("Partition") == partition]
    return next(iter(own or [row for row in rows if not row.get("Partition")]), None)


def qos_of(wanted: Wanted, site: Site, partition: str = "") -> str:
    """The QOS of a job; empty where Slurm does not tell."""
    if wanted.qos:
        return wanted.qos
    row = association_of(wanted, site, partition) or {}
    named = [name for name in row.get("QOS", "").split(",") if name]
    return row.get("Def QOS", "") or (named[0] if len(named) == 1 else "")
