"""The folder for checkpoints on a node's own disk: can it be written, is it large enough, is it the node's alone?

That it is the node's alone is judged twice: by the kind of its file system, and by files that all nodes leave there
before they meet in the shared folder: who finds another's has no disk of its own. Training's start looks once more.
"""

import contextlib
import os
import re
import shutil
from pathlib import Path

from .. import saving_tiers
from ..formatting import byte_size
from .findings import Finding
from .machine import occupied
from .settings import Needs

CHECK = "own_disk"
SHARED = re.compile(
    r"(nfs\d?|lustre|gpfs|beegfs|ceph|wekafs|panfs|afs|cifs|smb\d?|9p|glusterfs|orangefs|pvfs2|fuse\.(?!fuse-overlayfs).+)"
)


class OwnDisk:
    """One node's folder.

    Args:
        path: as configured.
        attempt: name of this preflight.
    """

    def __init__(self, path: str, attempt: str, rank: int):
        self._path, self._attempt, self._rank = path, attempt, rank
        self._folder: Path | None = None
        self._refused = ""
        try:
            self._folder = saving_tiers.on_this_node(path)
        except ValueError as error:
            self._refused = str(error)

    def sign(self) -> None:
        """Leave a file of 1 MiB there, written to the disk; what the disk says to it is told by ``judge``."""
        if self._folder is None:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with open(self._file(self._rank), "wb") as stream:
                stream.write(bytes(1 << 20))
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            self._refused = f"{self._folder} cannot be written: {error.strerror or error}"

    def forget(self) -> None:
        """Take the file away."""
        if self._folder is None:
            return
        with contextlib.suppress(OSError):  # the verdict is told: a disk that refuses now is training's to meet
            self._file(self._rank).unlink(missing_ok=True)

    def judge(self, needs: Needs, results: Path, met: bool, mounts: Path = Path("/proc/mounts")) -> Finding:
        """
        Args:
            results: of the experiment, whose own checkpoints there count as space.
            met: another node has left its file by now.
        """
        if self._refused or self._folder is None:
            return Finding(CHECK, False, self._refused, "unusable")
        kind = file_system(self._folder, mounts)
        if SHARED.fullmatch(kind):
            return Finding(CHECK, False, f"{self._folder} lies on {kind}, which other nodes see as well", kind)
        if kind == "overlay":
            return Finding(
                CHECK, False, f"{self._folder} lies in a container, and ends with it: mount the node's", kind
            )
        others = [
            found for found in self._folder.glob(f".preflight-{self._attempt}-*") if found != self._file(self._rank)
        ]
        if others:
            other = others[0].name.rpartition("-")[2]
            return Finding(
                CHECK, False, f"{self._folder} is no disk of its own: node {other}'s file is there", "shared"
            )
        free = shutil.disk_usage(self._folder).free
        seen = f"{kind}, {'no other node wrote there' if met else 'whether others write there was not tried'}"
        if needs.own_disk is None:
            return Finding(CHECK, None, f"{byte_size(free)} free ({seen}); no plan to compare with", byte_size(free))
        there = sum(occupied(folder) for folder in self._of_experiment(results))
        wanted = max(needs.own_checkpoint, needs.own_disk - there)
        detail = (
            f"{self._folder} ({seen}) has {byte_size(free)} free, wanted are {byte_size(wanted)} (planned "
            f"{byte_size(needs.own_disk)}, {byte_size(there)} are there already)"
        )
        return Finding(CHECK, free >= wanted, detail, byte_size(free))

    def _file(self, rank: int) -> Path:
        return self._folder / f".preflight-{self._attempt}-{rank}"

    def _of_experiment(self, results: Path) -> list[Path]:
        """What earlier starts of the experiment's runs left: folders named by run and key."""
        runs = results / "train" / "runs"
        return [found for found in self._folder.glob("*-*") if (runs / found.name.rpartition("-")[0]).is_dir()]


def file_system(folder: Path, mounts: Path = Path("/proc/mounts")) -> str:
    """Kind of the file system that a folder lies on, such as ``xfs``; ``unknown`` where the kernel does not tell."""
    place, best, kind = str(folder.resolve()), "", "unknown"
    try:
        lines = mounts.read_text(errors="replace").splitlines()
    except OSError:
        return kind
    for line in lines:
        _, point, found, *_ = [*line.split(" "), "", "", ""]
        point = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), point)
        if (place == point or place.startswith(point.rstrip("/") + "/")) and len(point) >= len(best):
            best, kind = point, found
    return kind
