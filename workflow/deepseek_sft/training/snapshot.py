"""A committed checkpoint of a training that goes on, held for a conversion: its files get a second name each.

Training removes old checkpoints, this one perhaps in the middle of a conversion. A hard link costs no space and no
time, and keeps the bytes until the conversion is done; training never writes into a file that it has committed.
"""

import dataclasses
import os
import shutil
from pathlib import Path

from ..cli import say
from ..engines import MARKER
from ..errors import BadInputError
from . import checkpoints
from .checkpoints import Checkpoint
from .lock import LINKLESS

NEWEST = "newest"
WHERE = "convert.checkpoint"


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """A checkpoint that is to be converted.

    Attributes:
        run: folder of the run it belongs to.
        folder: what is made of it goes here.
        held: its files under names of their own; the checkpoint itself where the file system has no links.
    """

    checkpoint: Checkpoint
    run: Path
    folder: Path
    held: Path

    def release(self) -> None:
        """Give the second names up."""
        if self.held != self.checkpoint.folder:
            shutil.rmtree(self.held, ignore_errors=True)


def find(results: Path, wanted: str) -> tuple[Path, Checkpoint]:
    """Run and checkpoint that are meant: of the run that was started last, or of another that alone has it.

    Args:
        results: ``results/<experiment>``.
        wanted: ``newest`` or ``step_<N>``.

    Raises:
        BadInputError: there is none, with those that there are.
    """
    runs = sorted((results / "train" / "runs").glob("*/settings.json"), key=lambda file: -file.stat().st_mtime_ns)
    found = {file.parent: checkpoints.committed(file.parent, file.parent.name) for file in runs}
    for run, there in found.items():
        if there and wanted == NEWEST:
            return run, there[-1]
        for checkpoint in there:
            if checkpoint.folder.name == wanted:
                return run, checkpoint
    names = ", ".join(one.folder.name for there in found.values() for one in there) or "none yet"
    raise BadInputError(
        f"{WHERE}: no run of {results} holds a committed checkpoint {wanted}", f"there are: {names}; or write newest"
    )


def hold(results: Path, wanted: str) -> Snapshot:
    """Find a checkpoint and hold it.

    Raises:
        BadInputError: there is none, or training removed it meanwhile.
    """
    run, checkpoint = find(results, wanted)
    folder = results / "snapshots" / f"{run.name}-{checkpoint.folder.name}"
    held = folder / checkpoint.folder.name
    shutil.rmtree(held, ignore_errors=True)  # of a conversion that was killed
    held.mkdir(parents=True)
    try:
        for name in [*checkpoint.marker["files"], MARKER]:  # the marker last: before it, it is no checkpoint
            (held / name).parent.mkdir(parents=True, exist_ok=True)
            os.link(checkpoint.folder / name, held / name)
    except FileNotFoundError as error:
        shutil.rmtree(held, ignore_errors=True)
        raise BadInputError(
            f"training removed {checkpoint.folder} meanwhile ({Path(str(error.filename)).name})",
            f"take a newer one: {WHERE}: newest",
        ) from None
    except OSError as error:
        shutil.rmtree(held, ignore_errors=True)
        if error.errno not in LINKLESS:
            raise
        say(f"warning: {error.strerror}: no links on this file system, so that training may remove it meanwhile")
        held = checkpoint.folder
    return Snapshot(checkpoint, run, folder, held)
