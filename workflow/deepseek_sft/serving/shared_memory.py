"""Segments that serving processes leave in /dev/shm, found by what the processes have mapped, never by name.

Names do not tell whose a segment is: every Python program's segments are called ``psm_*`` and its semaphores
``sem.mp-*``. Nor does /proc/PID/maps give them all: glibc maps a semaphore under a temporary name that it then links to
the final one. The inode is the same in both places.
"""

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

import psutil

SHARED_MEMORY = Path("/dev/shm")


def mapped_inodes(pid: int) -> set[int]:
    """Inodes of files in /dev/shm that a process has mapped; none where it has ended or is not ours to look at."""
    inodes = set()
    prefix = f"{SHARED_MEMORY}/"
    with contextlib.suppress(OSError), open(f"/proc/{pid}/maps", encoding="utf-8", errors="replace") as maps:
        for line in maps:
            if prefix in line:
                inodes.add(int(line.split(maxsplit=5)[4]))
    return inodes


class Segments:
    """The segments of this program's descendants.

    ``observe`` must be called now and then while they live: afterwards nothing tells whose a segment was.
    """

    def __init__(self) -> None:
        self._before = {entry.inode() for entry in _entries()}
        self._seen: set[int] = set()

    def observe(self, descendants: Iterable[psutil.Process]) -> None:
        """Remember what this program's descendants have mapped right now."""
        for process in descendants:
            self._seen |= mapped_inodes(process.pid)

    def remove(self) -> list[str]:
        """Once they have ended, remove what they left, unless another process uses it; returns the names."""
        left = {entry.name: entry.inode() for entry in _entries() if entry.inode() in self._seen - self._before}
        if not left:
            return []
        used = _inodes_in_use(psutil.pids())
        names = sorted(name for name, inode in left.items() if inode not in used)
        for name in names:
            (SHARED_MEMORY / name).unlink(missing_ok=True)
        return names


def _entries() -> list[os.DirEntry]:
    """Files of this user in /dev/shm."""
    found = []
    with contextlib.suppress(OSError), os.scandir(SHARED_MEMORY) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):
                if entry.is_file(follow_symlinks=False) and entry.stat(follow_symlinks=False).st_uid == os.getuid():
                    found.append(entry)
    return found


def _inodes_in_use(pids: Iterable[int]) -> set[int]:
    used = set()
    for pid in pids:
        used |= mapped_inodes(pid)
        with contextlib.suppress(OSError):
            for descriptor in os.scandir(f"/proc/{pid}/fd"):
                with contextlib.suppress(OSError):
                    if str(Path(descriptor.path).readlink()).startswith(f"{SHARED_MEMORY}/"):
                        used.add(descriptor.stat().st_ino)
    return used
