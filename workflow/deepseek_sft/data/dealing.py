"""How the rows of an optimizer step are dealt to micro batches and data-parallel groups.

ZeRO-3 gathers every parameter for all ranks at once, so that in each micro batch all groups wait for the slowest, and a
micro batch is as long as its longest row. Which rows a step trains on is another question (``training/schedule.py``)
and does not depend on any of this; nor does its loss, which is a mean over all trained tokens of the step.

Numbers are integers throughout: ranks on different processors must come to the same order.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.int64]
QUANTILES = 256  # rows that stand for all where they are counted or estimated


@dataclass(frozen=True, eq=False)
class Rows:
    """What is known of rows without reading their tokens.

    Attributes:
        lengths: int64 [rows], tokens of each row.
        pairs: int64 [rows], pairs of a query and a key before it within the samples of each row.
    """

    lengths: Numbers
    pairs: Numbers

    def __len__(self) -> int:
        return len(self.lengths)

    def of(self, rows: NDArray[np.integer]) -> "Rows":
        """The rows of these numbers."""
        return Rows(self.lengths[rows], self.pairs[rows])

    def costs(self, pairs_per_token: int) -> Numbers:
        """What each row costs to compute, in pairs.

        Args:
            pairs_per_token: pairs whose attention takes as long as one token's matrix products (0: attention alone).
        """
        return self.lengths * pairs_per_token + self.pairs


def rows_of(sample_lengths: NDArray[np.integer], offsets: NDArray[np.integer]) -> Rows:
    """``Rows`` from the lengths of all samples end to end, [samples], and where each row's begin, [rows + 1]."""
    lengths = sample_lengths.astype(np.int64)
    sums = [np.concatenate(([0], np.cumsum(values))) for values in (lengths, lengths * (lengths + 1) // 2)]
    return Rows(*(np.diff(total[offsets]) for total in sums))


def deal(costs: Numbers, micro_batch: int, accumulation: int, groups: int, seed: int, step: int) -> Numbers:
    """Give rows of like cost to the same micro batch and the same turn, the costliest first.

    Consecutive rows in the order of their costs make a micro batch, consecutive micro batches a turn: no other way of
    cutting them makes the sum over turns of the costliest micro batch smaller. Within a turn chance decides which
    group gets which, so that none has always the longest.

    Args:
        costs: int64 [accumulation · groups · micro_batch], of the step's rows.
        seed, step: which chance.

    Returns:
        int64 [accumulation, groups, micro_batch], positions in ``costs``.
    """
    dealt = np.argsort(-costs, kind="stable").reshape(accumulation, groups, micro_batch)
    for turn in range(accumulation):
        dealt[turn] = dealt[turn][np.random.Generator(np.random.PCG64([seed, step, turn])).permutation(groups)]
    return dealt


def slots(lengths: Numbers, multiple: int = 1) -> int:
    """Token slots that a step takes: in each turn every group computes, or waits, as long as the longest.

    Args:
        lengths: int64 [accumulation, groups, micro_batch], of the rows as they are dealt.
        multiple: of which every padded length is one.
    """
    longest = -(-lengths.max(axis=(1, 2)) // multiple) * multiple
    return int(longest.sum()) * lengths.shape[1] * lengths.shape[2]


def accumulation_for(samples_accumulation: int, samples_per_row: float) -> int:
    """Micro batches of a step on packed rows that train as many samples as ``samples_accumulation`` on unpacked ones.

    Args:
        samples_per_row: on average, over the whole dataset.
    """
    return max(1, round(samples_accumulation / samples_per_row))


def quantiles(rows: Rows, count: int = QUANTILES) -> Rows:
    """``count`` rows that stand for all: evenly taken from them in the order of their lengths."""
    order = np.lexsort((rows.pairs, rows.lengths))
    return rows.of(order[((np.arange(count) + 0.5) * len(order) / count).astype(np.int64)])
