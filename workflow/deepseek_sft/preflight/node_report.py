"""What one node finds out by itself and about its neighbours: its report (format: judge.py)."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..cli import say
from ..slurm.nodes import NodeEnvironment
from . import affinity, cuda_stack, gpu_state, machine, network, software
from .exchange import Folder
from .findings import Finding
from .own_disk import OwnDisk
from .settings import Needs, Settings


@dataclasses.dataclass(frozen=True)
class Place:
    """Where preflight runs.

    Attributes:
        node: this node's place in the job.
        hosts: all nodes, in the order of their ranks.
        accelerator: ``cuda`` or ``cpu``.
        results: the experiment's folder, whose disk is checked.
        output: ``<results>/preflight``.
        folders: name → folder that every node must see alike (base model, tokens).
        visible: CUDA_VISIBLE_DEVICES of the job.
        wanted: nodes to train on, where the job has spare ones.
        avoided: nodes that training has named slow, and why.
    """

    node: NodeEnvironment
    hosts: list[str]
    accelerator: str
    results: Path
    output: Path
    folders: dict[str, Path]
    visible: str | None = None
    wanted: int | None = None
    avoided: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

    @property
    def host(self) -> str:
        return self.hosts[self.node.node_rank]

    @property
    def spare(self) -> int:
        """Nodes that may be bad."""
        return max(0, len(self.hosts) - self.wanted) if self.wanted else 0

    @property
    def first(self) -> bool:
        return self.node.node_rank == 0


def make(place: Place, settings: Settings, needs: Needs, folder: Folder, taken: str | None) -> dict[str, Any]:
    """Everything this node can say before the network is put under load."""
    node = place.node
    report: dict[str, Any] = {"host": place.host, "rank": node.node_rank, "findings": [], "same": {}}
    report |= {"reached": {}, "clock": None, "shared": {}, "load": {}}

    def guarded(check: str, look: Callable[[], Finding]) -> None:
        if not settings.wants(check):
            return
        say(f"{place.host}: {check}")
        try:
            finding = look()
        except OSError as error:
            finding = Finding(check, False, f"cannot be checked: {error}", "error")
        report["findings"].append(finding.as_json())

    def shared_files() -> Finding:
        finding, report["shared"] = network.shared_files(
            folder.path, node.attempt, place.hosts, node.node_rank, settings.timeout_s
        )
        return finding

    def alike(check: str, values: Callable[[], dict[str, str]]) -> Callable[[], Finding]:
        def look() -> Finding:
            report["same"][check] = values()
            shown = next(iter(report["same"][check].values()), "")
            return Finding(check, True, f"{len(report['same'][check])} compared", shown if check == "code" else "ok")

        return look

    def packages() -> Finding:
        finding = alike("software", software.packages)()
        error = ""
        if place.accelerator == "cuda":
            error = software.import_error(settings.imports, engine=settings.engine, limit_s=settings.timeout_s / 2)
        return Finding("software", False, error, "imports") if error else finding

    def with_values(check: str, look: Callable[[], tuple[Finding, dict[str, Any]]]) -> Callable[[], Finding]:
        def inner() -> Finding:
            finding, report["same"][check] = look()
            return finding

        return inner

    guarded("host_memory", lambda: machine.host_memory(needs))
    guarded("shared_memory", lambda: machine.shared_memory(settings))
    guarded("locked_memory", lambda: machine.locked_memory(place.accelerator))
    guarded("disk", lambda: machine.disk(needs, place.results, node.world_size))
    guarded("local_disk", lambda: machine.local_disk(settings))
    guarded("code", alike("code", software.code))
    if place.folders:
        hashes = alike("model", lambda: {name: software.folder(path) for name, path in place.folders.items()})
        guarded("model", hashes)
    guarded(
        "gpus",
        with_values(
            "gpus", lambda: cuda_stack.gpus_and_stack(place.accelerator, node.ranks_per_node, needs, place.visible)
        ),
    )
    guarded("infiniband", with_values("infiniband", gpu_state.infiniband))
    guarded("cpus", with_values("cpus", lambda: affinity.affinity(place.accelerator, node.ranks_per_node)))
    own_disk = OwnDisk(settings.checkpoints, node.attempt, node.node_rank) if settings.checkpoints else None
    if own_disk and settings.wants("own_disk"):
        own_disk.sign()  # before the file in the shared folder that the next node waits for
    guarded("shared_files", shared_files)
    if own_disk:
        guarded("own_disk", lambda: own_disk.judge(needs, place.results, settings.wants("shared_files")))
    guarded("ports", lambda: _ports(place, settings, folder, taken, report))
    guarded("clock", lambda: _clock(place, report))
    guarded("software", packages)  # last, since cold imports take unlike times, and the others wait for each other
    return report


def _ports(place: Place, settings: Settings, folder: Folder, taken: str | None, report: dict[str, Any]) -> Finding:
    node = place.node
    report["reached"] = network.reach(
        place.hosts, node.node_rank, node.main_port, node.attempt, folder, settings.timeout_s
    )
    failed = sum(error is not None for error in report["reached"].values())
    if taken is not None:
        return Finding("ports", False, taken, "taken")
    # Whose fault a broken connection is only all reports together can say.
    detail = f"port {node.main_port}: {len(report['reached']) - failed} of {len(report['reached'])} nodes reached"
    return Finding("ports", True, detail, f"{node.main_port}")


def _clock(place: Place, report: dict[str, Any]) -> Finding:
    if place.first:
        report["clock"] = [0.0, 0.0]
        return Finding("clock", True, "the clock that the others are compared with", "+0.000 s")
    found = network.clock_offset(place.hosts[0], place.node.main_port)
    if found is None:
        return Finding("clock", None, "the first node does not answer")
    report["clock"] = list(found)
    return Finding("clock", True, f"± {found[1]:.3f} s", f"{-found[0]:+.3f} s")
