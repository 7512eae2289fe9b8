"""Files that are either complete or absent, and fingerprints that tell whether they changed."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from . import environment_faults, leftovers
from .errors import BadInputError

LFS_POINTER = b"version https://git-lfs"  # how the text begins that git keeps in place of a large file
SAMPLED_ABOVE = 1 << 30  # bytes; larger files are fingerprinted by size and sampled blocks
SAMPLE_BLOCKS = 64
SAMPLE_BLOCK_SIZE = 1 << 20


def fsync_directory(path: Path) -> None:
    """Make a rename inside ``path`` durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_open(path: str | Path, mode: str = "w", **options: Any) -> Iterator[IO[Any]]:
    """Open a temporary file beside ``path`` that takes its name only once written and synced.

    On an exception the temporary file is removed and ``path`` is untouched.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = leftovers.temporary(path)
    if "b" not in mode:
        options.setdefault("encoding", "utf-8")
    try:
        with open(temporary, mode, **options) as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
        fsync_directory(path.parent)
    except BaseException as error:
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # of writes and syncs, which name none
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def write_text(path: str | Path, text: str) -> None:
    """Write ``text`` to ``path`` atomically."""
    with atomic_open(path) as stream:
        stream.write(text)


def write_json(path: str | Path, value: Any) -> None:
    """Write ``value`` as indented JSON to ``path`` atomically; non-finite numbers are refused."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal settings give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def digest(value: Any, length: int = 12) -> str:
    """Short sha256 of a value's canonical JSON."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:length]


def fingerprint_file(path: str | Path, full: bool = False) -> str:
    """``sha256:…`` of a file, or ``sampled:…`` over size and evenly spaced blocks above 1 GiB."""
    path = Path(path)
    size = path.stat().st_size
    hasher = hashlib.sha256()
    with open(path, "rb") as stream:
        if full or size <= SAMPLED_ABOVE:
            while block := stream.read(1 << 22):
                hasher.update(block)
            return f"sha256:{hasher.hexdigest()}"
        hasher.update(str(size).encode())
        last = size - SAMPLE_BLOCK_SIZE
        for i in range(SAMPLE_BLOCKS):
            stream.seek(last * i // (SAMPLE_BLOCKS - 1))
            hasher.update(stream.read(SAMPLE_BLOCK_SIZE))
    return f"sampled:{hasher.hexdigest()}"


def fingerprint(path: str | Path, full: bool = False) -> str:
    """Fingerprint of a file, or of all regular files below a folder (names and contents)."""
    path = Path(path)
    if path.is_file():
        return fingerprint_file(path, full)
    hasher = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        hasher.update(f"{file.relative_to(path).as_posix()}\0{fingerprint_file(file, full)}\n".encode())
    return f"tree:{hasher.hexdigest()}"


def refuse_pointer(path: Path) -> None:
    """
    Raises:
        BadInputError: the file cannot be read, or is git-lfs's pointer to the file that is meant.
    """
    try:
        with open(path, "rb") as stream:
            start = stream.read(len(LFS_POINTER))
    except OSError as error:
        raise BadInputError(
            f"{path} cannot be read: {error.strerror}", "fetch it, or have its permissions mended"
        ) from None
    if start == LFS_POINTER:
        raise BadInputError(f"{path} is a git-lfs pointer, not the file itself", "fetch it with `git lfs pull`")


def require_writable(*paths: Path | None) -> None:
    """Find out before any work whether something can be made under these names; None is passed over.

    A file is made and removed in the nearest folder above that exists: permissions alone do not tell of read-only
    mounts, of quotas of files, or of what root may do. What killed processes left beside them is removed.

    Raises:
        BadInputError: naming the folder and why it cannot be written.
    """
    for path in filter(None, paths):
        folder = Path(path).absolute().parent
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        leftovers.sweep([folder])
        probe = leftovers.temporary(folder / "writable")
        try:
            probe.touch()
            probe.unlink(missing_ok=True)
        except OSError as error:
            raise BadInputError(
                f"{path} cannot be written: {folder}: {error.strerror or error}; "
                f"{environment_faults.free_space(folder)}",
                environment_faults.WRITABLE,
            ) from None
