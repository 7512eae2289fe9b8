"""What the stages on GPUs were planned to take, took, and lost: GPU hours, and money where a price is told.

``attempts.tsv`` beside a rule's logs, written by stage.sh, has a line for the beginning of each attempt (``begin``,
log, seconds since 1970, nodes, GPUs of a node) and for its end (``end``, log, seconds, exit code). An attempt without
an end was killed, or still runs: the time of its log stands for it.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

from ..training import gpu_hours
from ..training.gpu_hours import GpuHours
from . import glance, plots
from .collect import Stage, mapping

RULES = (
    "preflight",
    "rehearse",
    "train",
    "smoke_test",
    "evaluate_base",
    "evaluate",
)  # those that hold GPUs; a deployment is not counted
TRAINING = ("preflight", "rehearse", "train")  # on training's nodes
PLANNED = {"training": ("train",), "evaluation": ("evaluate_base", "evaluate")}  # the latter in smoke_test's job
FILE = "attempts.tsv"
HOUR = 3600


@dataclasses.dataclass(frozen=True)
class Attempt:
    """One attempt of a stage.

    Attributes:
        seconds: from its beginning to its end.
        gpus: of all its nodes; None where Slurm did not say.
        code: exit code; None where it was killed or still runs.
        last: whether none came after it.
    """

    seconds: float
    gpus: int | None
    code: int | None
    last: bool


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one stage, in GPU hours.

    Attributes:
        lost: of what was spent: in training all but the steps that count and their validation (``gpu_hours.lost``);
            elsewhere the attempts that failed.
        attempts: their number; None where only the receipt of the last one is known.
    """

    rule: str
    planned: tuple[float, float] | None
    spent: float
    lost: float
    attempts: int | None


def attempts(logs: Path | None, rule: str) -> list[Attempt]:
    """The attempts of a rule, in their order."""
    try:
        text = (logs / rule / FILE).read_text(encoding="utf-8", errors="replace") if logs else ""
    except OSError:
        return []
    begun: dict[str, tuple[float, int | None]] = {}
    ended: dict[str, tuple[float, int]] = {}
    for line in text.splitlines():
        kind, *fields = line.split("\t")
        try:
            if kind == "begin" and len(fields) == 4:
                name, at, nodes, each = fields
                begun[name] = float(at), int(nodes) * int(each) if each.isdecimal() else None
            elif kind == "end" and len(fields) == 3:
                ended[fields[0]] = float(fields[1]), int(fields[2])
        except ValueError:
            continue  # a torn line
    found = []
    for number, (name, (begin, gpus)) in enumerate(begun.items(), 1):
        end, code = ended.get(name, (None, None))
        if end is None:
            try:
                end = (logs / rule / name).stat().st_mtime  # type: ignore[operator]  # there are logs
            except OSError:
                end = begin
        found.append(Attempt(max(0.0, end - begin), gpus, code, number == len(begun)))
    return found


def of(
    stages: dict[str, Stage],
    metrics: list[dict[str, Any]],
    config: dict[str, Any],
    logs: Path | None,
    hours: GpuHours | None = None,
) -> list[Cost]:
    """What each stage on GPUs cost that has begun or is planned; nothing on CPUs.

    Args:
        metrics: of training.
        config: as resolved.
        logs: of the experiment.
        hours: of the training run, where its starts were noted.
    """
    if config.get("accelerator") != "cuda":
        return []
    found = []
    for rule in RULES:
        stage = stages.get(rule)
        made, gpus = attempts(logs, rule), _gpus(rule, stages, config)
        each = [one.seconds * (one.gpus or gpus) / HOUR for one in made]
        if not made and stage and (seconds := _receipt_seconds(stage)):
            each = [seconds * gpus / HOUR]
        planned = _planned(rule, glance.last_plan(stages).figures)
        spent = sum(each)
        if rule == "train":
            lost = gpu_hours.lost(spent, hours.served if hours else _steps_seconds(metrics) * gpus / HOUR)
        else:
            lost = sum(
                taken for taken, one in zip(each, made, strict=False) if one.code or (one.code is None and not one.last)
            )
        if spent or planned:
            found.append(Cost(rule, planned, spent, min(lost, spent), len(made) or None))
    return found


def spent_in_training(costs: list[Cost]) -> float | None:
    """GPU hours of all attempts of training; None where they are not told."""
    return next((one.spent for one in costs if one.rule == "train" and one.spent), None)


def sentence(costs: list[Cost], price: float | None) -> str:
    """One line on all stages; empty where there is nothing to tell."""
    if not costs:
        return ""
    spent, lost = sum(one.spent for one in costs), sum(one.lost for one in costs)
    planned = [one.planned for one in costs if one.planned]
    together = sum(one[0] for one in planned), sum(one[1] for one in planned)
    parts = []
    if spent:
        parts.append(f"{_hours(spent)} GPU hours spent, {_hours(lost)} of them lost ({lost / spent:.0%})")
    for name, rules in PLANNED.items():
        if each := [one.planned for one in costs if one.planned and one.rule in rules]:
            low, high = sum(one[0] for one in each), sum(one[1] for one in each)
            parts.append(f"{name} planned with {_hours(low)} to {_hours(high)}")
    if price and spent:
        parts.append(f"{_money(spent, price)} at {price:g} an hour, {_money(lost, price)} lost")
    elif price and planned:
        parts.append(f"{_money(together[0], price)} to {_money(together[1], price)} at {price:g} an hour")
    return "; ".join(parts)


def grid(costs: list[Cost], price: float | None) -> tuple[str, list[str], list[list[str]]] | None:
    """A table by stage (title, head, rows); None where no stage has begun."""
    if not any(one.spent for one in costs):
        return None
    head = ["", "planned", "spent", "lost", "attempts"] + (["cost", "cost lost"] if price else [])
    rows = [
        [
            one.rule,
            f"{_hours(one.planned[0])} to {_hours(one.planned[1])}" if one.planned else "",
            _hours(one.spent),
            _hours(one.lost),
            str(one.attempts or ("the last" if one.spent else "")),
        ]
        + ([_money(one.spent, price), _money(one.lost, price)] if price else [])
        for one in costs
    ]
    return "GPU hours by stage", head, rows


def price_of(config: dict[str, Any]) -> float | None:
    """What a GPU's hour costs, where the configuration says it."""
    price = mapping(config.get("plan")).get("price_per_gpu_hour")
    return float(price) if isinstance(price, int | float) and not isinstance(price, bool) and price > 0 else None


def _gpus(rule: str, stages: dict[str, Stage], config: dict[str, Any]) -> int:
    """GPUs that a stage holds, where its attempts do not say."""
    if rule in TRAINING:
        found = stages["train"].figures.get("world_size", glance.last_plan(stages).figures.get("ranks"))
        return found if isinstance(found, int) else 0
    serve = mapping(config.get("serve"))
    sizes = [serve.get(name, 1) for name in ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")]
    return math.prod(sizes) if all(isinstance(size, int) for size in sizes) else 0


def _planned(rule: str, figures: dict[str, Any]) -> tuple[float, float] | None:
    """GPU hours that the plan says of a stage."""
    whole = figures if rule == "train" else mapping(mapping(figures.get("evaluation")).get(rule))
    found = whole.get("gpu_hours")
    return (found[0], found[1]) if _numbers(found) else None


def _receipt_seconds(stage: Stage) -> float:
    seconds = stage.figures.get("wall_seconds", stage.receipt.get("seconds"))
    return float(seconds) if isinstance(seconds, int | float) else 0.0


def _steps_seconds(metrics: list[dict[str, Any]]) -> float:
    """Seconds of the steps that count, those between logged ones as long as these on average, and of validation."""
    _, seconds = plots.series(metrics, "seconds")
    _, validated = plots.series(metrics, "seconds_validation")
    return float(seconds.mean()) * metrics[-1]["step"] + float(validated.sum()) if len(seconds) else 0.0


def _numbers(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(one, int | float) for one in value)


def _hours(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 10 else f"{hours:,.2g}"


def _money(hours: float, price: float) -> str:
    return f"{hours * price:,.0f}"
