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

from .. import __version__, formatting
from .. import stages as stage_rows
from ..data import loss_rows
from ..training import gpu_hours
from . import calibration, collect, cost, glance, overview, plots, sections
from . import chat_section as chats
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
    config = collect.config(results)
    run = collect.run_of(results, stages["train"])
    hours = gpu_hours.of(run, metrics) if run else None
    costs, price = cost.of(stages, metrics, config, logs, hours), cost.price_of(config)
    spent = cost.spent_in_training(costs)
    seen = [sections.Seen(results, stage, metrics, compared, planned, hours, spent) for stage in stages.values()]
    views = [_view(one, samples) for one in seen]
    if table := cost.grid(costs, price):
        next(view for view in views if view["rule"] == "train")["grids"].append(table)
    html = page(
        "report.html.j2",
        experiment=formatting.clean(results.name),
        verdict=verdict,
        cards=overview.headline(stages, metrics),
        failures=glance.failures(stages),
        facts=glance.facts(stages, config, metrics)
        + [("cost", text) for text in [cost.sentence(costs, price)] if text],
        rejected=glance.rejected(stages),
        loss=as_figures(plots.training(metrics)[: sections.has_loss(metrics)]),
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
        "plots": sections.has_loss(metrics) + sum(len(view["plots"]) for view in views),
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


def _view(seen: sections.Seen, samples: int) -> dict[str, Any]:
    """What the template shows of one stage."""
    results, stage = seen.results, seen.stage
    receipt, figures = stage.receipt, stage.figures
    slurm = mapping(receipt.get("slurm"))
    hosts = receipt.get("hosts") if isinstance(receipt.get("hosts"), list) else []
    facts = [
        ("finished", str(receipt.get("finished") or "").replace("T", " ").replace("+00:00", " UTC")),
        ("took", formatting.value("seconds", receipt.get("seconds")) if "seconds" in receipt else None),
        ("hosts", _short_list([str(host) for host in hosts])),
        ("Slurm job", slurm.get("job_id")),
        ("partition", slurm.get("partition")),
    ]
    own = sections.parts(seen)
    figures = {key: item for key, item in figures.items() if key not in own.shown}
    plain, tables = [], []
    grids = [] if own.instead else [grid for grid in (_speeds(figures.get("benchmark")),) if grid] + own.grids
    for key, item in ({} if own.instead else figures).items():
        if collect.is_checks(item) or key in NOT_IN_TABLES:
            continue
        if grid := _grid(key, item):
            grids.append(grid)
        elif isinstance(item, dict):
            tables.append((formatting.label(key), sections.table(item)))
        else:
            plain.append((formatting.label(key), formatting.value(key, item)))
    transcript = chats.transcript_path(results, stage)
    settings = formatting.without_secrets(mapping(receipt.get("settings")))
    inputs = mapping(receipt.get("inputs"))
    return {
        "rule": formatting.clean(stage.rule),
        "purpose": stage_rows.BY_NAME[stage.rule].purpose if stage.rule in stage_rows.BY_NAME else "",
        "word": own.verdict or stage.state,
        "level": "warn"
        if own.verdict == "tight"
        else (overview.LEVEL | {"not finished": "warn"}).get(stage.state, "none"),
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
        "tables": [(title, rows) for title, rows in [*tables, *own.tables] if rows],
        "plots": as_figures([plot for plot in own.plots if plot]),
        "answered": own.answered[:samples],
        "samples": []
        if own.answered or not (figures or transcript)
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
