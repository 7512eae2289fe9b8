"""What a checkpoint costs a run: written at once, or while the next step computes; there or on the nodes' own disks."""

import math
from collections.abc import Sequence

from .settings import Cluster, Training

# Of the writing: by how much steps are taken to be slower beside it. An upper bound, the bar of
# ``benchmarks/async_save.py``; not measured on GPUs.
SLOWED_SHARE = 0.10

# Of all failures: a process or one node, whose neighbour has a copy of what was on the node's own disk. Others take
# neighbours together, or the job comes back on other nodes. A judgement; a requeue to the same nodes loses fewer.
SURVIVED = 0.85
COPY_SHARE = 0.25  # of the network's line rate that files reach over TCP: a judgement, not measured


def stops(training: Training, writing: float, beside: tuple[float, float]) -> tuple[float, float]:
    """Seconds that a checkpoint keeps the GPUs from steps, for the fastest and the slowest step.

    Beside a step that is what is left to write when its forward and backward passes are over, and no less than
    ``SLOWED_SHARE`` of the writing.

    Args:
        writing: seconds that the files of one checkpoint take.
        beside: seconds of a step's forward and backward passes.
    """
    if not training.saves_beside_steps:
        return writing, writing
    fastest, slowest = (max(writing - seconds, SLOWED_SHARE * writing) for seconds in beside)
    return fastest, slowest


def young_daly(checkpoint_s: float, mtbf_s: float) -> float:
    """Seconds between checkpoints that lose the least time (Daly 2006, equation 37; Young 1974 is its first term)."""
    if checkpoint_s >= 2 * mtbf_s:
        return mtbf_s
    ratio = checkpoint_s / (2 * mtbf_s)
    return math.sqrt(2 * checkpoint_s * mtbf_s) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - checkpoint_s


def cadence(stop: float, mtbf_s: float, writing: float = 0.0) -> float:
    """Seconds between checkpoints that lose the least time.

    Args:
        stop: seconds for which one keeps the GPUs from steps.
        writing: beside steps: one is written at a time.
    """
    return max(young_daly(stop, mtbf_s), writing)


def survived(training: Training, cluster: Cluster) -> float:
    """Share of the failures after which the nodes' own disks have the newest checkpoint."""
    return SURVIVED if training.checkpoints and cluster.nodes > 1 else 0.0


def writing_on_nodes(cluster: Cluster, checkpoint: float) -> float:
    """Seconds of a checkpoint on the nodes' own disks: a node's files, and a copy of its neighbour's.

    Args:
        checkpoint: bytes of all ranks' files.
    """
    own, copies = checkpoint / cluster.nodes, min(2, cluster.nodes)
    copying = own / (COPY_SHARE * cluster.node_gb_per_second * 1e9) if copies > 1 else 0.0
    return copies * own / (cluster.local_gb_per_second * 1e9) + copying


def stops_for_nodes(training: Training, cluster: Cluster, checkpoint: float, beside: Sequence[float]) -> list[float]:
    """As ``stops``, on the nodes' own disks: the update waits for a node's own files, not for the copies.

    Args:
        beside: seconds of a step's forward and backward passes.
    """
    writing = writing_on_nodes(cluster, checkpoint)
    if not training.saves_beside_steps:
        return [writing for _ in beside]
    own = checkpoint / cluster.nodes / (cluster.local_gb_per_second * 1e9)
    return [max(own - seconds, SLOWED_SHARE * writing) for seconds in beside]


def on_shared_storage(training: Training, cluster: Cluster, stop: float, mtbf_s: float, writing: float) -> float:
    """Seconds between checkpoints there that lose the least time; failures that the nodes' own disks survive need none.

    Args:
        mtbf_s: between all failures.
    """
    left = mtbf_s / (1 - survived(training, cluster))
    return cadence(stop, left, writing if training.saves_beside_steps else 0.0)


def stood(
    training: Training,
    cluster: Cluster,
    checkpoint: float,
    saved: float,
    trained: Sequence[float],
    saves: Sequence[int],
    stop: Sequence[float],
    beside: Sequence[float],
) -> list[float]:
    """Seconds of a run for which checkpoints keep the GPUs from steps, for the fastest and the slowest step.

    Args:
        checkpoint: bytes of all ranks' files.
        saved: seconds that the last one takes, which no step follows.
        trained: seconds of steps.
        saves, stop: number of checkpoints on the shared storage, and seconds for which one stops steps.
        beside: seconds of a step's forward and backward passes.
    """
    found = []
    for seconds, count, one, passes in zip(trained, saves, stop, beside, strict=True):
        found.append((count - 1) * one + saved)
        if training.checkpoints:  # those on the shared storage count for both
            more = max(0, math.floor(seconds / training.checkpoints.every_s) - count)
            found[-1] += more * stops_for_nodes(training, cluster, checkpoint, (passes,))[0]
    return found
