"""What a checkpoint costs a run: written at once, or while the next step computes."""

import math

from .settings import Training

# Of the writing: by how much steps are taken to be slower beside it. An upper bound, the bar of
# ``benchmarks/async_save.py``; not measured on GPUs.
SLOWED_SHARE = 0.10


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
