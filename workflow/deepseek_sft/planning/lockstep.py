"""How much of a step the ranks wait for each other: counted by dealing drawn rows as training does.

Under ZeRO-3 all groups walk through the layers together, so that each micro batch takes as long as the group with the
costliest one, padding included. Rows are drawn from those that stand for the dataset (``Samples.spread``), by a fixed
seed: the same plan gives the same numbers.
"""

import functools
import math
from dataclasses import dataclass

import numpy as np

from ..data import dealing
from .counting import Model
from .settings import Samples, Training
from .terms import total

STEPS = 16  # drawn, and averaged
MOST_ROWS = 1 << 16  # drawn for a step; a larger step is planned by the groups of its first micro batches
SEED = 0


@dataclass(frozen=True)
class Turns:
    """One step, mean over drawn ones.

    Attributes:
        operations: forward FLOPs of the costliest group in each micro batch, in their order; padding included.
        attention: of these, what attention's kernel does.
        useful_operations: forward FLOPs of all groups together that tokens of samples need.
        useful_slots: share of token slots that hold a token, the slots of waiting groups counted.
    """

    operations: tuple[float, ...]
    attention: tuple[float, ...]
    useful_operations: float
    useful_slots: float

    @property
    def useful_share(self) -> float:
        """Share of the time in which groups compute what is needed, had each its even part of it."""
        return self.useful_operations / sum(self.operations) if self.operations else 1.0


def turns(model: Model, training: Training, samples: Samples, groups: int) -> Turns:
    """Micro batches of a step on ``groups`` data-parallel groups; ``useful_operations`` are of one group's part."""
    per_token, per_pair = (float(term.value) for term in model.forward_flops(1))  # a token alone sees one pair
    shape = (training.gradient_accumulation_steps, groups, training.micro_batch_size)
    if samples.spread is None or math.prod(shape) > MOST_ROWS:
        tokens = training.micro_batch_size * samples.mean_length
        one = tokens * total(model.forward_flops(samples.mean_length))
        kernel = tokens * total(model.forward_flops(samples.mean_length)[1:])
        return Turns((one,) * shape[0], (kernel,) * shape[0], one * shape[0], 1.0)
    by_cost = training.deal_rows != "order"
    return _dealt(samples.spread, samples.packed, per_token, per_pair, shape, by_cost, training.sequence_parallel_size)


@functools.lru_cache(maxsize=1024)
def _dealt(
    spread: dealing.Rows,
    packed: bool,
    per_token: float,
    per_pair: float,
    shape: tuple[int, int, int],
    by_cost: bool,
    multiple: int,
) -> Turns:
    """Mean over drawn steps; remembered, since plans that differ elsewhere are made by the hundred (``remedies``)."""
    random = np.random.Generator(np.random.PCG64(SEED))
    costliest, kernels, useful, share = np.zeros(shape[0]), np.zeros(shape[0]), 0.0, 0.0
    weight = round(per_token / per_pair)
    for step in range(STEPS):
        rows = spread.of(random.integers(len(spread), size=math.prod(shape)))
        if by_cost:
            dealt = dealing.deal(rows.costs(weight), shape[2], shape[0], shape[1], SEED, step)
        else:
            dealt = np.arange(len(rows)).reshape(shape)
        lengths, pairs = rows.lengths[dealt], rows.pairs[dealt]
        longest = lengths.max(axis=2)
        # Attention of packed rows is computed sample by sample; of others over the padding too.
        seen = pairs.sum(axis=2) if packed else shape[2] * longest * (longest + 1) // 2
        operations = shape[2] * longest * per_token + seen * per_pair
        costliest += operations.max(axis=1)
        kernels += np.take_along_axis(seen * per_pair, operations.argmax(axis=1)[:, None], axis=1)[:, 0]
        useful += float(rows.lengths.sum() * per_token + rows.pairs.sum() * per_pair) / shape[1]
        share += float(rows.lengths.sum()) / dealing.slots(lengths, multiple)
    means = (tuple((part / STEPS).tolist()) for part in (costliest, kernels))
    return Turns(*means, useful / STEPS, share / STEPS)
