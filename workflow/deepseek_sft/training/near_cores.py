"""Bind this process to the cores beside its GPU, as ``torchrun --numa-binding node`` does.

torchrun, and torch's function for it, want ``numactl`` on the node although they do not use it, and end or leave a
traceback for each rank where it is missing. What they need to know stands in Linux' own files.
"""

import os
from pathlib import Path


def cores_beside(address: str, devices: Path = Path("/sys/bus/pci/devices")) -> set[int]:
    """Cores that Linux lists as local to a PCI device; empty where it lists none.

    Args:
        address: as in ``0000:1b:00.0``.
    """
    try:
        text = (devices / address / "local_cpulist").read_text()
    except OSError:
        return set()
    ends = [part.split("-") for part in text.strip().split(",") if part]
    return {core for end in ends for core in range(int(end[0]), int(end[-1]) + 1)}


def bind(cores: set[int]) -> str:
    """Run all threads of this process on those of its cores that are among ``cores``; what was done, in words."""
    allowed = os.sched_getaffinity(0)
    near = allowed & cores
    if not near:
        why = "none is among them" if cores else "nothing is known"
        return f"on its job's {len(allowed)} cores: of those near its GPU {why}"
    for thread in Path("/proc/self/task").iterdir():
        try:
            os.sched_setaffinity(int(thread.name), near)
        except ProcessLookupError:  # it has ended meanwhile
            continue
    return f"on {len(near)} of its job's {len(allowed)} cores, those near its GPU"
