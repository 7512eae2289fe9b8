"""Fingerprints of what must be the same on every node: code, packages, model, tokens; and whether packages import."""

import contextlib
import hashlib
import importlib.metadata
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from .. import engines, local_copies
from ..cli import say
from ..printable import visible
from ..python_path import with_library

WORKFLOW = Path(__file__).resolve().parents[2]
SMALL = 1 << 22  # bytes; smaller files are hashed whole
IMPORT_S = 600.0  # of a cold shared folder
END = 1 << 16  # bytes hashed at both ends of larger ones: a shard's header and its last tensor


def code(root: Path = WORKFLOW) -> dict[str, str]:
    """Hash of the workflow's code: a node with a stale cache of the shared folder shows here."""
    return {"code": local_copies.code_hash(root)}


def packages() -> dict[str, str]:
    """Version of Python and of every installed package, by name."""
    found = {"Python": platform.python_version()}
    for distribution in importlib.metadata.distributions():
        name = distribution.metadata["Name"]
        if name:
            found.setdefault(name.lower(), distribution.version)
    return found


def import_error(
    more: Iterable[str] = (),
    python: str = sys.executable,
    memory: Path | None = None,
    engine: str = engines.DEFAULT,
    limit_s: float = IMPORT_S,
    variables: Mapping[str, str] | None = None,
) -> str:
    """What goes wrong when everything is imported that the engine's ranks import; empty where nothing does.

    Tried in a process of its own, on whatever device there is.

    Args:
        more: further modules.
        python: interpreter to try.
        engine: whose ranks.
        memory: folder of this node that remembers environments that passed; None for one below that of temporary files.
        limit_s: seconds to wait.
        variables: further environment variables.
    """
    words = [engines.ENGINES[engine].imports, "cuda", *more]
    environment = os.environ | (variables or {})
    environment["PYTHONPATH"] = with_library(environment)
    passed = (memory or _memory()) / _digest(python, environment["PYTHONPATH"], words)
    if passed.exists():
        return ""
    say(f"trying whether {python} imports what training does, once for this environment: up to a minute")
    try:
        done = subprocess.run(
            [python, "-m", *words],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=limit_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"what training imports is not there after {limit_s:.0f} s"
    except OSError as error:
        return f"{python} cannot be started: {error.strerror}"
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        return f"training cannot be imported: {visible(said[-1][:300]) if said else f'exit code {done.returncode}'}"
    with contextlib.suppress(OSError):  # what cannot be remembered is tried again
        passed.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        passed.touch()
    return ""


def _memory() -> Path:
    return Path(tempfile.gettempdir(), f"deepseek-sft-{os.getuid()}", "imports")


def _digest(python: str, python_path: str, words: list[str]) -> str:
    """Of an interpreter, the folders that its packages lie in, its path, our code and the words."""
    folders = sorted(Path(python).parent.parent.glob("lib/python*/site-packages"))
    times = [f"{folder} {folder.stat().st_mtime_ns}" for folder in folders]
    return hashlib.sha256("\0".join([python, python_path, *times, code()["code"], *words]).encode()).hexdigest()[:16]


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
