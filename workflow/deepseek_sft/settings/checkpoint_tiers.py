"""Where checkpoints are saved, and how often: the run's folder, and a folder on each node's own disk."""

from collections.abc import Iterator

from ..saving_tiers import Saving
from .field_types import AboveZero, Positive, matching, section

# Variables are each node's own, such as $SLURMD_NODENAME; the path goes into no shell.
Folder = matching(r"^[/$][\w./@%+=,:$\{\}-]*$", "a path that begins with / or a variable of the nodes")


@section
class CheckpointTier:
    path: Folder | None = None
    """Folder on each node's own disk, such as `/local` or `$LOCAL_SCRATCH`, that outlives the job; null is the run's
    folder on the shared storage."""
    every_minutes: AboveZero | None = None
    """A checkpoint whenever this many minutes have passed since the last one there or on the shared storage; null,
    which only the shared storage may have, is `save_every_minutes`."""
    keep: Positive | None = None
    """Newest checkpoints kept there; null is `keep_checkpoints`, and 1 on the nodes' own disks."""


def problems(saving: Saving) -> Iterator[str]:
    """What is wrong with ``checkpoints``, each with its key."""
    shared = [tier for tier in saving.checkpoints if tier.path is None]
    own = [tier for tier in saving.checkpoints if tier.path is not None]
    if saving.checkpoints and len(shared) != 1:
        yield (
            "checkpoints: exactly one entry must have no path, for the shared storage: results lie there, and what is "
            "stopped or ends (another shared folder: put `results` there)"
        )
    if len(own) > 1:
        yield f"checkpoints: {own[1].path!r} is the second folder on the nodes' own disks; one is what a run can use"
    if any(tier.every_minutes is None for tier in own):
        yield "checkpoints: say every_minutes for the nodes' own disks; `plan` recommends a number"
