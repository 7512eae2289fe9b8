"""Names of files that are not finished yet, and the removal of those that killed runs left.

One place for all of them, by who writes and who removes:

``.<name>.<pid>@<host>.tmp``   every small or growing file, ``files.atomic_open``: at the next start, see ``sweep``
``.writable.<pid>@<host>.tmp`` probe of a folder, ``files.require_writable``: the same
``<output>.incomplete``, ``<shard>.part``, progress beside them: conversion and dequantisation go on from them
``<tokens>.incomplete``        tokens: removed when ``tokenize_data`` starts
``step_<N>`` without a marker  a checkpoint: set aside when training starts, removed after the next commit
``.swap.…``                    swap files of conversions: ``tensors/swap.py``, at the next start on that host
"""

import contextlib
import os
import re
import socket
import time
from collections.abc import Iterable
from pathlib import Path

FORM = re.compile(r"\..+\.(?P<pid>\d+)(@(?P<machine>[^@/]+))?\.tmp")
FIRST_NAMESPACE = "pid:[4026531836]"  # PROC_PID_INIT_INO, include/linux/proc_ns.h
LONGEST = 255  # bytes of a name
DAY = 86400.0  # seconds


def machine() -> str:
    """What a process id belongs to: this host, or this container of it."""
    try:
        space = str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        space = FIRST_NAMESPACE
    return socket.gethostname() + ("" if space == FIRST_NAMESPACE else "-" + re.sub(r"\D", "", space))


def temporary(path: Path) -> Path:
    """The name beside ``path`` under which this process writes it."""
    ending = f".{os.getpid()}@{machine()}.tmp"
    name = path.name
    while len(os.fsencode(name)) + len(os.fsencode(ending)) + 1 > LONGEST and len(name) > 1:
        name = name[:-1]
    return path.with_name(f".{name}{ending}")


def sweep(folders: Iterable[Path]) -> list[Path]:
    """Remove what dead processes of this machine left in some folders (not below them); returns what was removed.

    Whether a process of another machine lives cannot be seen here: its files go once nothing was written to them for
    a day. What cannot be removed stays.
    """
    removed = []
    for folder in dict.fromkeys(folders):
        for path in _temporaries(folder):
            if not _is_dead(path):
                continue
            with contextlib.suppress(OSError):
                path.unlink()
                removed.append(path)
    return removed


def _temporaries(folder: Path) -> list[Path]:
    try:
        return [Path(entry) for entry in os.scandir(folder) if FORM.fullmatch(entry.name) and entry.is_file()]
    except OSError:
        return []


def _is_dead(path: Path) -> bool:
    form = FORM.fullmatch(path.name)
    with contextlib.suppress(OSError):
        if form["machine"] == machine() and not Path("/proc", form["pid"]).exists():
            return True
        return time.time() - path.stat().st_mtime > DAY
    return False
