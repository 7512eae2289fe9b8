"""Whether the kernel has killed processes of this job for lack of memory: the control group counts them.

Slurm puts each task into a group of its own where it confines memory by control groups (``TaskPlugin=task/cgroup``).
"""

import re
from pathlib import Path


def count(proc: Path = Path("/proc"), root: Path = Path("/sys/fs/cgroup")) -> int:
    """Processes of this process's control group that were killed so far; 0 where nobody counts."""
    found = 0
    for file in _files(proc, root):
        try:
            match = re.search(r"^oom_kill (\d+)$", file.read_text(), re.MULTILINE)
        except OSError:
            continue  # no such controller, or a group that has gone
        found = max(found, int(match[1]) if match else 0)
    return found


def _files(proc: Path, root: Path) -> list[Path]:
    """Where the counts of versions 2 and 1 of control groups stand."""
    try:
        lines = (proc / "self/cgroup").read_text().splitlines()
    except OSError:
        return []
    files = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            files.append(root / path.lstrip("/") / "memory.events")
        elif "memory" in controllers.split(","):
            files.append(root / "memory" / path.lstrip("/") / "memory.oom_control")
    return files
