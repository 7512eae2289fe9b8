"""What an experiment tracker is given of a run: metrics by step, settings, figures; no path, host or text of data."""

import dataclasses
import math
from pathlib import Path
from typing import Any

from . import collect
from .collect import mapping

LONGEST = 500  # characters of a setting
PRIVATE = ("environment", "secrets_file", "run_name")  # settings of training that may name places or people


@dataclasses.dataclass(frozen=True)
class Tracked:
    """One run.

    Attributes:
        run_id: of training, by which a tracker knows the run again.
        name: of the experiment.
        ended: whether the receipt of training is there.
        settings: name → text.
        figures: ``<rule>/<figure>`` → number, from receipts.
        steps: step, seconds since 1970, name → number; oldest first.
    """

    run_id: str
    name: str
    ended: bool
    settings: dict[str, str]
    figures: dict[str, float]
    steps: list[tuple[int, float, dict[str, float]]]


def of(results: Path) -> Tracked | None:
    """The run of an experiment's folder; None where training has not come to a step."""
    stages = collect.stages(results, None)
    train = stages["train"]
    run = collect.run_of(results, train)
    lines = collect.training_metrics(results, train)
    if run is None or not lines:
        return None
    settings = mapping(mapping(collect.read_json(run / "settings.json")).get("settings"))
    chosen = {f"train.{key}": value for key, value in settings.items() if key not in PRIVATE}
    return Tracked(
        run_id=run.name,
        name=results.resolve().name,
        ended=bool(train.receipt),
        settings={key: str(value)[:LONGEST] for key, value in sorted(chosen.items())},
        figures={
            f"{rule}/{key}": float(value)
            for rule, stage in stages.items()
            for key, value in stage.figures.items()
            if stage.receipt and _is_number(value)
        },
        steps=_timed(lines, (run / "metrics.jsonl").stat().st_mtime),
    )


def _timed(lines: list[dict[str, Any]], ended: float) -> list[tuple[int, float, dict[str, float]]]:
    """Metrics with the time at which each step ended, reckoned back from the last: pauses are left out."""
    found, now = [], ended
    for number in range(len(lines) - 1, -1, -1):
        line, before = lines[number], lines[number - 1]["step"] if number else 0
        values = {key: float(value) for key, value in line.items() if key != "step" and _is_number(value)}
        found.append((line["step"], now, values))
        now -= values.get("seconds", 0.0) * (line["step"] - before)
        now -= values.get("seconds_save", 0.0) + values.get("seconds_validation", 0.0)
    return found[::-1]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
