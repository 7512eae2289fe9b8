"""Faults of the machine and its file systems, in one sentence: what failed, where, how much space is free, what to do.

A full disk is not a defect of the workflow, whichever line of it was the first to notice. One place knows the kinds;
``cli.run`` asks it about every error that no stage has put into words.
"""

import errno
import io
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .errors import BadInputError

WRITABLE = "give a folder that you may write in, on a file system that is neither full nor read-only"
SPACE = "free space there (`make status` says what lies where), or give another folder; then run the same command again"
MENDED = "have the permissions mended, or give a folder that you may use"
AGAIN = "look at the storage (dmesg), have it mounted again; then the same command"
KINDS: dict[int, tuple[str, str]] = {
    errno.ENOSPC: ("no space is left", SPACE),
    errno.EDQUOT: ("your quota is used up", "free space or files there, or have it raised; then the same command"),
    errno.EFBIG: ("the file is larger than the file system or `ulimit -f` allows", "raise the limit"),
    errno.EROFS: ("the file system is read-only", WRITABLE),
    errno.EACCES: ("permission is denied", MENDED),
    errno.EPERM: ("the operation is not permitted", MENDED),
    errno.ESTALE: ("the file handle is stale, the server has lost what lay there", "run the same command again"),
    errno.ENAMETOOLONG: ("the name is too long", "give a shorter name (experiment, results, output)"),
    errno.EIO: ("the device reports an input/output error", AGAIN),
    errno.ENODEV: ("the device is gone", AGAIN),
    errno.ENXIO: ("the device is gone", AGAIN),
    errno.ENOTCONN: ("the file system's server does not answer", AGAIN),
    errno.EREMOTEIO: ("the file system's server reports an error", AGAIN),
    errno.ENOTDIR: ("a part of the path is no folder", "remove or rename what is in the way"),
    errno.EISDIR: ("a folder has the name of a file", "remove or rename what is in the way"),
    errno.ELOOP: ("symbolic links lead in a circle", "mend the links"),
    errno.EMFILE: ("too many files are open in this process", "raise `ulimit -n`"),
    errno.ENFILE: ("too many files are open on this machine", "use another node, or ask who looks after it"),
    errno.ETXTBSY: ("the file is being run", "stop the program that runs it"),
    errno.ENOMEM: ("the machine has no memory left", "raise `mem_mb` of this rule in the profile"),
}
PROBE = 4 << 20  # bytes


def explain(error: BaseException) -> BadInputError | None:
    """The error for the person who must act; None where neither the error nor what it came from is of the environment.

    Errors that were raised while a disk was full may hide it (a library's own words): their causes are looked at too.
    """
    for one in _chain(error):
        if isinstance(one, OSError) and one.errno in KINDS:
            return _sentence(one.errno, _path_of(one))
    return None


def in_words(error: BaseException) -> str:
    """An error as a message: of the environment explained, others as they are."""
    return str(explain(error) or error)


def probe(folder: Path) -> BadInputError | None:
    """Why nothing can be written in a folder now; None if something can.

    Says what killed processes could not: a full disk takes their last words as well.
    """
    error = refusal(folder)
    return _sentence(error.errno, str(folder)) if error is not None and error.errno in KINDS else None


def refusal(folder: Path) -> OSError | None:
    """What the file system says to something written in a folder now; None where it takes it.

    For libraries that do not say why they could not write.
    """
    try:
        with tempfile.TemporaryFile(dir=folder, buffering=0) as stream:
            os.posix_fallocate(stream.fileno(), 0, PROBE)
            stream.write(bytes(1 << 12))
            os.fsync(stream.fileno())
    except OSError as error:
        return OSError(error.errno, os.strerror(error.errno), str(folder)) if error.errno else error
    return None


def free_space(path: str | Path) -> str:
    """Free space where a path lies, in words; empty where it cannot be known."""
    place = Path(path).absolute()
    for folder in (place, *place.parents):
        try:
            usage = shutil.disk_usage(folder)
        except OSError:
            continue
        gib = 1 << 30
        return f"{usage.free / gib:.2f} of {usage.total / gib:.2f} GiB are free there"
    return ""


def _sentence(code: int, path: str) -> BadInputError:
    what, fix = KINDS[code]
    space = free_space(path) if path else ""
    place = f"{path or 'a file'}: {what} ({os.strerror(code)})"
    return BadInputError(f"{place}; {space}" if space else place, fix)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _path_of(error: OSError) -> str:
    """The file that an error is about; of a write to an open file, which names none, the file in the failed call."""
    if error.filename is not None:
        name = error.filename2 if error.errno in (errno.EXDEV, errno.ENOSPC) and error.filename2 else error.filename
        return os.fsdecode(name) if isinstance(name, str | bytes | os.PathLike) else str(name)
    frames, trace = [], error.__traceback__
    while trace is not None:
        frames.append(trace.tb_frame)
        trace = trace.tb_next
    for frame in reversed(frames):
        for value in frame.f_locals.values():
            if isinstance(value, io.IOBase) and isinstance(name := getattr(value, "name", None), str):
                return name
    for frame in reversed(frames):
        for value in frame.f_locals.values():
            if isinstance(value, Path) and value.is_absolute():
                return str(value)
    return ""
