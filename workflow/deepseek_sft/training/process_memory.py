"""Memory of this process on its host, as the kernel and glibc count it. Imports nothing slow."""

import ctypes
import os
from pathlib import Path


class _Mallinfo2(ctypes.Structure):
    """glibc's ``struct mallinfo2`` (malloc.h), summed over all arenas."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


def resident(proc: Path = Path("/proc")) -> int:
    """Resident size now, bytes."""
    pages = int((proc / "self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def kept_by_allocator() -> int | None:
    """Bytes that were freed and that glibc keeps for later; None with another C library or before glibc 2.33."""
    look = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if look is None:
        return None
    look.restype = _Mallinfo2
    return look().fordblks
