"""The experiment at a glance: one verdict, the numbers that matter, and both as a few lines for a terminal."""

import itertools
from pathlib import Path
from typing import Any

from .. import formatting
from .. import stages as stage_rows
from . import chat_section, collect, evaluation_section, plots, validation_rows
from .collect import Stage, mapping

LEVEL = {"complete": "good", "failed": "bad", "unreadable": "bad", "out of date": "warn", "result gone": "warn"}


def verdict(stages: dict[str, Stage]) -> tuple[str, str]:
    """Level (good, warn, bad) and one sentence on the whole experiment."""
    counted = [stage for stage in stages.values() if stage.state != "not run" or not _advisory(stage.rule)]
    by_state = {state: [stage.rule for stage in counted if stage.state == state] for state in LEVEL}
    missing = [stage.rule for stage in counted if stage.state in ("not run", "not finished")]
    problems = [f"{state}: {', '.join(rules)}" for state in LEVEL if state != "complete" and (rules := by_state[state])]
    if problems:
        text = " · ".join(problems)
        bad = by_state["failed"] or by_state["unreadable"]
        return "bad" if bad else "warn", f"{text[0].upper()}{text[1:]}"
    if missing:
        return "warn", f"Not complete: {missing[0]} is next"
    return "good", "Complete: every stage passed"


def level(state: str) -> str:
    """Level of one stage's state: good, warn, bad, or none."""
    return (LEVEL | {"not finished": "warn"}).get(state, "none")


def _advisory(rule: str) -> bool:
    """Whether an experiment is complete without it."""
    return rule in stage_rows.BY_NAME and stage_rows.BY_NAME[rule].advisory


def headline(stages: dict[str, Stage], metrics: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """The numbers that matter most, as (label, value, note); unknown ones stay in their place."""
    unknown, value = formatting.UNKNOWN, formatting.value
    train, tokens, model = (
        stages["train"].figures,
        stages["tokenize_data"].figures,
        stages["convert_checkpoint"].figures,
    )
    trained = bool(stages["train"].receipt)
    count = train.get("samples", tokens.get("samples"))
    trained_tokens, in_data = train.get("trained_tokens"), tokens.get("trained_tokens")
    seen = f"{value('tokens', trained_tokens)} tokens with loss" if trained_tokens is not None else ""
    if _positive(trained_tokens) and _positive(in_data):
        passes = trained_tokens / in_data
        seen += f", {passes:.3g} × the data"
        if passes < 0.99 and _positive(count):  # ended before every sample was seen once
            count = f"≈ {round(count * passes):,}"
    steps = f"{value('steps', train['steps'])} steps" if "steps" in train else ""
    label, hours, hours_note = _accelerator_hours(stages["train"])
    first, last = first_and_last_loss(stages["train"], metrics)
    has_loss = isinstance(first, (int, float)) and isinstance(last, (int, float))
    checks = [check for check in stages["smoke_test"].checks if check.passed is not None]
    passed = sum(check.passed is True for check in checks)
    smoke = ("passed" if passed == len(checks) else "failed") if checks else stages["smoke_test"].state
    place = mapping(stages["convert_checkpoint"].receipt.get("result")).get("model", "")
    size = model.get("bytes", model.get("bytes_written"))
    parameters = f"{value('parameters', model['parameters'])} parameters" if "parameters" in model else ""
    return [
        (
            "samples trained",
            value("samples", count) if trained else unknown,
            seen,
        ),
        (
            "loss",
            f"{first:.3g} → {last:.3g}" if has_loss else unknown,
            steps + validation_rows.of_receipt(train),
        ),
        (label, hours, hours_note),
        ("model", value("bytes", size), ", ".join(filter(None, (parameters, formatting.value("", place))))),
        ("smoke test", smoke, f"{passed} of {len(checks)} checks" if checks else ""),
    ]


def first_and_last_loss(train: Stage, metrics: list[dict[str, Any]]) -> tuple[float | None, float | None]:
    """Loss of the first and the last step, from the receipt, else from the metrics."""
    _, loss = plots.series(metrics, "loss")
    ends = (float(loss[0]), float(loss[-1])) if len(loss) else (None, None)
    return train.figures.get("first_loss", ends[0]), train.figures.get("last_loss", ends[1])


def _accelerator_hours(train: Stage) -> tuple[str, str, str]:
    """Label, value and note of the hours that all ranks together took."""
    figures = train.figures
    command = train.command
    asked = dict(itertools.pairwise(command)).get("--accelerator", "cuda")
    label = "CPU rank hours" if figures.get("accelerator", asked) == "cpu" else "GPU hours"
    ranks, seconds = figures.get("world_size"), figures.get("seconds", train.receipt.get("seconds"))
    if not isinstance(ranks, (int, float)) or not isinstance(seconds, (int, float)):
        return label, formatting.UNKNOWN, ""
    return label, formatting.plain(ranks * seconds / 3600), f"{ranks:,} ranks × {formatting.duration(seconds)}"


def _positive(item: Any) -> bool:
    return isinstance(item, (int, float)) and item > 0


def summary(results: Path, logs: Path | None) -> str:
    """A few lines for a terminal: verdict, loss, an answer of the served model, smoke test, where the report lies."""
    results = results.resolve()
    collect.check_folder(results, logs)
    stages = collect.stages(results, logs)
    metrics = collect.training_metrics(results, stages["train"])
    cards = {label: (value, note) for label, value, note in headline(stages, metrics)}
    transcript = chat_section.transcript_path(results, stages["smoke_test"])
    example = stages["smoke_test"].figures.get("example")
    shown = chat_section.transcript(None if example else transcript, example, 1)
    report = results / "report.html"
    rows = [("experiment", f"{results.name}: {verdict(stages)[1]}")]
    rows += [(name, " · ".join(filter(None, cards[name]))) for name in ("loss", "model", "smoke test")]
    if evaluated := evaluation_section.line(stages["evaluate"]) if "evaluate" in stages else "":
        rows.append(("evaluation", evaluated))
    for sample in shown:
        rows += [("asked", sample.question), ("reasoning", sample.reasoning or "none"), ("answer", sample.answer)]
    rows.append(("report", str(report) if report.exists() else "not built yet"))
    return "\n".join(f"{name + ':':<12}{_one_line(text)}" for name, text in rows)


def _one_line(text: str, most: int = 240) -> str:
    return formatting.clean(" ".join(text.split()), most)
