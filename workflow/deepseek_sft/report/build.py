"""One HTML page on an experiment: arranges what ``collect`` found for the template."""

import dataclasses
import datetime
import json
import shlex
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from .. import __version__
from . import calibration, collect, formatting, overview, plots
from .collect import Stage, mapping

TEMPLATES = Path(__file__).resolve().parents[2] / "templates"
PURPOSE = {
    "prepare_data": "Raw chats to one checked format",
    "tokenize_data": "Chats to token ids and loss masks",
    "plan": "Whether the run fits the cluster",
    "prepare_model": "Base model in BF16",
    "refine_plan": "The plan again, with counted tokens",
    "preflight": "Nodes checked without training",
    "train_preflight": "Nodes checked as training's first step",
    "train": "Full-parameter fine-tuning",
    "convert_checkpoint": "Checkpoint to a Hugging Face folder",
    "verify_model": "Converted model against base and checkpoint",
    "smoke_test": "Served model tested over its API",
}


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
    planned = stages["refine_plan"] if "refine_plan" in stages else stages["plan"]
    compared = calibration.compare(planned, stages["train"], metrics)
    verdict = overview.verdict(stages)
    views = [_view(results, stage, metrics, samples, compared) for stage in stages.values()]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,  # everything on the page but our own drawings is data
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    html = environment.get_template("report.html.j2").render(
        experiment=formatting.clean(results.name),
        verdict=verdict,
        cards=overview.headline(stages, metrics),
        stages=views,
        versions=_versions(stages),
        commands=[(view["rule"], view["command"]) for view in views if view["command"]],
        written=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        workflow_version=__version__,
    )
    figures = {
        "stages_complete": sum(stage.state == "complete" for stage in stages.values()),
        "stages": len(stages),
        "verdict": verdict[1],
        "bytes": len(html.encode()),
        "plots": sum(len(view["plots"]) for view in views),
        "planned_against_measured": {one.name: one.text() for one in compared},
        "calibration": {one.name: round(one.difference_share, 4) for one in compared},
    }
    return Report(html, figures)


def _view(
    results: Path, stage: Stage, metrics: list[dict[str, Any]], samples: int, compared: list[calibration.Comparison]
) -> dict[str, Any]:
    """What the template shows of one stage."""
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
    plain, tables = [], []
    for key, item in figures.items():
        if collect.is_checks(item) or key in ("example", "skipped"):
            continue
        if isinstance(item, dict):
            tables.append((formatting.label(key), _table(item)))
        else:
            plain.append((formatting.label(key), formatting.value(key, item)))
    drawn = plots.training(metrics) if stage.rule == "train" else []
    if stage.rule == "train" and compared:
        tables.append(("planned against measured", [(one.name, one.text(), None) for one in compared]))
    if stage.rule == "tokenize_data":
        statistics = _json(collect.result_path(results, stage, "statistics"))
        drawn = [plot for plot in (plots.lengths(statistics), plots.reasoning_by_answer(statistics)) if plot]
        examples = mapping(mapping(statistics).get("reject_examples"))
        rows = {
            reason: [f"{mapping(one).get('id')}: {mapping(one).get('message')}" for one in found]
            for reason, found in examples.items()
            if isinstance(found, list)
        }
        tables.append(("examples of rejects", _table(rows)))
    transcript = collect.transcript_path(results, stage)
    settings = formatting.without_secrets(mapping(receipt.get("settings")))
    inputs = mapping(receipt.get("inputs"))
    plan = formatting.clean(str(figures.get("verdict") or "")) if stage.rule in ("plan", "refine_plan") else ""
    return {
        "rule": formatting.clean(stage.rule),
        "purpose": PURPOSE.get(stage.rule, ""),
        "word": plan or stage.state,
        "level": "warn" if plan == "tight" else overview.LEVEL.get(stage.state, "none"),
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
        "tables": [(title, rows) for title, rows in tables if rows],
        "plots": [(plot.caption, Markup(plot.svg)) for plot in drawn],  # drawn by us, from numbers only
        "samples": collect.transcript(transcript, figures.get("example"), samples) if figures or transcript else [],
        "log": stage.log,
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


def _table(entries: dict[str, Any]) -> list[tuple[str, str, float | None]]:
    """A figure with parts as rows (label, text, share of the largest or None), largest first where all are counts."""
    numbers = [item for item in entries.values() if isinstance(item, int) and not isinstance(item, bool)]
    if len(numbers) == len(entries) and numbers and min(numbers) >= 0:
        largest = max(numbers) or 1
        ordered = sorted(entries.items(), key=lambda entry: -entry[1])
        return [(formatting.clean(str(key)), formatting.value("", item), item / largest) for key, item in ordered]
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


def _json(path: Path | None) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path else None
    except (OSError, ValueError, RecursionError):
        return None
