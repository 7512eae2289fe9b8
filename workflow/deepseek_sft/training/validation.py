"""The rule of validation: which measurement is the best, when a run ends early, and which checkpoint is its result.

Pure functions of what was measured, which each checkpoint keeps up to its step: a resumed run judges as an
uninterrupted one, and other numbers in the rule judge the same measurements anew. What was measured before the first
step, step 0, is the base's loss: told, and no part of the rule, since there is no checkpoint of it to go back to.
"""

import math
from collections.abc import Sequence
from typing import Any

from ..settings.train import EarlyStop, Validation
from .checkpoints import Checkpoint

# Of a checkpoint's progress: [[step, loss or null], …], oldest first; and what all of them took.
KEY, SECONDS = "validation", "validation_seconds"
KEPT = (KEY, SECONDS)
Measured = Sequence[Sequence[Any]]  # the same


def of(progress: dict[str, Any]) -> list[list[Any]]:
    """What a checkpoint's progress says was measured; malformed entries of an edited marker count as none."""
    found = progress.get(KEY)
    return [entry for entry in found if _is_entry(entry)] if isinstance(found, list) else []


def _is_entry(entry: Any) -> bool:
    return (
        isinstance(entry, list)
        and len(entry) == 2
        and type(entry[0]) is int
        and (entry[1] is None or type(entry[1]) in (int, float))
    )


def of_steps(measured: Measured) -> Measured:
    """What was measured after a step: all but the base's."""
    return [entry for entry in measured if entry[0] > 0]


def without_a_lower_loss(measured: Measured, min_delta: float) -> int:
    """Measurements since the last whose loss was lower than all before by more than ``min_delta``, the base's apart.

    One that is no number is not lower.
    """
    lowest, count = math.inf, 0
    for _, loss in of_steps(measured):
        if loss is not None and loss < lowest - min_delta:
            lowest, count = loss, 0
        else:
            count += 1
    return count


def has_ended(measured: Measured, rule: EarlyStop | None) -> bool:
    """Whether the rule ends a run after these measurements."""
    return rule is not None and without_a_lower_loss(measured, rule.min_delta) >= rule.patience


def best(measured: Measured) -> tuple[int, float] | None:
    """Step and loss of the lowest loss after a step, the later of equals; None where there is no number."""
    found = [(loss, -step) for step, loss in of_steps(measured) if loss is not None]
    return (-min(found)[1], min(found)[0]) if found else None


def best_checkpoint(found: Sequence[Checkpoint], measured: Measured) -> Checkpoint | None:
    """The checkpoint of the lowest loss, of those whose very step was measured; None where none was."""
    losses = dict(measured)
    there = [one for one in found if losses.get(one.step) is not None]
    return min(there, key=lambda one: (losses[one.step], -one.step), default=None)


def result(found: Sequence[Checkpoint], chosen: Validation | None) -> Checkpoint | None:
    """The checkpoint that is converted: the newest, or with a rule for an early end the best one.

    Args:
        found: committed ones, oldest first.
    """
    newest = found[-1] if found else None
    if newest is None or chosen is None or chosen.early_stop is None:
        return newest
    return best_checkpoint(found, of(newest.progress)) or newest


def figures(newest: Checkpoint, converted: Checkpoint, chosen: Validation | None) -> dict[str, Any]:
    """Figures of a finished run for its receipt; none where nothing was measured."""
    measured = of(newest.progress)
    if not measured:
        return {}
    lowest = best(measured)
    told = {
        "validation_loss": measured[-1][1],
        "validation_first_loss": measured[0][1],
        "validation_first_step": measured[0][0],
        "validation_lowest_loss": lowest[1] if lowest else None,
        "validation_lowest_step": lowest[0] if lowest else None,
        "validation_seconds": newest.progress.get(SECONDS),
    }
    if chosen is None or chosen.early_stop is None:
        return told
    return told | {
        "ended_early": newest.step < newest.marker["steps"] and has_ended(measured, chosen.early_stop),
        "converted_step": converted.step,
        "converted_validation_loss": dict(measured).get(converted.step),
    }
