"""How much memory this process may use (the machine's, its control group's, swap), and how the bound is spent."""

import os
import resource
from dataclasses import dataclass
from pathlib import Path

from ..errors import BadInputError
from ..formatting import byte_size
from . import number_formats
from .sizes import parse_size

CGROUP_ROOT = Path("/sys/fs/cgroup")
MAX_AUTOMATIC = 2 << 30  # more buffers than this do not make streaming faster
SHARE_OF_AVAILABLE = 4  # automatic: at most this fraction of what is free
LARGEST_CHUNK, SMALLEST_CHUNK = 1 << 22, 1 << 16  # elements per work item; 16 MiB of FP32 keep a parallel disk busy
MOST_THREADS = 16  # automatic
BLOCK_BYTES = 12 * number_formats.BLOCK  # of every thread, while it converts a block


@dataclass(frozen=True)
class Memory:
    """Bytes; ``None`` where there is no limit.

    Attributes:
        available: ``MemAvailable`` of the machine.
        swap_free: free swap.
        group_limit: the tightest limit of the control groups this process is in.
        group_free: what is left below that limit, reclaimable page cache not counted as used.
        group_swap: swap that these groups may still use; None without a limit.
    """

    available: int
    swap_free: int
    group_limit: int | None
    group_free: int | None
    group_swap: int | None = None

    @property
    def usable(self) -> int:
        return self.available if self.group_free is None else min(self.available, self.group_free)

    @property
    def usable_swap(self) -> int:
        """Free swap that is there already and that this process may use."""
        return self.swap_free if self.group_swap is None else min(self.swap_free, self.group_swap)

    def __str__(self) -> str:
        group = "none" if self.group_limit is None else byte_size(self.group_limit)
        swap = byte_size(self.swap_free)
        if self.group_swap is not None:
            swap += f" (the group may use {byte_size(self.group_swap)})"
        return f"available {byte_size(self.available)}, control group limit {group}, free swap {swap}"


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # no such file, or "max"
        return None


V2_FILES = ("memory.max", "memory.current")
V1_FILES = ("memory.limit_in_bytes", "memory.usage_in_bytes")


def _group_folders(root: Path, membership: str) -> list[tuple[Path, str, str]]:
    """Folders of this process's memory groups up to the root, with the names of their limit and usage files."""
    found = []
    for line in membership.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            start, names = root, V2_FILES
        elif "memory" in controllers.split(","):
            start, names = root / "memory", V1_FILES
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


def _group_swap(folder: Path, version_2: bool) -> int | None:
    """Swap that a group may still use; version 1 limits memory and swap together."""
    if version_2:
        limit, used = _number(folder / "memory.swap.max"), _number(folder / "memory.swap.current")
        return None if limit is None else max(0, limit - (used or 0))
    both, memory = _number(folder / "memory.memsw.limit_in_bytes"), _number(folder / V1_FILES[0])
    if both is None or memory is None or both >= 1 << 60:
        return None
    used, used_memory = _number(folder / "memory.memsw.usage_in_bytes"), _number(folder / V1_FILES[1])
    return max(0, both - memory - max(0, (used or 0) - (used_memory or 0)))


def measure(proc: Path = Path("/proc"), cgroup_root: Path = CGROUP_ROOT) -> Memory:
    """Read the memory figures of this machine and process."""
    lines = (proc / "meminfo").read_text().splitlines()
    figures = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if len(line.split()) > 1}
    try:
        membership = (proc / "self/cgroup").read_text()
    except OSError:
        membership = ""
    limit = free = swap = None
    for folder, limit_name, usage_name in _group_folders(cgroup_root, membership):
        swap_left = _group_swap(folder, limit_name == V2_FILES[0])
        if swap_left is not None:
            swap = swap_left if swap is None else min(swap, swap_left)
        value, used = _number(folder / limit_name), _number(folder / usage_name)
        if value is None or used is None or value >= 1 << 60:
            continue
        left = max(0, value - used + _inactive_file(folder))
        limit = value if limit is None else min(limit, value)
        free = left if free is None else min(free, left)
    return Memory(figures["MemAvailable"], figures.get("SwapFree", 0), limit, free, swap)


@dataclass(frozen=True)
class Buffers:
    """How the bound is spent.

    Attributes:
        workers: threads.
        chunk: elements of the largest work item.
        size: bytes that the threads hold together at most.
        beyond: bytes of them beyond the memory that is free; 0 unless swap was allowed.
    """

    workers: int
    chunk: int
    size: int
    beyond: int = 0


def plan_buffers(
    option: str,
    workers: int,
    bytes_per_element: int,
    memory: Memory,
    *,
    largest: int = LARGEST_CHUNK,
    swap: bool = False,
) -> Buffers:
    """Divide the memory bound among threads.

    Args:
        option: ``auto`` or a size.
        workers: threads; 0 for two per usable core, at most 16.
        bytes_per_element: what a work item holds per element.
        memory: what is free.
        largest: elements of the largest tensor; a bound that is given may be spent on work items of that size.
        swap: whether the bound may be more than what is free.

    Raises:
        BadInputError: the bound is too small for this number of threads, or more than is free.
    """
    workers = workers or min(MOST_THREADS, 2 * len(os.sched_getaffinity(0)))
    smallest = workers * (SMALLEST_CHUNK * bytes_per_element + BLOCK_BYTES)
    if option == "auto":
        bound, largest = max(smallest, min(MAX_AUTOMATIC, memory.usable // SHARE_OF_AVAILABLE)), LARGEST_CHUNK
    else:
        bound = parse_size(option)
        if bound < smallest:
            raise BadInputError(
                f"--memory {option} is less than {byte_size(smallest)}, which {workers} threads need",
                "give more memory or fewer --workers",
            )
    chunk = min(max(LARGEST_CHUNK, largest), (bound // workers - BLOCK_BYTES) // bytes_per_element)
    size = workers * (chunk * bytes_per_element + BLOCK_BYTES)
    beyond = max(0, size - memory.usable) if option != "auto" else 0
    if option != "auto" and bound > memory.usable and not swap:
        raise BadInputError(
            f"--memory {option} is more than is free: {memory}", "use --memory auto or less, or --swap auto"
        )
    return Buffers(workers, chunk, size, beyond)


def peak_resident() -> int:
    """Highest resident size of this process so far, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
