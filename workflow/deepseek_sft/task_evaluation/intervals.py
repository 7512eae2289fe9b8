"""Means of scores with 95 % confidence intervals, items taken as drawn by chance; several answers to one are its mean.

Scores of 0 to 1: Wilson's interval (doi:10.1080/01621459.1927.10502953), which stays honest where all are right. The
variance of such scores is at most that of rights and wrongs with the same mean, so it is never too narrow. Differences
of pairs: Wald's interval with one pair more of each kind (Bonett and Price, doi:10.3102/1076998611411915), so that
equal results on few items are not taken for certainty. Other scores: mean and standard error.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

Z = 1.959964  # of a normal distribution, 2.5 % lie above


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95 % interval; the interval is None where one item alone cannot tell."""

    mean: float
    low: float | None
    high: float | None


def mean(scores: Sequence[float]) -> Estimate:
    """Mean score of the items."""
    center, count = statistics.fmean(scores), len(scores)
    if not _are_shares(scores):
        return _wald(center, scores, count)
    middle = (center + Z**2 / (2 * count)) / (1 + Z**2 / count)
    half = Z / (1 + Z**2 / count) * math.sqrt(center * (1 - center) / count + Z**2 / (4 * count**2))
    return Estimate(center, min(center, max(0.0, middle - half)), max(center, min(1.0, middle + half)))


def drop(before: Sequence[float], after: Sequence[float]) -> Estimate:
    """How much the mean fell between two results on the same items, in the same order."""
    pairs = [first - second for first, second in zip(before, after, strict=True)]
    center = statistics.fmean(pairs)
    if not (_are_shares(before) and _are_shares(after)):
        return _wald(center, pairs, len(pairs))
    found = _wald(statistics.fmean([*pairs, 1, -1]), [*pairs, 1, -1], len(pairs) + 2, population=True)
    return Estimate(center, min(center, found.low), max(center, found.high))


def _are_shares(scores: Sequence[float]) -> bool:
    return all(0 <= score <= 1 for score in scores)


def _wald(center: float, values: Sequence[float], count: int, population: bool = False) -> Estimate:
    if count < 2:
        return Estimate(center, None, None)
    spread = statistics.pstdev(values) if population else statistics.stdev(values)
    half = Z * spread / math.sqrt(count)
    return Estimate(center, center - half, center + half)
