"""How many steps a run has, the learning rate of each, and which rows each step trains on.

Pure functions of the settings: a resumed run continues at any step at once, without replaying what came before.
"""

import dataclasses
import math
from functools import lru_cache
from typing import Any

import numpy as np

from ..data import dealing
from ..errors import BadInputError
from .settings import Settings

BATCH = ("micro_batch_size", "gradient_accumulation_steps", "sequence_parallel_size")  # with the ranks: rows of a step


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The steps of a run.

    Attributes:
        rows: rows of the token dataset.
        data_parallel_size: sequence-parallel groups that each train on their own rows.
        global_batch: rows per optimizer step over all ranks.
        steps: optimizer steps of the whole run.
        warmup_steps: steps of linear warm-up before the peak learning rate.
        since_step, since_rows: steps and rows that were done when steps of ``global_batch`` rows began.
        planned_batch, planned_steps: what the run was begun with, where that was another batch; 0: it goes on as begun.
    """

    rows: int
    data_parallel_size: int
    global_batch: int
    steps: int
    warmup_steps: int
    peak: float
    floor: float
    kind: str
    since_step: int = 0
    since_rows: int = 0
    planned_batch: int = 0
    planned_steps: int = 0

    @property
    def steps_per_epoch(self) -> float:
        return self.rows / self.global_batch

    def rows_after(self, step: int) -> int:
        """Rows of the global order that are consumed once ``step`` steps, none before ``since_step``, are done."""
        return self.since_rows + (step - self.since_step) * self.global_batch

    def told_after(self, step: int) -> dict[str, int]:
        """What the marker of a checkpoint of step ``step`` says of the schedule, see ``Position``."""
        return {
            "rows_done": self.rows_after(step),
            "global_batch": self.global_batch,
            "planned_batch": self.planned_batch or self.global_batch,
            "planned_steps": self.planned_steps if self.planned_batch else self.steps,
        }

    def epoch(self, step: int) -> float:
        """Epochs trained after ``step`` steps."""
        return self.rows_after(step) / self.rows

    def learning_rate(self, step: int) -> float:
        """Learning rate of step ``step``, counted from 1; where the batch was changed, as of as many rows before.

        Warm-up rises linearly and reaches the peak at the first step after it, so that even a single warm-up step is
        below the peak. The cosine would reach the minimum in the step after the last, which still learns.
        """
        at, steps = step, self.steps
        if self.planned_batch:
            steps = self.planned_steps
            at = min(self.rows_after(step) / self.planned_batch, steps)
        if at < self.warmup_steps + 1:
            return self.peak * at / (self.warmup_steps + 1)
        if self.kind == "constant":
            return self.peak
        progress = (at - self.warmup_steps - 1) / (steps - self.warmup_steps)
        return self.floor + (self.peak - self.floor) * (1 + math.cos(math.pi * progress)) / 2

    def describe(self) -> str:
        return (
            f"{self.rows} rows, {self.global_batch} a step ({self.data_parallel_size} data-parallel groups): "
            f"{self.steps_per_epoch:.2f} steps an epoch, {self.steps} steps in all "
            f"({self.epoch(self.steps):.2f} epochs), {self.warmup_steps} of warm-up, learning rate {self.peak:g} "
            + (f"to {self.floor:g} by cosine" if self.kind == "cosine" else "constant")
            + self._describe_change()
        )

    def _describe_change(self) -> str:
        if not self.planned_batch:
            return ""
        return (
            f"; begun as {self.planned_steps} steps of {self.planned_batch} rows, {self.since_rows} rows are done in "
            f"{self.since_step} steps, and the learning rate follows rows"
        )


@dataclasses.dataclass(frozen=True)
class Position:
    """Where in the global order of rows a checkpoint stands.

    Attributes:
        step, rows: done.
        global_batch: rows of the step before it.
        planned_batch, planned_steps: what the run was begun with.
    """

    step: int
    rows: int
    global_batch: int
    planned_batch: int
    planned_steps: int

    @classmethod
    def of(cls, marker: dict[str, Any], begun: dict[str, int]) -> "Position":
        """Of a commit marker; those of earlier versions are of runs whose batch never changed.

        Args:
            begun: the keys of ``BATCH`` of the run as it was begun.
        """
        step, told = marker["step"], marker.get("schedule")
        if told:
            return cls(step, told["rows_done"], told["global_batch"], told["planned_batch"], told["planned_steps"])
        batch = rows_of(begun, marker["world_size"])
        return cls(step, step * batch, batch, batch, marker["steps"])


def resumed(fresh: Schedule, settings: Settings, position: Position) -> Schedule:
    """The schedule of a run that goes on from a position with ``fresh``'s ranks and batch.

    The rows that the run was begun to train stay, and so does the learning rate of each; steps are counted on.

    Args:
        fresh: of a run that begins with these ranks, or any that goes on with them.
    """
    batch = fresh.global_batch
    if position.global_batch == position.planned_batch == batch and position.rows == position.step * batch:
        return dataclasses.replace(
            fresh, steps=position.planned_steps, since_step=0, since_rows=0, planned_batch=0, planned_steps=0
        )
    left = max(0, position.planned_batch * position.planned_steps - position.rows)
    return dataclasses.replace(
        fresh,
        steps=position.step + -(-left // batch),
        warmup_steps=warmup_of(settings, position.planned_steps),
        since_step=position.step,
        since_rows=position.rows,
        planned_batch=position.planned_batch,
        planned_steps=position.planned_steps,
    )


def warmup_of(settings: Settings, steps: int) -> int:
    """Steps of warm-up in a run of ``steps``: at least one where there is any, and never all."""
    if settings.warmup_ratio <= 0:
        return 0
    return min(max(1, round(settings.warmup_ratio * steps)), max(0, steps - 1))


def rows_of(batch: dict[str, int], world_size: int) -> int:
    """Rows of a step; ``batch`` has the keys of ``BATCH``."""
    groups = world_size // batch["sequence_parallel_size"]
    return batch["micro_batch_size"] * batch["gradient_accumulation_steps"] * groups


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
    global_batch = rows_of({key: getattr(settings, key) for key in BATCH}, world_size)
    # The product is rounded first: 0.1 epochs of 10 rows are 1 row, not 1.0000000000000002.
    steps = settings.max_steps or max(1, math.ceil(round(settings.epochs * rows, 6) / global_batch))
    return Schedule(
        rows=rows,
        data_parallel_size=groups,
        global_batch=global_batch,
        steps=steps,
        warmup_steps=warmup_of(settings, steps),
        peak=settings.learning_rate,
        floor=settings.min_learning_rate,
        kind=settings.lr_schedule,
    )


@lru_cache(maxsize=2)
def order_of_epoch(rows: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of all rows, another one each epoch."""
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(rows)


def rows_of_step(rows: int, seed: int, step: int, global_batch: int) -> np.ndarray:
    """int64 [global_batch], the rows that all groups together train on in step ``step`` (from 0) of equal batches."""
    return rows_from(rows, seed, step * global_batch, global_batch)


def rows_from(rows: int, seed: int, first: int, count: int) -> np.ndarray:
    """int64 [count], the rows that come once ``first`` of the global order are consumed.

    All steps read one endless stream, the epochs' permutations one after the other: each row comes once an epoch,
    also where an epoch does not end with a step.
    """
    epochs, offsets = np.divmod(np.arange(first, first + count), rows)
    found = np.empty(count, np.int64)
    for epoch in np.unique(epochs):
        found[epochs == epoch] = order_of_epoch(rows, seed, int(epoch))[offsets[epochs == epoch]]
    return found
