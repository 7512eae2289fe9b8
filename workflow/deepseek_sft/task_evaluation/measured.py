"""Results of one task and one model, kept under a name that says of what: they hold for as long as none of it changes.

File (JSON)::

    {"schema": 1, "key": …, "of": {"model", "served", "template", "task"}, "metric": …,
     "items": {id: [score of each answer, …]}, "truncated": answers cut by their budget, "answers": their number,
     "completion_tokens": …, "seconds": …, "versions": {"lm_eval": …}, "transcript": path}
"""

import dataclasses
import statistics
from pathlib import Path
from typing import Any

from .. import files, json_files
from . import items

SCHEMA = 1
BASES = "evaluated_bases"  # folder beside the experiments: a base's results serve all of them
REASON = "not_measured.json"
NEEDS = {"items": dict, "truncated": int, "answers": int, "metric": str}


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is evaluated.

    Attributes:
        model: fingerprint of its weights.
        served: settings of the deployment that shape answers.
        template: training's chat template.
    """

    model: str
    served: dict[str, Any]
    template: str

    def of(self, name: str, task: dict[str, Any]) -> dict[str, Any]:
        """All that a result follows from; raises BadInputError where the task's files cannot be read."""
        return dataclasses.asdict(self) | {"task": items.content(name, task)}


@dataclasses.dataclass(frozen=True)
class Result:
    """Results of one task.

    Attributes:
        scores: item → mean score of its answers.
        answers: how many were asked for.
        truncated: how many of them their budget cut.
        metric: what the scores are.
    """

    scores: dict[str, float]
    answers: int
    truncated: int
    metric: str
    path: Path


def place(folder: Path, name: str, of: dict[str, Any]) -> Path:
    """Where the result that follows from ``of`` lies."""
    return folder / f"{name}-{files.digest(of)}.json"


def read(path: Path) -> Result | None:
    """A kept result; None where there is none that can be used."""
    try:
        value = json_files.load(path)
        json_files.require(value, NEEDS)
    except (OSError, ValueError):
        return None
    scores = value["items"]
    if value.get("schema") != SCHEMA or not scores or not all(isinstance(one, list) and one for one in scores.values()):
        return None
    means = {item: statistics.fmean(answers) for item, answers in scores.items()}
    return Result(means, value["answers"], value["truncated"], value["metric"], path)


def missing(folder: Path, subject: Subject, tasks: dict[str, dict[str, Any]]) -> dict[str, Path]:
    """Tasks that are not measured, and where their results will lie."""
    found = {name: place(folder, name, subject.of(name, task)) for name, task in tasks.items()}
    return {name: path for name, path in found.items() if read(path) is None}


def write(path: Path, of: dict[str, Any], result: dict[str, Any]) -> None:
    """Keep a result of ``lm_eval_run``."""
    files.write_json(path, {"schema": SCHEMA, "key": path.stem.rpartition("-")[2], "of": of} | result)
