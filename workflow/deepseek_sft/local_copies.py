"""Where a stage's environment and our code lie on a node's own disk, and the archive they come from.

An import of torch, DeepSpeed and xtuner asks the file system 168,000 times where something is; 256 ranks that ask a
shared folder at the same moment wait for minutes. Unpacked by ``workflow/scripts/local_copies.sh``, once a node.
"""

import dataclasses
import hashlib
import os
from pathlib import Path

from . import locks

KINDS = ("tar", "squashfs")
WORKFLOW = Path(__file__).resolve().parents[1]


@dataclasses.dataclass(frozen=True)
class LocalCopies:
    """Paths of a stage that runs from its node's own disk.

    Attributes:
        archive: of the environment, on the shared storage.
        environment, code: folders on each node, named by what they hold.
    """

    archive: str
    environment: str
    code: str

    @property
    def python(self) -> str:
        return f"{self.environment}/bin/python"

    @property
    def scripts(self) -> str:
        return f"{self.code}/workflow/scripts"


def copies_of(name: str, kind: str, folder: str) -> LocalCopies:
    """Copies of locked environment ``name`` and of this checkout's code.

    Args:
        kind: one of ``KINDS``.
        folder: on the nodes' own disks.
    """
    root = f"{folder.rstrip('/')}/deepseek-sft-{os.getuid()}"
    return LocalCopies(archive_of(name, kind), f"{root}/{name}-{locks.lock_hash(name)}", f"{root}/code-{code_hash()}")


def archive_of(name: str, kind: str) -> str:
    """The archive's path, from the project's folder."""
    return f".envs/{name}.{kind}"


def code_hash(workflow: Path = WORKFLOW) -> str:
    """Hash of every file of the workflow folder, compiled ones left out."""
    hasher = hashlib.sha256()
    for path in sorted(workflow.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            hasher.update(path.relative_to(workflow).as_posix().encode() + b"\0" + path.read_bytes())
    return hasher.hexdigest()[:12]
