"""What the report shows of a stage beside its figures: one function for each stage that has something of its own."""

import dataclasses
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from .. import formatting
from ..training import slow_nodes
from ..training.gpu_hours import GpuHours
from . import calibration, collect, data_section, evaluation_section, plots, plots_experts, plots_memory, plots_stages
from . import chat_section as chats
from .collect import Stage, mapping
from .drawing import Plot

Rows = list[tuple[str, str, float | None]]  # label, text, share of the largest


@dataclasses.dataclass(frozen=True)
class Seen:
    """What a section may draw on.

    Attributes:
        compared: planned against measured.
        planned: the last plan before training.
        hours: of the training run, where its starts were noted.
        spent: GPU hours of all attempts of training, where they are told.
    """

    results: Path
    stage: Stage
    metrics: list[dict[str, Any]]
    compared: list[calibration.Comparison]
    planned: Stage
    hours: GpuHours | None = None
    spent: float | None = None


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a section has of its own.

    Attributes:
        grids: tables (title, head, rows), before those made from figures.
        tables: title and rows, after those made from figures.
        answered: answers of the served model.
        shown: names of figures that are shown by these.
        instead: nothing is made from other figures.
        verdict: a word that stands in place of the stage's state.
    """

    plots: list[Plot | None] = dataclasses.field(default_factory=list)
    grids: list[tuple[str, list[str], list[list[str]]]] = dataclasses.field(default_factory=list)
    tables: list[tuple[str, Rows]] = dataclasses.field(default_factory=list)
    answered: list[chats.Answered] = dataclasses.field(default_factory=list)
    shown: Collection[str] = ()
    instead: bool = False
    verdict: str = ""


def prepare_data(seen: Seen) -> Parts:
    return Parts(grids=data_section.grids(seen.stage.figures), shown=data_section.SHOWN)


def tokenize_data(seen: Seen) -> Parts:
    statistics = collect.read_json(collect.result_path(seen.results, seen.stage, "statistics"))
    examples = mapping(mapping(statistics).get("reject_examples"))
    rows = {
        reason: [f"{mapping(one).get('id')}: {mapping(one).get('message')}" for one in found]
        for reason, found in examples.items()
        if isinstance(found, list)
    }
    drawn = [plots.lengths(statistics), plots.reasoning_by_answer(statistics)]
    return Parts(plots=drawn, tables=[("examples of rejects", table(rows))], shown=("row_quantiles",))


def plan(seen: Seen) -> Parts:
    """The last plan before training beside what training used; an earlier one only where the later one differs."""
    figures = seen.stage.figures
    verdict = formatting.clean(str(figures.get("verdict") or ""))
    if seen.stage.rule == seen.planned.rule:
        return Parts(plots=[plots_memory.memory(figures, seen.compared)], verdict=verdict)
    changed = [("estimated here, counted in refine_plan", _changed(figures, seen.planned.figures))]
    return Parts(tables=changed, instead=True, verdict=verdict)


def train(seen: Seen) -> Parts:
    loads = collect.expert_loads(seen.results, seen.stage)
    # the loss curve stands at the top of the page
    drawn = [*plots.training(seen.metrics)[has_loss(seen.metrics) :], *plots_experts.experts(loads, seen.metrics)]
    tables = [("planned against measured", [(one.name, one.text(), None) for one in seen.compared])]
    hours = seen.hours.rows(seen.spent) if seen.hours else []
    tables.append(("GPU hours", [(name, text, None) for name, text in hours]))
    slow = slow_nodes.read(seen.results / "train")
    texts = [(host, formatting.clean(str(entry.get("text", ""))), None) for host, entry in slow.items()]
    return Parts(plots=drawn, tables=[*tables, ("slow nodes, which the next start leaves out", texts)])


def convert_checkpoint(seen: Seen) -> Parts:
    return Parts(plots=[plots_stages.throughput(seen.stage.figures)])


def smoke_test(seen: Seen) -> Parts:
    answered = chats.answered(seen.results, seen.stage)
    drawn = [plots_stages.serving(seen.stage.figures.get("benchmark")), plots_stages.before_and_after(answered)]
    return Parts(plots=drawn, answered=answered)


def evaluate(seen: Seen) -> Parts:
    return Parts(grids=evaluation_section.grids(seen.stage.figures), shown=("tasks",))


PARTS: dict[str, Callable[[Seen], Parts]] = {
    "prepare_data": prepare_data,
    "tokenize_data": tokenize_data,
    "plan": plan,
    "refine_plan": plan,
    "train": train,
    "convert_checkpoint": convert_checkpoint,
    "smoke_test": smoke_test,
    "evaluate_base": evaluate,
    "evaluate": evaluate,
}


def parts(seen: Seen) -> Parts:
    """What the stage's section has of its own; nothing for most."""
    return PARTS[seen.stage.rule](seen) if seen.stage.rule in PARTS else Parts()


def has_loss(metrics: list[dict[str, Any]]) -> bool:
    """Whether there is a loss curve to draw."""
    return bool(len(plots.series(metrics, "loss")[0]))


def table(entries: dict[str, Any]) -> Rows:
    """A figure with parts as rows, largest first where all are counts."""
    numbers = [item for item in entries.values() if isinstance(item, int) and not isinstance(item, bool)]
    if len(numbers) == len(entries) and numbers and min(numbers) >= 0:
        largest = max(numbers) or 1
        ordered = sorted(entries.items(), key=lambda entry: -entry[1])
        return [
            (formatting.label(str(k).removesuffix("_bytes")), formatting.value(str(k), item), item / largest)
            for k, item in ordered
        ]
    return [(formatting.clean(key), text, None) for key, text in formatting.flatten(entries)]


def _changed(first: dict[str, Any], second: dict[str, Any]) -> Rows:
    """Those figures of two plans that differ: estimated → counted."""
    keys = [
        key for key in first if key in second and first[key] != second[key] and not isinstance(first[key], dict | list)
    ]
    return [
        (formatting.label(key), f"{formatting.value(key, first[key])} → {formatting.value(key, second[key])}", None)
        for key in keys
    ]
