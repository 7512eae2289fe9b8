"""Checks of one node by itself: memory, limits, disks."""

import os
import resource
import shutil
import tempfile
from pathlib import Path

from ..formatting import byte_size
from ..tensors import memory_bound
from .findings import Finding
from .settings import Needs, Settings

GB, MB = 10**9, 1 << 20
FILES_PER_RANK = 4  # two of each rank in a checkpoint, and its logs
SPARE_FILES = 2000


def host_memory(needs: Needs, proc: Path = Path("/proc")) -> Finding:
    """Memory that training can still get: the machine's, its control group's and Slurm's share, whichever is least."""
    found = memory_bound.measure(proc)
    free, reason = found.available, "free on the machine"
    if found.group_free is not None and found.group_free < free:
        free, reason = found.group_free, "left in the control group"
    asked = os.environ.get("SLURM_MEM_PER_NODE", "")
    if asked.isdigit() and 0 < int(asked) * MB < free:
        free, reason = int(asked) * MB, "given to the job by Slurm"
    if needs.host is None:
        return Finding("host_memory", None, f"{byte_size(free)} {reason}; no plan to compare with", byte_size(free))
    detail = f"{byte_size(free)} {reason}, the plan needs {byte_size(needs.host)}"
    return Finding("host_memory", free >= needs.host, detail, byte_size(free))


def shared_memory(settings: Settings, folder: Path = Path("/dev/shm")) -> Finding:
    """Free space of /dev/shm; 64 MB is a container's default, with which NCCL fails at its first collective."""
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return Finding("shared_memory", False, f"{folder}: {error.strerror}", "none")
    detail = f"{folder} has {byte_size(free)} free, wanted are {settings.shared_memory_gb:g} GB"
    return Finding("shared_memory", free >= settings.shared_memory_gb * GB, detail, byte_size(free))


def locked_memory(accelerator: str) -> Finding:
    """``ulimit -l`` of the job: with a limit, registering memory for InfiniBand and pinning fail in mid-run."""
    if accelerator == "cpu":
        return Finding("locked_memory", None, "nothing is pinned on CPU")
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    shown = "unlimited" if limit == resource.RLIM_INFINITY else byte_size(limit)
    detail = f"ulimit -l is {shown}, it must be unlimited (PropagateResourceLimitsExcept=MEMLOCK in slurm.conf)"
    return Finding("locked_memory", limit == resource.RLIM_INFINITY, detail, shown)


def occupied(folder: Path) -> int:
    """Bytes on disk below a folder; what vanishes meanwhile does not count."""
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(path, name)).st_blocks * 512
            except FileNotFoundError:
                continue
    return total


def disk(needs: Needs, results: Path, ranks: int) -> Finding:
    """Free space where results lie: what the plan says minus what is there already, one checkpoint at least."""
    usage = os.statvfs(results)
    free, free_files = usage.f_bavail * usage.f_frsize, usage.f_favail
    wanted_files = FILES_PER_RANK * ranks + SPARE_FILES
    if usage.f_files and free_files < wanted_files:
        detail = f"{results} has {free_files:,} inodes left, wanted are {wanted_files:,}"
        return Finding("disk", False, detail, "no inodes")
    if needs.disk is None:
        return Finding("disk", None, f"{byte_size(free)} free; no plan to compare with", byte_size(free))
    there = occupied(results)
    wanted = max(needs.checkpoint, needs.disk - there)
    detail = (
        f"{results} has {byte_size(free)} free, wanted are {byte_size(wanted)} "
        f"(planned {byte_size(needs.disk)}, {byte_size(there)} are there already)"
    )
    return Finding("disk", free >= wanted, detail, byte_size(free))


def local_disk(settings: Settings) -> Finding:
    """The folder for temporary files, in which PyTorch, Triton and Python write; it is really written to."""
    folder = Path(tempfile.gettempdir())
    free = shutil.disk_usage(folder).free
    try:
        with tempfile.TemporaryFile(dir=folder) as stream:
            stream.write(bytes(1 << 20))
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        return Finding("local_disk", False, f"writing 1 MiB to {folder} failed: {error.strerror}", "unusable")
    detail = f"{folder} has {byte_size(free)} free, wanted are {settings.local_disk_gb:g} GB"
    return Finding("local_disk", free >= settings.local_disk_gb * GB, detail, byte_size(free))
