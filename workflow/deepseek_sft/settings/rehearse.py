"""What a rehearsal is judged by."""

from .field_types import AboveZero, NotNegative, section


@section
class Rehearse:
    loss_tolerance: NotNegative = 0.0001
    """Relative difference by which the loss of a step that was resumed may lie off the unbroken one's on GPUs, whose
    attention kernels add in any order; gradient norms by ten times that. On CPUs none is allowed."""
    cost_per_gpu_hour: AboveZero | None = None
    """Price of a GPU's hour, for the projected cost of the run, in whatever currency; null takes
    `plan.price_per_gpu_hour`."""
