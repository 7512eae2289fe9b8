"""How many steps a run has, the learning rate of each, and which rows each step trains on.

Pure functions of the settings: a resumed run continues at any step at once, without replaying what came before.
"""

import dataclasses
import math
from functools import lru_cache

import numpy as np

from ..data import dealing
from ..errors import BadInputError
from .settings import Settings


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The steps of a run.

    Attributes:
        rows: rows of the token dataset.
        data_parallel_size: sequence-parallel groups that each train on their own rows.
        global_batch: rows per optimizer step over all ranks.
        steps: optimizer steps of the whole run.
        warmup_steps: steps of linear warm-up before the peak learning rate.
    """

    rows: int
    data_parallel_size: int
    global_batch: int
    steps: int
    warmup_steps: int
    peak: float
    floor: float
    kind: str

    @property
    def steps_per_epoch(self) -> float:
        return self.rows / self.global_batch

    def epoch(self, step: int) -> float:
        """Epochs trained after ``step`` steps."""
        return step * self.global_batch / self.rows

    def learning_rate(self, step: int) -> float:
        """Learning rate of step ``step``, counted from 1.

        Warm-up rises linearly and reaches the peak at the first step after it, so that even a single warm-up step is
        below the peak. The cosine would reach the minimum in the step after the last, which still learns.
        """
        if step <= self.warmup_steps:
            return self.peak * step / (self.warmup_steps + 1)
        if self.kind == "constant":
            return self.peak
        progress = (step - self.warmup_steps - 1) / (self.steps - self.warmup_steps)
        return self.floor + (self.peak - self.floor) * (1 + math.cos(math.pi * progress)) / 2

    def describe(self) -> str:
        return (
            f"{self.rows} rows, {self.global_batch} a step ({self.data_parallel_size} data-parallel groups): "
            f"{self.steps_per_epoch:.2f} steps an epoch, {self.steps} steps in all "
            f"({self.epoch(self.steps):.2f} epochs), {self.warmup_steps} of warm-up, learning rate {self.peak:g} "
            + (f"to {self.floor:g} by cosine" if self.kind == "cosine" else "constant")
        )


def with_accumulation(settings: Settings, rows: int, samples: int) -> Settings:
    """Settings whose accumulation is counted in micro batches, also where they count it in samples.

    Args:
        rows, samples: of the token dataset.
    """
    if settings.accumulate_by == "rows" or not rows:
        return settings
    steps = dealing.accumulation_for(settings.gradient_accumulation_steps, samples / rows)
    return dataclasses.replace(settings, gradient_accumulation_steps=steps)


def plan(settings: Settings, rows: int, world_size: int) -> Schedule:
    """The schedule of a run on ``world_size`` ranks.

    ``max_steps``, where given, is the number of steps whatever ``epochs`` says.

    Raises:
        BadInputError: the sequence-parallel size does not divide the world size, or there are no rows.
    """
    if rows < 1:
        raise BadInputError("the token dataset has no rows", "look at the rejects of prepare_data and tokenize_data")
    if world_size % settings.sequence_parallel_size:
        raise BadInputError(
            f"sequence_parallel_size {settings.sequence_parallel_size} does not divide the {world_size} ranks",
            "set train.sequence_parallel_size to a divisor, or start another number of ranks",
        )
    groups = world_size // settings.sequence_parallel_size
    global_batch = settings.micro_batch_size * groups * settings.gradient_accumulation_steps
    # The product is rounded first: 0.1 epochs of 10 rows are 1 row, not 1.0000000000000002.
    steps = settings.max_steps or max(1, math.ceil(round(settings.epochs * rows, 6) / global_batch))
    warmup = 0
    if settings.warmup_ratio > 0:
        warmup = min(max(1, round(settings.warmup_ratio * steps)), max(0, steps - 1))
    return Schedule(
        rows=rows,
        data_parallel_size=groups,
        global_batch=global_batch,
        steps=steps,
        warmup_steps=warmup,
        peak=settings.learning_rate,
        floor=settings.min_learning_rate,
        kind=settings.lr_schedule,
    )


@lru_cache(maxsize=2)
def order_of_epoch(rows: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of all rows, another one each epoch."""
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(rows)


def rows_of_step(rows: int, seed: int, step: int, global_batch: int) -> np.ndarray:
    """int64 [global_batch], the rows that all groups together train on in step ``step`` (from 0).

    All steps read one endless stream, the epochs' permutations one after the other: each row comes once an epoch,
    also where an epoch does not end with a step.
    """
    epochs, offsets = np.divmod(np.arange(step * global_batch, (step + 1) * global_batch), rows)
    found = np.empty(global_batch, np.int64)
    for epoch in np.unique(epochs):
        found[epochs == epoch] = order_of_epoch(rows, seed, int(epoch))[offsets[epochs == epoch]]
    return found
