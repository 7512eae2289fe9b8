"""One HTML page on an experiment: arranges what ``collect`` found for the template."""

import dataclasses
import datetime
import functools
import shlex
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from .. import __version__
from .. import stages as stage_rows
from ..training import loss_rows, slow_nodes
from . import (
    calibration,
    collect,
    data,
    formatting,
    glance,
    overview,
    plots,
    plots_experts,
    plots_memory,
    plots_stages,
)
from . import samples as chats
from .collect import Stage, mapping
from .drawing import Plot

TEMPLATES = Path(__file__).resolve().parents[2] / "templates"
NOT_IN_TABLES = ("example", "skipped", "samples", "benchmark", loss_rows.KEY)  # figures shown in a form of their own
MOST_COLUMNS = 15  # of a figure drawn as a table of its own


@dataclasses.dataclass(frozen=True)
class Report:
    """The page and what its receipt says of it."""

    html: str
    figures: dict[str, Any]


def build(results: Path, logs: Path | None, samples: int = 8) -> Report:
    """The report of an experiment.

    Args:
        results: ``results/<experiment>``.
        logs: ``logs/<experiment>``, or None.
        samples: exchanges of the transcript to show.

    Raises:
        BadInputError: nothing to report on.
    """
    results = results.resolve()
    collect.check_folder(results, logs)
    stages = collect.stages(results, logs)
    metrics = collect.training_metrics(results, stages["train"])
    planned = glance.last_plan(stages)
    compared = calibration.compare(planned, stages["train"], metrics)
    verdict = overview.verdict(stages)
    views = [_view(results, stage, metrics, samples, compared, planned) for stage in stages.values()]
    html = page(
        "report.html.j2",
        experiment=formatting.clean(results.name),
        verdict=verdict,
        cards=overview.headline(stages, metrics),
        failures=glance.failures(stages),
        facts=glance.facts(stages, collect.config(results), metrics),
        rejected=glance.rejected(stages),
        loss=as_figures(plots.training(metrics)[: has_loss(metrics)]),
        stages=views,
        versions=_versions(stages),
        commands=[(view["rule"], view["command"]) for view in views if view["command"]],
        config=_config(results),
        warnings=[(view["rule"], line) for view in views for line in view["warnings"]],
    )
    figures = {
        "stages_complete": sum(stage.state == "complete" for stage in stages.values()),
        "stages": len(stages),
        "verdict": verdict[1],
        "bytes": len(html.encode()),
        "plots": has_loss(metrics) + sum(len(view["plots"]) for view in views),
        "planned_against_measured": {one.name: one.text() for one in compared},
        "calibration": {one.name: round(one.difference_share, 4) for one in compared},
    }
    return Report(html, figures)


def page(template: str, **content: Any) -> str:
    """A page from one of the templates; when and by which version it was written is added."""
    written = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    return _templates().get_template(template).render(written=written, workflow_version=__version__, **content)


@functools.cache
def _templates() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,  # everything on the page but our own drawings is data
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def as_figures(drawn: list[Plot]) -> list[tuple[str, Markup]]:
    """Plots as the templates take them: caption and markup, which is ours, made from numbers and escaped names."""
    return [(plot.caption, Markup(plot.svg)) for plot in drawn]


def _config(results: Path) -> str:
    """The resolved configuration as YAML, secrets hidden; empty where there is none."""
    hidden = formatting.without_secrets(collect.config(results))
    return formatting.clean(yaml.safe_dump(hidden, sort_keys=False, allow_unicode=True)).strip() if hidden else ""


def _view(
    results: Path,
    stage: Stage,
    metrics: list[dict[str, Any]],
    samples: int,
    compared: list[calibration.Comparison],
    planned: Stage,
) -> dict[str, Any]:
    """What the template shows of one stage."""
    receipt, figures, last_plan = stage.receipt, stage.figures, planned.rule
    slurm = mapping(receipt.get("slurm"))
    hosts = receipt.get("hosts") if isinstance(receipt.get("hosts"), list) else []
    facts = [
        ("finished", str(receipt.get("finished") or "").replace("T", " ").replace("+00:00", " UTC")),
        ("took", formatting.value("seconds", receipt.get("seconds")) if "seconds" in receipt else None),
        ("hosts", _short_list([str(host) for host in hosts])),
        ("Slurm job", slurm.get("job_id")),
        ("partition", slurm.get("partition")),
    ]
    plain, tables = [], []
    grids = [grid for grid in (_speeds(figures.get("benchmark")),) if grid]
    if stage.rule == "prepare_data":
        grids += data.grids(figures)
        figures = {key: item for key, item in figures.items() if key not in data.SHOWN}
    for key, item in figures.items():
        if collect.is_checks(item) or key in NOT_IN_TABLES:
            continue
        if grid := _grid(key, item):
            grids.append(grid)
        elif isinstance(item, dict):
            tables.append((formatting.label(key), _table(item)))
        else:
            plain.append((formatting.label(key), formatting.value(key, item)))
    answered = chats.answered(results, stage) if stage.rule == "smoke_test" else []
    drawn = []
    if stage.rule == "train":
        loads = collect.expert_loads(results, stage)
        training = plots.training(metrics)
        # the loss curve stands at the top of the page
        drawn = [*training[has_loss(metrics) :], *plots_experts.experts(loads, metrics)]
    elif stage.rule in ("plan", "refine_plan"):
        # beside the last plan before training stands what training used
        drawn = [plots_memory.memory(figures, compared if stage.rule == last_plan else [])]
        if stage.rule != last_plan:  # the later plan says all of it again
            drawn, tables, grids = (
                [],
                [("estimated here, counted in refine_plan", _changed(figures, planned.figures))],
                [],
            )
            plain = []
    elif stage.rule == "convert_checkpoint":
        drawn = [plots_stages.throughput(figures)]
    elif stage.rule == "smoke_test":
        drawn = [plots_stages.serving(figures.get("benchmark")), plots_stages.before_and_after(answered)]
    if stage.rule == "train" and compared:
        tables.append(("planned against measured", [(one.name, one.text(), None) for one in compared]))
    if stage.rule == "train" and (slow := slow_nodes.read(results / "train")):
        texts = [(host, formatting.clean(str(entry.get("text", ""))), None) for host, entry in slow.items()]
        tables.append(("slow nodes, which the next start leaves out", texts))
    if stage.rule == "tokenize_data":
        statistics = collect.read_json(collect.result_path(results, stage, "statistics"))
        drawn = [plots.lengths(statistics), plots.reasoning_by_answer(statistics)]
        examples = mapping(mapping(statistics).get("reject_examples"))
        rows = {
            reason: [f"{mapping(one).get('id')}: {mapping(one).get('message')}" for one in found]
            for reason, found in examples.items()
            if isinstance(found, list)
        }
        tables.append(("examples of rejects", _table(rows)))
    transcript = chats.transcript_path(results, stage)
    settings = formatting.without_secrets(mapping(receipt.get("settings")))
    inputs = mapping(receipt.get("inputs"))
    plan = formatting.clean(str(figures.get("verdict") or "")) if stage.rule in ("plan", "refine_plan") else ""
    return {
        "rule": formatting.clean(stage.rule),
        "purpose": stage_rows.BY_NAME[stage.rule].purpose if stage.rule in stage_rows.BY_NAME else "",
        "word": plan or stage.state,
        "level": "warn" if plan == "tight" else (overview.LEVEL | {"not finished": "warn"}).get(stage.state, "none"),
        "note": formatting.clean(stage.note, 500),
        "source": stage.source,
        "facts": [(name, formatting.value("", item)) for name, item in facts if item not in (None, "")],
        "checks": [
            (
                formatting.clean(c.name),
                {True: "passed", False: "failed", None: "skipped"}[c.passed],
                formatting.clean(c.detail),
            )
            for c in stage.checks
        ],
        "figures": plain,
        "grids": grids,
        "tables": [(title, rows) for title, rows in tables if rows],
        "plots": as_figures([plot for plot in drawn if plot]),
        "answered": answered[:samples],
        "samples": []
        if answered or not (figures or transcript)
        else chats.transcript(transcript, figures.get("example"), samples),
        "log": stage.log,
        "warnings": stage.warnings,
        "results": [(str(name), formatting.value("", place)) for name, place in mapping(receipt.get("result")).items()],
        "inputs": [
            (
                str(name),
                formatting.value("", mapping(entry).get("path")),
                str(mapping(entry).get("fingerprint", ""))[:23],
            )
            for name, entry in inputs.items()
        ],
        "settings": formatting.flatten(settings) if settings else [],
        "command": shlex.join(formatting.command_without_secrets(stage.command)),
    }


def has_loss(metrics: list[dict[str, Any]]) -> bool:
    """Whether there is a loss curve to draw."""
    return bool(len(plots.series(metrics, "loss")[0]))


def _changed(first: dict[str, Any], second: dict[str, Any]) -> list[tuple[str, str, float | None]]:
    """Rows of those figures of two plans that differ: estimated → counted."""
    keys = [
        key for key in first if key in second and first[key] != second[key] and not isinstance(first[key], dict | list)
    ]
    return [
        (formatting.label(key), f"{formatting.value(key, first[key])} → {formatting.value(key, second[key])}", None)
        for key in keys
    ]


def _grid(key: str, item: Any) -> tuple[str, list[str], list[list[str]]] | None:
    """A figure whose parts all have parts as a table (title, head, rows), one row for each; None for any other."""
    if not isinstance(item, dict) or not item or not all(isinstance(part, dict) and part for part in item.values()):
        return None
    rows = {str(name): dict(formatting.flatten(part)) for name, part in item.items()}
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    if len(columns) > MOST_COLUMNS:
        return None
    head = ["", *(formatting.label(column).removesuffix(" size") for column in columns)]
    cells = [[formatting.clean(name), *(row.get(c, formatting.UNKNOWN) for c in columns)] for name, row in rows.items()]
    return formatting.label(key), head, cells


def _speeds(benchmark: Any) -> tuple[str, list[str], list[list[str]]] | None:
    """The benchmark as a table (title, head, rows), one row for each number of requests at a time; None without one."""
    rows = {str(at): mapping(row) for at, row in mapping(mapping(benchmark).get("by_concurrency")).items()}
    keys = list(dict.fromkeys(key for row in rows.values() for key in row))
    if not keys:
        return None
    rest = [f"{formatting.label(k)} {formatting.value(k, v)}" for k, v in benchmark.items() if k != "by_concurrency"]
    head = ["requests at a time", *map(formatting.label, keys)]
    cells = [[formatting.clean(at), *(formatting.value(key, row.get(key)) for key in keys)] for at, row in rows.items()]
    return f"speed by requests at a time; {', '.join(rest)}", head, cells


def _table(entries: dict[str, Any]) -> list[tuple[str, str, float | None]]:
    """A figure with parts as rows (label, text, share of the largest or None), largest first where all are counts."""
    numbers = [item for item in entries.values() if isinstance(item, int) and not isinstance(item, bool)]
    if len(numbers) == len(entries) and numbers and min(numbers) >= 0:
        largest = max(numbers) or 1
        ordered = sorted(entries.items(), key=lambda entry: -entry[1])
        return [
            (formatting.label(str(k).removesuffix("_bytes")), formatting.value(str(k), item), item / largest)
            for k, item in ordered
        ]
    return [(formatting.clean(key), text, None) for key, text in formatting.flatten(entries)]


def _versions(stages: dict[str, Stage]) -> list[tuple[str, str, str]]:
    """Rows (package, version, stages) over all receipts; a package appears once for each version found."""
    found: dict[tuple[str, str], list[str]] = {}
    for stage in stages.values():
        for package, version in mapping(stage.receipt.get("versions")).items():
            found.setdefault((str(package), str(version)), []).append(stage.rule)
    ran = sum(bool(stage.receipt) for stage in stages.values())
    ordered = sorted(found.items(), key=lambda entry: (entry[0][0] != "workflow", entry[0][0] != "python", entry[0]))
    return [(*key, "all stages" if len(rules) == ran else ", ".join(rules)) for key, rules in ordered]


def _short_list(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
