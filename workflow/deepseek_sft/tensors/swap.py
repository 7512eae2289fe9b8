"""A swap file for the time of one run, for a memory bound above the memory that is free.

It is made only on request, only as large as the bound exceeds what is free, and removed at the end. Before it exists a
record ``<output>.swap-<host>-<pid>.json`` says so; if the process dies, the next run on that host finds the record,
switches that file off and removes it. Only files that such a record names are ever touched.
"""

import contextlib
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from .. import cli, files, json_files
from ..errors import BadInputError
from ..formatting import byte_size
from .memory_bound import Memory

FILE_SYSTEMS = ("ext2", "ext3", "ext4", "xfs")  # local ones on which the kernel swaps to a file as it is
RESERVE = 64 << 20  # beyond what is needed: the kernel's own pages, the header, rounding
PROC = Path("/proc")
TOOLS = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"))


@dataclass(frozen=True)
class Record:
    """What a run writes down before it makes a swap file.

    Attributes:
        path: the swap file.
        boot: id of the host's boot: after a reboot no swap file of ours is in use.
        started: when the process started, in clock ticks since then: a pid alone may be another process by now.
    """

    path: str
    host: str
    boot: str
    pid: int
    started: int


def _boot() -> str:
    return (PROC / "sys/kernel/random/boot_id").read_text().strip()


def _started(pid: int) -> int | None:
    try:
        return int((PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None


def _active(path: str) -> bool:
    lines = (PROC / "swaps").read_text().splitlines()[1:]
    return any(line.split()[0].replace("\\040", " ") == path for line in lines)


def _tool(name: str, *arguments: str) -> None:
    program = shutil.which(name, path=TOOLS)
    if program is None:
        raise BadInputError(
            f"--swap auto needs {name}, which is not installed", "install util-linux, or lower --memory"
        )
    done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise BadInputError(
            f"{name} failed: {(done.stderr or done.stdout).strip()}",
            "lower --memory so that no swap is needed, or ask for the permission",
        )


def file_system(folder: Path) -> str:
    """Type of the file system that a folder lies on."""
    place, best = str(folder.resolve()), ("", "")
    for line in (PROC / "self/mounts").read_text().splitlines():
        _, point, kind, *_ = line.split()
        point = point.replace("\\040", " ")
        inside = point == "/" or place == point or place.startswith(point + "/")
        if inside and len(point) >= len(best[0]):
            best = (point, kind)
    return best[1]


def _check(size: int, folder: Path, memory: Memory) -> None:
    """
    Raises:
        BadInputError: no swap file of this size can help here, and why.
    """
    advice = "lower --memory; streaming itself needs no swap"
    if memory.group_swap is not None and memory.group_swap < size:
        raise BadInputError(
            f"--swap auto needs {byte_size(size)} of swap, the control group allows {byte_size(memory.group_swap)}",
            f"{advice}, or ask for a job with more memory",
        )
    if os.geteuid() != 0:
        raise BadInputError("--swap auto must be root to switch a swap file on", advice)
    if not folder.is_dir():
        raise BadInputError(f"the folder for the swap file, {folder}, does not exist", "give another --swap-folder")
    if (kind := file_system(folder)) not in FILE_SYSTEMS:
        raise BadInputError(
            f"{folder} is on {kind}, where no swap file can be", f"give a --swap-folder on {', '.join(FILE_SYSTEMS)}"
        )
    if (free := shutil.disk_usage(folder).free) < size + RESERVE:
        raise BadInputError(f"{folder} has {byte_size(free)} free, the swap file needs {byte_size(size)}", advice)


def _remove(record: Record, place: Path) -> None:
    if _active(record.path):
        _tool("swapoff", record.path)
    Path(record.path).unlink(missing_ok=True)
    place.unlink(missing_ok=True)


def _records(output: Path) -> list[Path]:
    prefix = f"{output.name}.swap-"
    folder = output.parent
    return sorted(p for p in folder.iterdir() if p.name.startswith(prefix)) if folder.is_dir() else []


def remove_stale(output: Path) -> None:
    """Remove the swap files that earlier runs for this output left on this host when they died.

    Raises:
        BadInputError: one is still on and cannot be switched off.
    """
    for place in _records(output):
        try:
            record = Record(**json_files.load(place))
        except (OSError, ValueError, TypeError) as error:
            cli.say(f"warning: {place} cannot be read ({error}); look for a swap file yourself: swapon --show")
            continue
        if record.host != socket.gethostname():
            cli.say(f"warning: {place}: a run on {record.host} may have left {record.path}; a run there removes it")
        elif record.boot == _boot() and _started(record.pid) == record.started:
            cli.say(f"swap file {record.path} belongs to process {record.pid}, which is running")
        else:
            _remove(record, place)
            cli.say(f"removed the swap file {record.path}, left by process {record.pid}")


@contextlib.contextmanager
def provided(needed: int, output: Path, folder: Path, memory: Memory) -> Iterator[None]:
    """Have ``needed`` bytes of swap inside the block: what is there already, or else a file for the rest.

    Args:
        needed: bytes; 0 for none.
        output: the folder that the run makes; the record lies beside it.
        folder: where the swap file goes.
        memory: what was measured.

    Raises:
        BadInputError: no swap can be had, and why.
    """
    missing = max(0, needed - memory.usable_swap)
    if not missing:
        if needed:
            cli.say(f"swap: {byte_size(needed)} of the {byte_size(memory.usable_swap)} that are free may be used")
        yield
        return
    missing += RESERVE
    missing += -missing % os.sysconf("SC_PAGE_SIZE")
    _check(missing, folder, memory)
    host, pid = socket.gethostname(), os.getpid()
    path = folder.resolve() / f"deepseek-sft-{host}-{pid}.swap"
    record = Record(str(path), host, _boot(), pid, _started(pid) or 0)
    place = output.with_name(f"{output.name}.swap-{host}-{pid}.json")
    files.write_json(place, asdict(record))
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:  # a file that exists is another run's, perhaps of a host with the same name: leave it
        place.unlink(missing_ok=True)
        raise BadInputError(f"{path} cannot be made: {error.strerror}", "give another --swap-folder") from None
    try:
        _make(descriptor, path, missing)
        cli.say(f"swap: {byte_size(missing)} in {path} until this run ends")
        yield
    finally:
        _remove(record, place)


def _make(descriptor: int, path: Path, size: int) -> None:
    """Turn the empty file behind ``descriptor``, which is closed, into swap that is on."""
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        raise BadInputError(f"{path} cannot be made: {error.strerror}", "give another --swap-folder") from None
    finally:
        os.close(descriptor)
    _tool("mkswap", str(path))
    _tool("swapon", str(path))
