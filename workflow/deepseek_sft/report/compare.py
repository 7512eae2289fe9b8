"""One page on several experiments: a table of what matters, the settings in which they differ, losses in one plot."""

import itertools
from pathlib import Path
from typing import Any

from .. import formatting
from . import collect, drawing, overview, plots
from .build import as_figures, page
from .collect import Stage, mapping
from .drawing import SERIES, Plot

LINES = SERIES[:4]  # the colours with enough contrast on both pages; then the same, dashed
DASHES = ("-", "--", ":", "-.")
FIGURES = (  # of a stage's receipt, beside the headline
    ("train", "steps"),
    ("train", "tokens_per_second"),
    ("train", "mfu"),
    ("train", "peak_memory_gib"),
    ("convert_checkpoint", "seconds"),
    ("smoke_test", "format_rate"),
    ("smoke_test", "exact_match_rate"),
    ("smoke_test", "time_to_first_token_s"),
    ("smoke_test", "tokens_per_second"),
)
NOT_COMPARED = ("experiment", "results")


def compare(folders: list[tuple[Path, Path | None]]) -> str:
    """The page.

    Args:
        folders: results folder and logs of each experiment; names that are equal are told apart by their folders.

    Raises:
        BadInputError: nothing to report on at one of them.
    """
    results = [folder.resolve() for folder, _ in folders]
    for place, (_, logs) in zip(results, folders, strict=True):
        collect.check_folder(place, logs)
    stages = [collect.stages(place, logs) for place, (_, logs) in zip(results, folders, strict=True)]
    metrics = [collect.training_metrics(place, found["train"]) for place, found in zip(results, stages, strict=True)]
    names = _names(results)
    verdicts = [overview.verdict(found) for found in stages]
    cards = [overview.headline(*both) for both in zip(stages, metrics, strict=True)]
    rows = _headline_rows(cards) + _figure_rows(stages)
    return page(
        "comparison.html.j2",
        names=names,
        verdicts=[(name, *verdict) for name, verdict in zip(names, verdicts, strict=True)],
        figures=rows,
        settings=differences([_compared(place) for place in results]),
        plots=as_figures(list(itertools.chain(*(_overlaid(names, metrics, *one) for one in OVERLAID)))),
    )


def differences(configs: list[dict[str, Any]]) -> list[list[str]]:
    """Rows (key, value in each) of the settings that are not the same in all configurations; secrets are hidden."""
    flat = [dict(formatting.flatten(formatting.without_secrets(config))) for config in configs]
    keys = dict.fromkeys(key for one in flat for key in one)
    rows = [[key, *(one.get(key, formatting.UNKNOWN) for one in flat)] for key in keys]
    return [[formatting.clean(text) for text in row] for row in rows if len(set(row[1:])) > 1]


OVERLAID = (("loss", "losses", "Loss"), ("tokens_per_second", "speeds", "Tokens per second, all ranks"))
UNITS = {"loss": "nats a token", "tokens_per_second": "tokens / s"}


def _overlaid(names: list[str], metrics: list[list[dict[str, Any]]], key: str, name: str, title: str) -> list[Plot]:
    """One metric of all experiments over steps, smoothed where there are many points; nothing where none has it."""
    found = [(label, *plots.series(lines, key)) for label, lines in zip(names, metrics, strict=True)]
    if not any(len(steps) for _, steps, _ in found):
        return []
    figure, (axes, below) = drawing.figure((2.6, 0.1 + 0.17 * len(found)), 2.8 + 0.17 * len(found), share_x=False)
    smoothed = False
    for number, (label, steps, values) in enumerate(found):
        if not len(steps):
            continue
        if len(steps) >= plots.SMOOTHED_FROM:
            values, smoothed = plots.smooth(values, plots.smoothing_window(len(steps))), True
        style = DASHES[number // len(LINES) % len(DASHES)]
        drawing.line(axes, steps, values, LINES[number % len(LINES)], label=label, linestyle=style)
    drawing.steps_axis(axes)
    drawing.y_axis(axes, drawing.compact, from_zero=key != "loss")
    axes.set_ylabel(UNITS[key])
    handles, labels = axes.get_legend_handles_labels()
    below.set_axis_off()
    drawing.legend(below, handles=handles, labels=labels, loc="upper left", labelspacing=0.25)
    caption = f"{title}{', moving averages' if smoothed else ''}"
    return [Plot(name, caption, drawing.svg(figure, name, f"{caption} of {', '.join(labels)}"))]


def _headline_rows(cards: list[list[tuple[str, str, str]]]) -> list[list[str]]:
    """The numbers that matter most, one row each: the label of the first, the values of all."""
    rows = []
    for same in zip(*cards, strict=True):
        labels = list(dict.fromkeys(label for label, _, _ in same))
        texts = [f"{value} ({note})" if note else value for _, value, note in same]
        rows.append([" / ".join(labels), *map(formatting.clean, texts)])
    return rows


def _figure_rows(stages: list[dict[str, Stage]]) -> list[list[str]]:
    rows = []
    for rule, key in FIGURES:
        values = [found[rule].figures.get(key) for found in stages]
        if any(value is not None for value in values):
            rows.append([f"{rule}: {formatting.label(key)}", *(formatting.value(key, value) for value in values)])
    losses = [mapping(found["smoke_test"].figures.get("loss")).get("tuned") for found in stages]
    if any(drawing.is_number(loss) for loss in losses):
        rows.append(["smoke_test: loss on held-out references", *(formatting.value("loss", loss) for loss in losses)])
    return rows


def _names(results: list[Path]) -> list[str]:
    names = [place.name for place in results]
    return [formatting.clean(str(place) if names.count(place.name) > 1 else place.name) for place in results]


def _compared(results: Path) -> dict[str, Any]:
    return {key: item for key, item in collect.config(results).items() if key not in NOT_COMPARED}
