"""Results of the model's tasks, beside the base's, as the report and the summary show them."""

from typing import Any

from .. import formatting
from .collect import Stage, mapping

HEAD = ["task", "metric", "items", "score (95 %)", "base", "drop", "gates", "cut answers"]


def grids(figures: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """One table with a row for each task; nothing without tasks."""
    rows = []
    for name, task in mapping(figures.get("tasks")).items():
        task = mapping(task)
        gates = ", ".join(f"{key} {_number(task[key])}" for key in ("min", "max_drop") if key in task)
        cells = [name, task.get("metric"), task.get("items"), estimate(task.get("score")), estimate(task.get("base"))]
        cells += [estimate(task.get("drop")), gates, f"{task.get('truncated', '?')} of {task.get('answers', '?')}"]
        rows.append([formatting.clean("" if cell is None else str(cell)) for cell in cells])
    return [("results of the tasks", HEAD, rows)] if rows else []


def line(stage: Stage) -> str:
    """The scores and how many gates passed, in one line; empty where nothing was evaluated."""
    tasks = [
        f"{name} {estimate(mapping(task).get('score'))}" for name, task in mapping(stage.figures.get("tasks")).items()
    ]
    checks = [check for check in stage.checks if check.passed is not None]
    passed = sum(check.passed is True for check in checks)
    return formatting.clean(" · ".join([*tasks, f"{passed} of {len(checks)} gates passed"])) if tasks else ""


def estimate(value: Any) -> str:
    """A mean with its interval; empty where there is none."""
    found = mapping(value)
    if "mean" not in found:
        return ""
    ends = [_number(found[key]) for key in ("low", "high") if found.get(key) is not None]
    return _number(found["mean"]) + (f" ({' to '.join(ends)})" if len(ends) == 2 else "")


def _number(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)
