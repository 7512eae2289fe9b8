"""One owner per run folder: a lock file that names host, job and process, and is taken over from the dead.

``lock.json`` comes into being whole and at once (a hard link, or exclusive creation where a file system has no links).
Who finds a dead owner's takes a lock named after its very contents before removing it: several takers agree on one, and
none removes what another has just made.
"""

import contextlib
import hashlib
import json
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .. import json_files
from ..cluster_jobs import holders
from ..cluster_jobs.holders import reason_to_respect
from ..errors import BadInputError, CrashError

__all__ = ["NAME", "Held", "hold", "reason_to_respect"]
NAME = "lock.json"
UNREADABLE_S = 5.0  # a lock that cannot be read is being written; after so long its writer has died
TAKING_S = 60.0  # how long somebody else may take to remove a dead owner's lock
LINKLESS = (1, 38, 95, 45)  # EPERM, ENOSYS, EOPNOTSUPP, EL2NSYNC: the file system has no hard links


class Held:
    """A lock that this process holds, until somebody declares it dead."""

    def __init__(self, path: Path, own: dict[str, Any]):
        self.path, self.own = path, own

    def check(self) -> None:
        """Make sure that nobody has taken the lock since.

        Raises:
            CrashError: another start owns the run now, or the lock was removed.
        """
        try:
            text = self.path.read_text()
        except FileNotFoundError:
            text = ""
        except OSError:
            return  # the file system is away: nothing is known
        found = _parse(text)
        if found == self.own:
            return
        who = f"job {found.get('job_id')} on {found.get('host')}" if found else "nobody"
        raise CrashError(
            f"the run folder {self.path.parent} is no longer this start's: its lock belongs to {who}",
            "nothing: Slurm took this node for dead and started the job again elsewhere, where training goes on",
        )


@contextlib.contextmanager
def hold(folder: Path, attempt: str = "") -> Iterator[Held]:
    """Hold the lock of ``folder`` while the block runs.

    Args:
        attempt: name of the start, for ``check_attempt``.

    Raises:
        BadInputError: a living process holds it, or it cannot be told whether its holder lives.
        CrashError: only Slurm could tell, and it does not answer for minutes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _hold(folder / NAME, {"attempt": attempt}) as held:
        yield held


def check_attempt(folder: Path, attempt: str) -> None:
    """Make sure that the lock of ``folder`` is not another start's, for processes of a start that do not hold it.

    Raises:
        CrashError: it belongs to another start.
    """
    owner = (_parse(_read(folder / NAME)) or {}).get("attempt")
    if owner and owner != attempt:
        raise CrashError(f"the run folder {folder} belongs to start {owner} by now, this is {attempt}")


@contextlib.contextmanager
def _hold(path: Path, more: dict[str, Any]) -> Iterator[Held]:
    own = holders.own() | {"nonce": secrets.token_hex(8)} | more
    deadline = time.monotonic() + TAKING_S
    while not _create(path, json.dumps(own)):
        _take_over(path, deadline)
    try:
        yield Held(path, own)
    finally:
        if _parse(_read(path)) == own:
            path.unlink(missing_ok=True)


def _create(path: Path, text: str) -> bool:
    """Make the lock with its contents at once; False where there is one."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        draft.write_text(text)
        os.link(draft, path)
        return True
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in LINKLESS:
            raise
    finally:
        draft.unlink(missing_ok=True)
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    with os.fdopen(descriptor, "w") as stream:
        stream.write(text)
    return True


def _take_over(path: Path, deadline: float) -> None:
    """Remove a dead owner's lock; returns also when somebody else has done so.

    Raises:
        BadInputError: the owner lives, or may.
    """
    found = _read(path)
    written = time.monotonic() + UNREADABLE_S
    while found is not None and _parse(found) is None and time.monotonic() < written:
        time.sleep(0.1)
        found = _read(path)
    if found is None:
        return
    holder = _parse(found)
    if holder is not None and (reason := reason_to_respect(holder)):
        if path.name != NAME and time.monotonic() < deadline:  # somebody is taking the same lock over right now
            time.sleep(0.02)
            return
        raise BadInputError(
            f"run folder {path.parent} is in use: {reason} (lock since {holder.get('time')})",
            f"wait for it or stop it; if it is certainly gone, remove {path}",
        )
    with _hold(path.with_name(f"{NAME}.{hashlib.sha256(found.encode()).hexdigest()[:16]}"), {}):
        if _read(path) == found:
            path.unlink(missing_ok=True)


def _read(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return None


def _parse(text: str | None) -> dict[str, Any] | None:
    try:
        value = json_files.parse(text or "")
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
