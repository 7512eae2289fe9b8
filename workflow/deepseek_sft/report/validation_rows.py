"""The validation loss in words, for `status` and the top of the report."""

from typing import Any

from . import plots
from .collect import mapping


def row(lines: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """The validation loss where it is measured."""
    steps, losses = plots.series(lines, "validation_loss")
    if not len(losses):
        return []
    lowest, of_base = int(losses.argmin()), steps[0] == 0
    if of_base and len(losses) == 1:
        return [("validation", f"loss {losses[0]:.4f} of the base")]
    last, first = f"loss {losses[-1]:.4f} after step {steps[-1]:,.0f}", "of the base" if of_base else "at first"
    if of_base and lowest == 0:
        return [("validation", f"{last}, never below the {losses[0]:.4f} {first}")]
    least = (
        "the lowest" if lowest == len(losses) - 1 else f"lowest {losses[lowest]:.4f} after step {steps[lowest]:,.0f}"
    )
    return [("validation", f"{last}, {least}, {losses[0]:.4f} {first}")]


def seconds_left(lines: list[dict[str, Any]], steps: int, settings: dict[str, Any]) -> float:
    """Seconds that the measurements of the steps to come take, as long as the last one."""
    _, seconds = plots.series(lines, "seconds_validation")
    every = mapping(settings.get("validation")).get("every_steps")
    return float(seconds[-1]) * -(-steps // every) if len(seconds) and isinstance(every, int) and every > 0 else 0.0


def of_receipt(figures: dict[str, Any]) -> str:
    """What a finished run measured, and which checkpoint is converted; empty where nothing was measured."""
    first, last = figures.get("validation_first_loss"), figures.get("validation_loss")
    if not isinstance(first, float) or not isinstance(last, float):
        return ""
    of_base = " (of the base)" if figures.get("validation_first_step") == 0 else ""
    text = f", validation loss {first:.4g}{of_base} → {last:.4g}"
    step, loss = figures.get("converted_step"), figures.get("converted_validation_loss")
    if isinstance(step, int) and isinstance(loss, float):
        text += f"; converted is step {step:,} with {loss:.4g}"
    return text
