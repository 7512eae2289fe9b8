"""The validation loss: mean cross-entropy over all tokens with loss of held-out rows, under the weights as they are.

Under ZeRO-3 all ranks enter every layer together: all data-parallel groups make as many forward passes, and one that
has no rows left enters with rows of another, which do not count. The sums of all ranks and passes are added up exactly,
on every rank, so that all come to the same number in whatever order they arrive, and decide alike.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from xtuner.parallel.sequence import get_data_parallel_rank, get_data_parallel_world_size

from ...cli import say
from ...data.tokens import TokenDataset
from ...errors import BadInputError
from .. import validation as rule
from ..settings import Settings
from ..watchdog import Watchdog
from .config import EngineConfig
from .evaluating import evaluating
from .micro_batches import NO_LOSS, pad
from .step_guard import StepGuard


@dataclass(frozen=True)
class Measurement:
    """One validation.

    Attributes:
        loss: mean cross-entropy over ``tokens``; None where it is not finite.
        tokens: with loss.
        seconds: wall time.
    """

    loss: float | None
    tokens: int
    seconds: float


class Validation:
    """Measures every so many steps, and keeps what was measured.

    Args:
        tokens: folder of the held-out token dataset.
        settings: of a run that validates.
        steps: of the whole run.
        before: progress of the checkpoint that the run goes on from.
        alive: called before each forward pass.

    Attributes:
        measured: what was measured up to now, see ``training.validation``.
        seconds: that all measurements took.
    """

    def __init__(
        self,
        tokens: str | Path,
        settings: Settings,
        steps: int,
        before: dict[str, Any],
        alive: Callable[[], None] = lambda: None,
    ):
        self._dataset, self._settings, self._steps, self._alive = TokenDataset(tokens), settings, steps, alive
        self._chosen = settings.validation
        self._rows = choose(self._dataset, self._chosen.samples)
        self.measured = rule.of(before)
        self.seconds: float = before.get(rule.SECONDS, 0.0)

    def is_due(self, step: int, time_is_up: bool) -> bool:
        """Whether it is measured after step ``step``: by number, or as the run's last."""
        return time_is_up or step == self._steps or step % self._chosen.every_steps == 0

    def measure(self, engine: Any, step: int) -> Measurement:
        """Measure after step ``step``, 0 for the base; a collective.

        Args:
            engine: DeepSpeed's, between two steps.
        """
        started = time.monotonic()
        groups, micro_batch = get_data_parallel_world_size(), self._settings.micro_batch_size
        passes = [self._rows[i : i + micro_batch] for i in range(0, len(self._rows), micro_batch)]
        turns = -(-len(passes) // groups)
        own = torch.zeros(turns, 2, dtype=torch.float64)  # sum and number of this rank's tokens
        with evaluating(engine):
            for turn in range(turns):
                self._alive()
                number = turn * groups + get_data_parallel_rank()
                rows = [self._dataset[int(row)] for row in passes[min(number, len(passes) - 1)]]
                batch = pad(rows, self._settings.sequence_parallel_size)
                losses = engine(batch.to(engine.device), of_each_token=True)
                if number < len(passes):
                    own[turn, 0], own[turn, 1] = losses.double().sum(), len(losses)
        everyone = [torch.empty_like(own, device=engine.device) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, own.to(engine.device))
        sums, counts = torch.cat(everyone).T.tolist()
        tokens = int(sum(counts))
        loss = math.fsum(sums) / max(tokens, 1) if all(map(math.isfinite, sums)) else None
        took = time.monotonic() - started
        self.measured.append([step, loss])
        self.seconds += took
        return Measurement(loss, tokens, took)

    def ends(self) -> bool:
        """Whether the rule for an early end ends the run now."""
        return rule.has_ended(self.measured, self._chosen.early_stop)

    def tell_end(self, step: int) -> None:
        """Say why the run ends here."""
        stop, lowest = self._chosen.early_stop, rule.best(self.measured)
        least = f"the lowest is {lowest[1]:.4f} after step {lowest[0]}" if lowest else "none is a number"
        say(
            f"the validation loss has not fallen by more than {stop.min_delta:g} in {stop.patience} measurements "
            f"({least}): the run ends after step {step} of {self._steps} (train.validation.early_stop)"
        )

    def kept(self) -> dict[str, Any]:
        """For the progress of a checkpoint."""
        return {rule.KEY: self.measured, rule.SECONDS: self.seconds}

    def describe(self) -> str:
        """What is measured."""
        of_rows = np.array([len(sizes) for _, sizes in self._dataset.names_and_lengths()])
        samples, every = int(of_rows[self._rows].sum()), self._chosen.every_steps
        return f"validation: {samples:,} held-out samples in {len(self._rows):,} rows, every {every} steps"


def of_run(config: EngineConfig, before: dict[str, Any], watchdog: Watchdog, guard: StepGuard) -> Validation | None:
    """What measures the validation loss, where the run does; each of its passes may take as long as a step.

    Args:
        before: progress of the checkpoint that the run goes on from.
        guard: that knows the step.
    """
    if config.settings.validation is None or config.held_out is None:
        return None

    def alive() -> None:
        watchdog.enter("step", guard.step)
        watchdog.place = "validation"

    found = Validation(config.held_out, config.settings, config.schedule.steps, before, alive)
    if dist.get_rank() == 0:
        say(found.describe())
    return found


def choose(dataset: TokenDataset, samples: int) -> np.ndarray:
    """int64 [rows], rows of about ``samples`` samples in all, the same at every start: longest first, so that rows of
    like length make a pass.

    Raises:
        BadInputError: none of them has a token with loss.
    """
    order = np.random.Generator(np.random.PCG64(0)).permutation(len(dataset))
    counts = np.array([len(sizes) for _, sizes in dataset.names_and_lengths()])
    taken = order[: max(1, int(np.searchsorted(np.cumsum(counts[order]), samples, side="right")))]
    with_loss = any((pad([dataset[int(row)]], 1).targets != NO_LOSS).any() for row in taken)
    if not with_loss:
        raise BadInputError(
            f"{dataset.path}: no token of the {len(taken):,} rows to validate on carries a loss",
            "raise train.validation.samples, or hold out a larger share in data.held_out",
        )
    lengths = dataset.lengths()[taken]
    return taken[np.lexsort((taken, -lengths.astype(np.int64)))]
