"""How much memory this process may use: the machine's, its control group's, and swap."""

import os
import resource
from dataclasses import dataclass
from pathlib import Path

from ..errors import BadInputError
from . import number_formats
from .sizes import parse_size, show_size

CGROUP_ROOT = Path("/sys/fs/cgroup")
MAX_AUTOMATIC = 2 << 30  # more buffers than this do not make streaming faster
SHARE_OF_AVAILABLE = 4  # automatic: at most this fraction of what is free
LARGEST_CHUNK, SMALLEST_CHUNK = 1 << 22, 1 << 16  # elements per work item; 16 MiB of FP32 keep a parallel disk busy
BLOCK_BYTES = 12 * number_formats.BLOCK  # of every thread, while it converts a block


@dataclass(frozen=True)
class Memory:
    """Bytes; ``None`` where there is no limit.

    Attributes:
        available: ``MemAvailable`` of the machine.
        swap_free: free swap.
        group_limit: the tightest limit of the control groups this process is in.
        group_free: what is left below that limit, reclaimable page cache not counted as used.
    """

    available: int
    swap_free: int
    group_limit: int | None
    group_free: int | None

    @property
    def usable(self) -> int:
        return self.available if self.group_free is None else min(self.available, self.group_free)

    def __str__(self) -> str:
        group = "none" if self.group_limit is None else show_size(self.group_limit)
        return f"available {show_size(self.available)}, control group limit {group}, swap {show_size(self.swap_free)}"


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # no such file, or "max"
        return None


def _group_folders(root: Path, membership: str) -> list[tuple[Path, str, str]]:
    """Folders of this process's memory groups up to the root, with the names of their limit and usage files."""
    found = []
    for line in membership.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            start, names = root, ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            start, names = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        folder = start / path.lstrip("/")
        while folder.is_relative_to(start):
            found.append((folder, *names))
            folder = folder.parent
    return found


def _inactive_file(folder: Path) -> int:
    try:
        lines = (folder / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    values = dict(line.split() for line in lines)
    return int(values.get("inactive_file", 0)) + int(values.get("active_file", 0))


def measure(proc: Path = Path("/proc"), cgroup_root: Path = CGROUP_ROOT) -> Memory:
    """Read the memory figures of this machine and process."""
    lines = (proc / "meminfo").read_text().splitlines()
    figures = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if len(line.split()) > 1}
    try:
        membership = (proc / "self/cgroup").read_text()
    except OSError:
        membership = ""
    limit = free = None
    for folder, limit_name, usage_name in _group_folders(cgroup_root, membership):
        value, used = _number(folder / limit_name), _number(folder / usage_name)
        if value is None or used is None or value >= 1 << 60:
            continue
        left = max(0, value - used + _inactive_file(folder))
        limit = value if limit is None else min(limit, value)
        free = left if free is None else min(free, left)
    return Memory(figures["MemAvailable"], figures.get("SwapFree", 0), limit, free)


@dataclass(frozen=True)
class Buffers:
    """How the bound is spent: ``workers`` threads, each on a work item of up to ``chunk`` elements; ``size`` bytes."""

    workers: int
    chunk: int
    size: int


def plan_buffers(option: str, workers: int, bytes_per_element: int, memory: Memory) -> Buffers:
    """Divide the memory bound among threads.

    Args:
        option: ``auto`` or a size.
        workers: threads; 0 for two per usable core, at most eight.
        bytes_per_element: what a work item holds per element.
        memory: what is free.

    Raises:
        BadInputError: the bound is too small for this number of threads, or more than is free.
    """
    workers = workers or min(8, 2 * len(os.sched_getaffinity(0)))
    smallest = workers * (SMALLEST_CHUNK * bytes_per_element + BLOCK_BYTES)
    if option == "auto":
        bound = max(smallest, min(MAX_AUTOMATIC, memory.usable // SHARE_OF_AVAILABLE))
    else:
        bound = parse_size(option)
        if bound < smallest:
            raise BadInputError(
                f"--memory {option} is less than {show_size(smallest)}, which {workers} threads need",
                "give more memory or fewer --workers",
            )
        if bound > memory.usable:
            raise BadInputError(f"--memory {option} is more than is free: {memory}", "use --memory auto or less")
    chunk = min(LARGEST_CHUNK, (bound // workers - BLOCK_BYTES) // bytes_per_element)
    return Buffers(workers, chunk, workers * (chunk * bytes_per_element + BLOCK_BYTES))


def peak_resident() -> int:
    """Highest resident size of this process so far, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
