"""What a reader wants to know in the first minute: what ran, with which settings, when; why it failed."""

import datetime
from typing import Any

from .. import formatting
from . import plots
from .collect import Stage, mapping

MANY_REJECTS = 0.1  # share of the records above which the top of the page says so
FAILED_CHECKS = 12


def facts(stages: dict[str, Stage], config: dict[str, Any], metrics: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Rows (name, text) on the run: learning rate, batch, nodes, base, template, date; unknown ones are left out."""
    train = stages["train"]
    settings = mapping(config.get("train")) | mapping(train.receipt.get("settings"))
    rows = [
        ("learning rate", _rate(settings)),
        ("batch", _batch(stages, settings, metrics)),
        ("nodes", _nodes(stages)),
        ("base", _base(stages, config)),
        ("template", _template(stages, config)),
        ("when", _when(stages)),
    ]
    return [(name, formatting.clean(text, 300)) for name, text in rows if text]


def _rate(settings: dict[str, Any]) -> str:
    rate = settings.get("learning_rate")
    if not _number(rate):
        return ""
    return ", ".join(filter(None, [f"{rate:g} at most", str(settings.get("lr_schedule") or "")]))


def _batch(stages: dict[str, Stage], settings: dict[str, Any], metrics: list[dict[str, Any]]) -> str:
    """Samples and tokens of an optimizer step, as run, else as planned."""
    figures, plan = stages["train"].figures, last_plan(stages).figures
    ranks, size = figures.get("world_size"), settings.get("sequence_parallel_size")
    parts = [settings.get("micro_batch_size"), settings.get("gradient_accumulation_steps")]
    samples = plan.get("global_batch")
    if all(_number(item) and item > 0 for item in (ranks, size, *parts)):
        samples = parts[0] * parts[1] * (ranks // size)
    _, tokens = plots.series(metrics, "tokens")
    each = float(tokens.mean()) if len(tokens) else None
    words = [f"{formatting.plain(samples)} samples a step" if _number(samples) else ""]
    words.append(f"{formatting.plain(round(each))} tokens a step" if each else "")
    return ", ".join(filter(None, words))


def _nodes(stages: dict[str, Stage]) -> str:
    figures, plan = stages["train"].figures, last_plan(stages).figures
    nodes, ranks = figures.get("nodes", plan.get("nodes")), figures.get("world_size", plan.get("ranks"))
    if not _number(nodes):
        return ""
    planned = "" if "nodes" in figures else " planned"
    return f"{nodes:,}{planned}" + (f", {ranks:,} ranks" if _number(ranks) else "")


def _base(stages: dict[str, Stage], config: dict[str, Any]) -> str:
    model = mapping(config.get("model"))
    parameters = stages["prepare_model"].figures.get("parameters", last_plan(stages).figures.get("parameters"))
    size = f"{formatting.value('parameters', parameters)} parameters" if _number(parameters) else ""
    if model.get("base"):
        return ", ".join(filter(None, [str(model["base"]), size]))
    return ", ".join(filter(None, ["a small random model (model.tiny)" if model.get("tiny") else "", size]))


def _template(stages: dict[str, Stage], config: dict[str, Any]) -> str:
    settings = mapping(stages["tokenize_data"].receipt.get("settings"))
    return str(settings.get("template") or mapping(config.get("data")).get("template") or "")


def _when(stages: dict[str, Stage]) -> str:
    """From the first start to the last end, and what lies between: waiting and other starts included."""
    times = [
        (stage.receipt.get("started"), stage.receipt.get("finished")) for stage in stages.values() if stage.receipt
    ]
    try:
        begun = min(datetime.datetime.fromisoformat(str(start)) for start, _ in times)
        ended = max(datetime.datetime.fromisoformat(str(end)) for _, end in times)
        took = formatting.duration(max(0.0, (ended - begun).total_seconds()))
    except (ValueError, TypeError):
        return ""
    same = begun.date() == ended.date()
    return f"{begun:%Y-%m-%d %H:%M} to {ended:{'%H:%M' if same else '%Y-%m-%d %H:%M'}} UTC, {took} in all"


def last_plan(stages: dict[str, Stage]) -> Stage:
    """The plan with counted tokens where there is one, else that from estimates."""
    refined = stages.get("refine_plan")
    return refined if refined and refined.receipt else stages["plan"]


def rejected(stages: dict[str, Stage]) -> str:
    """A sentence where many records are not trained on; empty otherwise."""
    figures = stages["prepare_data"].figures
    count, records = figures.get("rejected"), figures.get("records")
    if not (_number(count) and _number(records) and records > 0 and count / records > MANY_REJECTS):
        return ""
    reasons = {str(name): n for name, n in mapping(figures.get("rejects")).items() if _number(n)}
    shown = ", ".join(f"{name} {n:,}" for name, n in sorted(reasons.items(), key=lambda item: -item[1])[:4])
    text = (
        f"{count:,} of {records:,} records were rejected ({count / records:.0%}): {shown}; data/rejects.jsonl has each"
    )
    return formatting.clean(text, 500)


def failures(stages: dict[str, Stage]) -> list[dict[str, Any]]:
    """Each stage that failed or ended without a receipt, with its error and the checks that failed."""
    found = []
    for stage in stages.values():
        checks = [
            (formatting.clean(check.name), formatting.clean(check.detail))
            for check in stage.checks
            if check.passed is False
        ]
        if stage.state in ("failed", "unreadable") or (stage.state == "not finished" and stage.error):
            reason = stage.error if not checks else _fix_alone(stage.error)
            found.append(
                {
                    "rule": formatting.clean(stage.rule),
                    "checks": checks[:FAILED_CHECKS],
                    "passed": sum(check.passed is True for check in stage.checks),
                    "reason": reason or ("" if checks else formatting.clean(stage.note, 500)),
                }
            )
    return found


def _fix_alone(error: str) -> str:
    """The error without the list of checks, which the table has."""
    lines = error.splitlines()
    return "\n".join(line for line in lines if line.lstrip().startswith("fix:")).strip()


def _number(item: Any) -> bool:
    return isinstance(item, (int, float)) and not isinstance(item, bool)
