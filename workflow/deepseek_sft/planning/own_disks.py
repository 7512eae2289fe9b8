"""Checkpoints on the nodes' own disks (``train.checkpoints``): what they take, and what a failure costs with them."""

from dataclasses import dataclass
from typing import Any

from . import checkpoint_cost
from .checkpoint_cost import SURVIVED, cadence
from .duration import OPTIMIZER, Duration
from .settings import Cluster, Training
from .terms import show

WORTH = 0.005  # of the GPU hours; below it the plan does not speak of disks that are not used


@dataclass(frozen=True)
class OwnDisks:
    """A checkpoint on the nodes' disks.

    Attributes:
        bytes: of a node's own files.
        disk: bytes of a node's disk: own files and copies of all that are kept, and of the one being written.
        writing_s: writing the own files and a copy of the neighbour's.
        stop_s: for which one keeps the GPUs from steps, with the fastest and the slowest step; None where not known.
        every_s, best_s: between two of them as configured, and as loses the least time.
        reading_s: reading them back at a start.
        after_failure_s: work lost by a failure on average, and reading, with these and with the shared storage alone.
        lost: share of the time that saving and failures take, with these and with the shared storage alone, each at
            its best cadence.
    """

    bytes: float
    disk: float
    writing_s: float
    stop_s: list[float] | None
    every_s: float
    best_s: float
    reading_s: float
    after_failure_s: tuple[float, float]
    lost: tuple[float, float]


def of(training: Training, cluster: Cluster, found: Duration, checkpoint: float) -> OwnDisks | None:
    """
    Args:
        checkpoint: bytes of all ranks' files.

    Returns:
        as configured, or as they could be; None for a single node without the setting, which has no neighbour.
    """
    if cluster.nodes == 1 and not training.checkpoints:
        return None
    own, copies = checkpoint / cluster.nodes, min(2, cluster.nodes)
    writing, reading = checkpoint_cost.writing_on_nodes(cluster, checkpoint), own / (cluster.local_gb_per_second * 1e9)
    stop = checkpoint_cost.stops_for_nodes(training, cluster, checkpoint, _beside(found)) if found.step else None
    costs, often = max(stop or (writing,)), writing if training.saves_beside_steps else 0.0
    shared, rarely = max(found.stop_s or (found.checkpoint_s,)), found.checkpoint_s if often else 0.0
    share = SURVIVED if copies > 1 else 0.0
    best, alone = cadence(costs, found.mtbf_s, often), cadence(shared, found.mtbf_s, rarely)
    rare = cadence(shared, found.mtbf_s / (1 - share), rarely)
    every = training.checkpoints.every_s if training.checkpoints else best
    after = every / 2 + reading, max(found.saving_s or (alone,)) / 2 + found.loading_s
    again = share * (best / 2 + reading) + (1 - share) * (rare / 2 + found.loading_s)
    lost = (
        costs / best + shared / rare + again / found.mtbf_s,
        shared / alone + (alone / 2 + found.loading_s) / found.mtbf_s,
    )
    keep = training.checkpoints.keep if training.checkpoints else 1
    return OwnDisks(own, copies * (keep + 1) * own, writing, stop, every, best, reading, after, lost)


def _beside(found: Duration) -> tuple[float, float]:
    """Seconds of a step's forward and backward passes, fastest and slowest."""
    update = next((part for part in found.parts if part.name == OPTIMIZER), None)
    ends = (update.fastest, update.slowest) if update else (0.0, 0.0)
    return found.step.fastest - ends[0], found.step.slowest - ends[1]


def lines(found: OwnDisks | None, training: Training, cluster: Cluster) -> list[str]:
    """For the plan's text; nothing where they are neither used nor worth it."""
    if found is None:
        return []
    gain = found.lost[1] - found.lost[0]
    if not training.checkpoints:
        if gain < WORTH:
            return []
        every = _minutes(found.best_s)
        return [
            f"          also on the nodes' own disks, with a copy on the next node, saves and failures would take "
            f"{gain:.1%} of the GPU hours less:",
            f"          train: {{checkpoints: [{{path: FOLDER, every_minutes: {every}}}, {{}}]}}, "
            f"{show(found.disk, 'B')} of each node's disk",
        ]
    stop = list(dict.fromkeys(show(seconds, "s") for seconds in sorted(found.stop_s or ())))
    costs = f" beside the next step, which costs {' to '.join(stop)}" if stop and training.saves_beside_steps else ""
    copy = "and its neighbour's copy" if cluster.nodes > 1 else "alone: a single node has no neighbour for a copy"
    share = f" ({SURVIVED:.0%} of them, taken)" if cluster.nodes > 1 else " (if the disk is left)"
    return [
        f"          on the nodes' own disks {show(found.writing_s, 's')}, a node's files {copy}{costs}: every "
        f"{show(found.every_s, 's')}, best every {show(found.best_s, 's')}",
        f"          a failure costs {show(found.after_failure_s[0], 's')} with these{share}, "
        f"{show(found.after_failure_s[1], 's')} with the shared storage's, and the start",
    ]


def _minutes(seconds: float) -> int:
    return max(1, round(seconds / 60))


def figures(found: OwnDisks | None, training: Training) -> dict[str, Any]:
    """Numbers for receipts and ``--json``; none where they are not used, so that earlier plans stay."""
    if found is None or not training.checkpoints:
        return {}
    told = {
        "disk_bytes": round(found.disk),
        "checkpoint_bytes": round(found.bytes),
        "checkpoint_s": round(found.writing_s, 3),
        "checkpoint_stop_s": [round(seconds, 3) for seconds in found.stop_s or ()],
        "every_s": round(found.every_s),
        "cadence_s": round(found.best_s),
        "after_failure_s": [round(seconds) for seconds in found.after_failure_s],
        "lost_share": [round(share, 5) for share in found.lost],
    }
    return {"own_disks": told}
