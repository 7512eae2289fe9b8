"""Whether a step's update may be applied: not finite, or a spike of the gradient norm. Pure; the same on all ranks."""

import dataclasses
import math
import statistics
from collections import deque
from typing import Any

WINDOW = 50  # steps whose median gradient norm is the measure
LEAST = 20  # fewer say too little: the norm falls fast at the start
MOST_IN_A_ROW = 10  # skipped steps; more is no accident of a batch


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What to do with a step.

    Attributes:
        kind: ``fine``, ``not_finite`` or ``spike``.
        apply: whether the optimizer updates the weights.
        stop: whether the run ends with a failed gate.
        message: what is wrong, empty where nothing is.
    """

    kind: str = "fine"
    apply: bool = True
    stop: bool = False
    message: str = ""


class StepHealth:
    """Judges steps one after another.

    Args:
        on_not_finite, spike_factor, on_spike: settings of the same names.
        state: ``state()`` of an earlier start.
    """

    def __init__(
        self, on_not_finite: str, spike_factor: float | None, on_spike: str, state: dict[str, Any] | None = None
    ):
        self.on_not_finite, self.spike_factor, self.on_spike = on_not_finite, spike_factor, on_spike
        state = state or {}
        self.norms = deque(state.get("norms", []), maxlen=WINDOW)
        self.skipped: int = state.get("skipped", 0)
        self.spikes: int = state.get("spikes", 0)
        self.in_a_row: int = state.get("in_a_row", 0)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, so that a resumed run judges as an uninterrupted one."""
        return {
            "norms": list(self.norms),
            "skipped": self.skipped,
            "spikes": self.spikes,
            "in_a_row": self.in_a_row,
        }

    def judge(self, step: int, loss: float, norm: float) -> Verdict:
        """Judge step ``step``: its mean loss, and the norm of its whole gradient before clipping."""
        verdict = self._judge(step, loss, norm)
        if math.isfinite(norm):
            self.norms.append(norm)  # spikes too: a lasting change of scale becomes the new measure
        self.spikes += verdict.kind == "spike"
        if verdict.apply or verdict.stop:
            self.in_a_row = 0
            return verdict
        self.skipped += 1
        self.in_a_row += 1
        if self.in_a_row > MOST_IN_A_ROW:
            message = f"{verdict.message}; {MOST_IN_A_ROW} steps before it were skipped as well"
            return dataclasses.replace(verdict, stop=True, message=message)
        return verdict

    def _judge(self, step: int, loss: float, norm: float) -> Verdict:
        for name, value in (("loss", loss), ("gradient norm", norm)):
            if not math.isfinite(value):
                message = f"the {name} of step {step} is {value}"
                return Verdict("not_finite", False, self.on_not_finite == "stop", message)
        if self.spike_factor is None or len(self.norms) < LEAST:
            return Verdict()
        usual = statistics.median(self.norms)
        if norm <= self.spike_factor * usual:
            return Verdict()
        message = f"the gradient norm of step {step} is {norm:.3g}, {norm / usual:.0f} times the usual {usual:.3g}"
        return Verdict("spike", self.on_spike == "warn", self.on_spike == "stop", message)
