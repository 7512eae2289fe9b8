"""What is finished of a model folder that is being written, so that a restart or another node knows.

Beside ``<output>.incomplete`` lies ``<output>.progress``::

    state.json          {"format", "identity"}: what the model is made from and how
    lock                held exclusively by a run that writes everything, shared by runs that write a share
    <file>.json         {"identity", "non_finite", "note"}: written once that file is synced and has its name

Everything carries the identity's digest: what was left by a run with other inputs never counts.
"""

import contextlib
import fcntl
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import cli, files, json_files
from ..errors import BadInputError
from .safetensors_files import Shard

STATE, LOCK = "state.json", "lock"
FORMAT = 2
PATIENCE_S = 60  # for another node that is just beginning the same folder


def difference(found: dict[str, Any], wanted: dict[str, Any]) -> str | None:
    """What differs between two identities, for people; None if nothing does."""
    changed = [key for key in {**wanted, **found} if found.get(key) != wanted.get(key)]
    return "; ".join(f"{key} was {found.get(key)!r}, is {wanted.get(key)!r}" for key in changed) or None


@dataclass(frozen=True)
class Finished:
    """One finished file: its non-finite values by tensor, and what the writer noted about it."""

    non_finite: dict[str, int]
    note: Any


@dataclass(frozen=True)
class ProgressFolder:
    """The folders of one output while it is being made.

    Attributes:
        output: the final folder.
        identity: what it is made from.
    """

    output: Path
    identity: dict[str, Any]

    @property
    def incomplete(self) -> Path:
        return self.output.with_name(self.output.name + ".incomplete")

    @property
    def folder(self) -> Path:
        return self.output.with_name(self.output.name + ".progress")

    @property
    def _digest(self) -> str:
        return files.digest(self.identity, 64)

    # ---- who may write

    @contextlib.contextmanager
    def locked(self, shared: bool, replace: bool) -> Iterator[None]:
        """Begin or continue: the folders exist, belong to this identity, and nobody else writes the same files.

        The lock goes with the process. File systems without locks go without, and this is said.

        Raises:
            BadInputError: another run writes here, or one with other inputs began and ``replace`` is false.
        """
        self.incomplete.mkdir(parents=True, exist_ok=True)
        self.folder.mkdir(exist_ok=True)
        # NFS refuses a shared lock on what is not open for reading, and an exclusive one on what is not for writing
        with open(self.folder / LOCK, "a+", encoding="utf-8") as stream:
            deadline = time.monotonic() + (PATIENCE_S if shared else 0)
            while not self._begin(stream.fileno(), shared, replace):
                if time.monotonic() > deadline:
                    raise BadInputError(f"another process is writing {self.incomplete}", "wait for it, or stop it")
                time.sleep(0.2)
            yield

    def _begin(self, descriptor: int, shared: bool, replace: bool) -> bool:
        """Take the lock; whoever finds the folder new or of another identity needs it alone for a moment."""
        alone = not shared or self._stored_difference(replace) is not None
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            cli.say(f"warning: {self.folder} cannot be locked ({error.strerror}); do not start this twice")
        if self._stored_difference(replace) is not None:
            if not alone:
                fcntl.flock(descriptor, fcntl.LOCK_UN)
                return False
            files.write_json(self.folder / STATE, {"format": FORMAT, "identity": self.identity})
        if alone and shared:
            with contextlib.suppress(OSError):  # no locks here, which was said above
                fcntl.flock(descriptor, fcntl.LOCK_SH)
        return True

    def _stored_difference(self, replace: bool) -> str | None:
        """Why ``state.json`` is not this run's; None if it is."""
        path = self.folder / STATE
        try:
            state = json_files.load(path)
            found = difference(state["identity"], self.identity)
        except FileNotFoundError:
            return "nothing was begun"
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadInputError(f"{path} cannot be read: {error!r}", f"delete {self.folder}") from None
        if found and not replace:
            raise BadInputError(
                f"{self.incomplete} was begun from other inputs: {found}",
                f"delete it and {self.folder}, or let them be replaced: --replace",
            )
        return found

    # ---- what is finished

    def finished(self, shard: Shard) -> Finished | None:
        """What is known about a finished file; None if it has to be written."""
        path = self.incomplete / shard.name
        try:
            mark = json_files.load(self.folder / f"{shard.name}.json")
            if mark["identity"] == self._digest and path.stat().st_size == shard.size:
                return Finished(mark["non_finite"], mark["note"])
        except (OSError, ValueError, KeyError, TypeError):
            pass  # no mark, a damaged one, or no file: it is written again
        return None

    def finish(self, shard: Shard, finished: Finished) -> None:
        """Note a file that is synced and has its name."""
        mark = {"identity": self._digest, "non_finite": finished.non_finite, "note": finished.note}
        files.write_json(self.folder / f"{shard.name}.json", mark)

    def discard(self, names: set[str]) -> None:
        """Have these files written again by the next run."""
        for name in names:
            (self.folder / f"{name}.json").unlink(missing_ok=True)

    def remove_leftovers(self, kept: set[str]) -> None:
        """Remove everything but ``kept`` finished files from the incomplete folder; only with the exclusive lock."""
        for path in self.incomplete.iterdir():
            if path.name not in kept:
                path.unlink()
        for path in self.folder.iterdir():
            if path.name not in (STATE, LOCK) and path.name.removesuffix(".json") not in kept:
                path.unlink()

    def remove(self) -> None:
        """Forget the progress of a completed output."""
        shutil.rmtree(self.folder, ignore_errors=True)
