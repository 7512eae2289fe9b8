"""Gates on the results of the tasks: which passed, and why those that did not are not passed."""

import dataclasses
from pathlib import Path
from typing import Any

from . import intervals, measured
from .measured import Result, Subject

UNJUDGED = "not judged, so not passed"


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Figures of each task, and of each gate whether it passed and the sentence that says why.

    Attributes:
        tasks: task → its figures, as the receipt has them.
        checks: ``<task>.<gate>`` → {"passed", "detail"}.
    """

    tasks: dict[str, dict[str, Any]]
    checks: dict[str, dict[str, Any]]

    @property
    def failed(self) -> list[str]:
        """One sentence for each gate that is not passed."""
        return [f"{name}: {check['detail']}" for name, check in self.checks.items() if not check["passed"]]


def judge(tasks: dict[str, dict[str, Any]], tuned: dict[str, Result], base: dict[str, Result]) -> Verdict:
    """Judge every gate that is set.

    Args:
        tasks: settings of each task.
        tuned, base: results by task; what is missing is not passed.
    """
    verdict = Verdict({}, {})
    for name, task in tasks.items():
        found, before = tuned.get(name), base.get(name)
        verdict.tasks[name] = _figures(task, found, before) if found else {}
        if task["min"] is not None:
            verdict.checks[f"{name}.min"] = _smallest(task["min"], found)
        if task["max_drop"] is not None:
            verdict.checks[f"{name}.max_drop"] = _largest_drop(task["max_drop"], found, before)
        if not found and not any(check.startswith(f"{name}.") for check in verdict.checks):
            verdict.checks[f"{name}.measured"] = _check(False, f"it has no result: {UNJUDGED}")
    return verdict


def results(folder: Path, subject: Subject, tasks: dict[str, dict[str, Any]]) -> dict[str, Result]:
    """The results that are there."""
    found = {name: measured.read(measured.place(folder, name, subject.of(name, task))) for name, task in tasks.items()}
    return {name: result for name, result in found.items() if result}


def figures_of(found: Result) -> dict[str, Any]:
    """Figures of one result alone."""
    counts = {"metric": found.metric, "items": len(found.scores), "answers": found.answers}
    return counts | {"truncated": found.truncated, "score": _estimate(intervals.mean(list(found.scores.values())))}


def _figures(task: dict[str, Any], found: Result, before: Result | None) -> dict[str, Any]:
    figures = figures_of(found)
    figures |= {name: task[name] for name in ("min", "max_drop") if task[name] is not None}
    if before and before.scores.keys() == found.scores.keys():
        figures["base"] = _estimate(intervals.mean(list(before.scores.values())))
        figures["base_truncated"] = before.truncated
        figures["drop"] = _estimate(_drop(found, before))
    return figures


def _drop(found: Result, before: Result) -> intervals.Estimate:
    return intervals.drop([before.scores[item] for item in found.scores], list(found.scores.values()))


def _smallest(least: float, found: Result | None) -> dict[str, Any]:
    if not found:
        return _check(False, f"it has no result: {UNJUDGED}")
    estimate = intervals.mean(list(found.scores.values()))
    passed = estimate.mean >= least
    return _check(passed, f"{words(estimate)} {'≥' if passed else 'is below'} {least:g}{_cut(found)}")


def _largest_drop(most: float, found: Result | None, before: Result | None) -> dict[str, Any]:
    if not found or not before:
        lacking = "it has no result" if not found else "the base has no result"
        return _check(False, f"{lacking}: {UNJUDGED}")
    if found.scores.keys() != before.scores.keys():
        return _check(False, f"the base was measured on other items: {UNJUDGED}")
    estimate = _drop(found, before)
    if estimate.high is None:
        return _check(False, f"one item alone has no interval: {UNJUDGED}")
    said = f"from the base's {intervals.mean(list(before.scores.values())).mean:.3f} it fell by {words(estimate)}"
    if estimate.high <= most:
        return _check(True, f"{said}, at most {most:g}")
    if estimate.mean <= most:
        return _check(
            False,
            f"{said}: {len(found.scores)} items cannot show that it is at most {most:g} ({UNJUDGED}); more items or "
            "samples narrow the interval",
        )
    return _check(False, f"{said}, more than {most:g}{_cut(found)}")


def said(figures: dict[str, Any]) -> str:
    """A task's figures as one line."""
    text = f"{_told(figures['score'])} of {figures['items']} items"
    text += f", base {_told(figures['base'])}" if "base" in figures else ""
    return text + (f", {figures['truncated']} of {figures['answers']} answers cut" if figures["truncated"] else "")


def _told(estimate: dict[str, float | None]) -> str:
    return words(intervals.Estimate(**estimate))


def words(estimate: intervals.Estimate) -> str:
    """A mean with its interval."""
    if estimate.low is None or estimate.high is None:
        return f"{estimate.mean:.3f}"
    return f"{estimate.mean:.3f} (95 %: {estimate.low:.3f} to {estimate.high:.3f})"


def _cut(found: Result) -> str:
    if not found.truncated:
        return ""
    return f"; {found.truncated} of {found.answers} answers were cut by max_tokens and count as wrong"


def _check(passed: bool, detail: str) -> dict[str, Any]:
    return {"passed": passed, "detail": detail}


def _estimate(estimate: intervals.Estimate) -> dict[str, float | None]:
    return dataclasses.asdict(estimate)
