"""Locked environments: the files that decide what each holds, and their hash. Standard library alone."""

import hashlib
import sys
from pathlib import Path

from .errors import BadInputError

FOLDER = Path(__file__).resolve().parents[2] / "envs"
BUILDER = 2  # raise when the way of building changes what is built


def lock_files(name: str) -> list[Path]:
    """The lock, the packages to install without dependencies, our own distributions and programs, in that order."""
    lock = FOLDER / f"{name}.txt"
    if not lock.exists():
        known = sorted(p.stem for p in FOLDER.glob("*.txt") if not p.stem.endswith(".no-deps"))
        raise BadInputError(f"no environment is named {name}", f"choose one of: {', '.join(known)}")
    shim = FOLDER / "shims" / name
    sources = [path for path in sorted(shim.rglob("*")) if path.suffix in (".py", ".toml")]
    files = (lock, FOLDER / f"{name}.no-deps.txt", *sources, *programs(name))
    return [path for path in files if path.is_file()]


def programs(name: str) -> list[Path]:
    """Programs of our own that an environment holds in place of a package's."""
    return sorted((FOLDER / "bin" / name).glob("*"))


def lock_hash(name: str) -> str:
    """Hash of everything that decides what the environment holds."""
    hasher = hashlib.sha256(f"{BUILDER} {sys.version_info[:2]}".encode())
    for path in lock_files(name):
        hasher.update(path.relative_to(FOLDER).as_posix().encode() + b"\0" + path.read_bytes())
    return hasher.hexdigest()[:12]
