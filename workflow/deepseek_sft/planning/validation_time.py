"""What measuring the validation loss takes: forward passes alone over the held-out samples, all groups in step."""

import math

from .settings import Samples, Training


def measurements(training: Training, steps: int) -> int:
    """How often a run of ``steps`` steps measures: the base first, then every so many steps, and after the last."""
    return 1 + math.ceil(steps / training.validation.every_steps) if training.validation else 0


def turns(training: Training, samples: Samples, groups: int) -> int:
    """Forward passes of each data-parallel group in one measurement."""
    if training.validation is None:
        return 0
    chosen = training.validation.samples
    count = chosen if samples.held_out is None else min(chosen, samples.held_out)
    rows = math.ceil(count / samples.per_row)
    return math.ceil(math.ceil(rows / training.micro_batch_size) / groups)


def share_of_turn(training: Training) -> float:
    """Of a micro batch's time in training: one of its passes, or one of its gathers, whichever is the larger share."""
    again = training.activation_checkpointing
    gathers = 3 if again and not training.keep_layer_gathered else 2
    moved = training.width / (gathers * training.width + training.communication_width)
    return max(1 / (4 if again else 3), moved)


def seconds(training: Training, samples: Samples, groups: int, step: float) -> float:
    """Of one measurement, where a step of all micro batches takes ``step`` seconds."""
    each = step / training.gradient_accumulation_steps
    return turns(training, samples, groups) * each * share_of_turn(training)
