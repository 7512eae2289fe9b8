"""CPUs that this job may use, against those of the node: Adam, data and NCCL's threads run on them."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .findings import Finding

HALF = 0.5  # of the cores that belong to the job's GPUs: at or below, a resource line or a binding is wrong
GPUS = Path("/proc/driver/nvidia/gpus")  # all GPUs of the node, also those of other jobs
TOPOLOGY = Path("/sys/devices/system/cpu")
# What a machine, or the container that stands for one, lets its processes use: control groups of version 2 and 1.
USABLE = (Path("/sys/fs/cgroup/cpuset.cpus.effective"), Path("/sys/fs/cgroup/cpuset/cpuset.effective_cpus"))


def affinity(
    accelerator: str,
    ranks: int,
    environment: Mapping[str, str] = os.environ,
    mine: Iterable[int] | None = None,
    topology: Path = TOPOLOGY,
    gpus: Path = GPUS,
) -> tuple[Finding, dict[str, Any]]:
    """CPUs and cores of the job on this node, and their numbers to compare with the other nodes'.

    Args:
        ranks: of this node.
        mine: CPUs that this process may run on; by default what the kernel says.
    """
    own = set(os.sched_getaffinity(0) if mine is None else mine)
    usable = _usable(USABLE if topology is TOPOLOGY else ())
    cores = {cpu: place for cpu, place in _cores(topology).items() if not usable or cpu in usable}
    online = len(cores) or os.cpu_count() or len(own)
    detail, value = f"{len(own)} of the node's {online} CPUs", f"{len(own)}/{online}"
    node_cores, own_cores = set(cores.values()), {cores[cpu] for cpu in own if cpu in cores}
    if node_cores:
        sockets = sorted({socket for socket, _ in own_cores})
        detail += f", {len(own_cores)} of {len(node_cores)} cores, on sockets {', '.join(map(str, sockets))}"
    same = {"CPUs of the job": str(len(own)), "CPUs of the node": str(online)}
    given = environment.get("SLURM_CPUS_ON_NODE", "")
    if given.isdigit() and len(own) < min(int(given), online):
        text = f"{detail}, but Slurm has given the job {given}: the step is bound to fewer (srun --cpus-per-task)"
        return Finding("cpus", False, text, value), same
    if accelerator == "cuda" and node_cores:
        there = len(list(gpus.iterdir())) if gpus.is_dir() else ranks
        due = len(node_cores) * min(1.0, ranks / max(there, 1))
        if len(own_cores) <= HALF * due:
            text = (
                f"{detail}: at most half of the {due:.0f} cores that go with {ranks} of {there} GPUs. Ask for more "
                "(profile, set-resources: train: cpus_per_task; Slurm counts hardware threads)"
            )
            return Finding("cpus", False, text, value), same
    return Finding("cpus", True, detail, value), same


def _usable(files: Iterable[Path]) -> set[int]:
    """CPUs of the whole machine in the kernel's form, ``0-3,8``; empty where it does not tell."""
    for file in files:
        try:
            parts = [part.split("-") for part in file.read_text().strip().split(",")]
            return {cpu for part in parts for cpu in range(int(part[0]), int(part[-1]) + 1)}
        except (OSError, ValueError):  # the other version of control groups, or none
            continue
    return set()


def _cores(topology: Path) -> dict[int, tuple[int, int]]:
    """CPU → (socket, core) of every CPU that is online; empty where the kernel does not tell."""
    found = {}
    for folder in topology.glob("cpu[0-9]*"):
        try:
            place = tuple(int((folder / "topology" / name).read_text()) for name in ("physical_package_id", "core_id"))
        except (OSError, ValueError):  # offline, or a kernel without it
            continue
        found[int(folder.name[3:])] = place
    return found
