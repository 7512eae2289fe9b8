"""Fingerprints of what must be the same on every node: code, packages, model, tokens."""

import hashlib
import importlib.metadata
import os
import platform
from pathlib import Path

WORKFLOW = Path(__file__).resolve().parents[2]
CODE = (".py", ".j2", ".sh", ".yaml")
SMALL = 1 << 22  # bytes; smaller files are hashed whole
END = 1 << 16  # bytes hashed at both ends of larger ones: a shard's header and its last tensor


def code(root: Path = WORKFLOW) -> dict[str, str]:
    """Hash of the workflow's code: a node with a stale cache of the shared folder shows here."""
    hasher = hashlib.sha256()
    for path in sorted(p for p in root.rglob("*") if p.suffix in CODE and p.is_file()):
        hasher.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return {"code": hasher.hexdigest()[:12]}


def packages() -> dict[str, str]:
    """Version of Python and of every installed package, by name."""
    found = {"Python": platform.python_version()}
    for distribution in importlib.metadata.distributions():
        name = distribution.metadata["Name"]
        if name:
            found.setdefault(name.lower(), distribution.version)
    return found


def folder(path: Path) -> str:
    """Hash over names and sizes of all files, whole small files and both ends of large ones.

    A whole hash would read 1.3 TB on every node. ``missing`` where the folder does not exist.
    """
    if not path.is_dir():
        return "missing"
    hasher = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        size = file.stat().st_size
        hasher.update(f"{file.relative_to(path).as_posix()}\0{size}\0".encode())
        with open(file, "rb") as stream:
            if size <= SMALL:
                hasher.update(stream.read())
            else:
                hasher.update(stream.read(END))
                stream.seek(-END, os.SEEK_END)
                hasher.update(stream.read(END))
    return hasher.hexdigest()[:12]
