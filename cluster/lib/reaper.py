"""reaper.py COMMAND...: run COMMAND and keep all its descendants, daemons too, until TERM kills them at once.

The init process of a node where process namespaces are forbidden: as a "child subreaper" it inherits every orphan
below it, so that none can slip away.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36


def descendants(root: int) -> list[int]:
    """All processes below ``root``, from one look at /proc."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            children.setdefault(parent, []).append(int(folder.name))
    found: list[int] = []
    todo = [root]
    while todo:
        below = children.get(todo.pop(), [])
        found += below
        todo += below
    return found


def end_all(*_: object) -> None:
    """Kill until nobody is left: whatever a dying process leaves behind becomes our child."""
    while True:
        for pid in descendants(os.getpid()):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            os._exit(0)
        time.sleep(0.01)


def main() -> None:
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    signal.signal(signal.SIGTERM, end_all)
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGPIPE):  # ignored since a script's &, or by Python
        signal.signal(number, signal.SIG_DFL)
    if subprocess.call(sys.argv[1:]) != 0:
        end_all()
    while True:
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return  # the daemons are gone


if __name__ == "__main__":
    main()
