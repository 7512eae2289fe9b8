"""What a rehearsal says of the run: is resuming exact, do the limits let it live, what will it take and cost.

Pure functions of the two parts' records (``training/rehearsal.py``), the plan's figures and the profile's resources.
"""

import dataclasses
import statistics
from typing import Any

from .. import saving_tiers
from ..json_files import Maybe
from .duration import Duration
from .settings import GIB, MB

STEPS = 7  # of both parts together
LIMIT_SHARE = 0.5  # of a watchdog's limit: what a healthy step, save or start may take of it
# Figures that are needed of a plan.
PLANNED: dict[str, Any] = dict.fromkeys(
    (
        *(f"{what}_{end}_s" for what in ("step", "run") for end in ("fastest", "slowest")),
        *("rank_memory_bytes", "host_memory_bytes", "checkpoint_s", "checkpoint_bytes"),
    ),
    Maybe(float),
) | {"gpu_hours": Maybe(list), "limits": Maybe(dict)}
TIME_MARGIN = 1.1  # over the plan's slowest
NORM_FACTOR = 10  # gradient norms may differ by this much more than losses: they sum squares of every element


@dataclasses.dataclass(frozen=True)
class Check:
    """One gate; ``passed`` is None where there is nothing to judge it by."""

    name: str
    passed: bool | None
    detail: str


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the comparison, in words."""

    name: str
    planned: str
    seen: str


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the rehearsal found.

    Attributes:
        figures: for the receipt.
    """

    checks: list[Check]
    rows: list[Row]
    figures: dict[str, Any]

    @property
    def failed(self) -> list[Check]:
        return [check for check in self.checks if check.passed is False]


def judge(
    unbroken: dict[str, Any],
    resumed: dict[str, Any],
    plan: dict[str, Any],
    settings: dict[str, Any],
    resources: dict[str, Any],
    options: dict[str, Any],
) -> Verdict:
    """Judge a finished rehearsal.

    Args:
        unbroken, resumed: records of its parts.
        plan: figures of the receipt of refine_plan.
        settings: training's.
        resources: what the profile gives to training, as ``training_resources.read_resources`` reads it.
        options: ``accelerator`` and the configuration's ``rehearse`` section.
    """
    steps, ranks = unbroken["metrics"], unbroken["ranks"]
    seconds = [line["seconds"] for line in steps]
    step, slowest = statistics.median(seconds[1:]), max(seconds)
    save = sum(line["seconds_save"] for line in steps)
    begin = max(unbroken["start_seconds"], resumed["start_seconds"])
    run = _run_seconds(unbroken["planned_steps"], step, save, unbroken["start_seconds"], settings)
    hours = run * ranks / 3600
    memory = max(line["memory_gib"] for line in steps + resumed["metrics"])
    host = max(line["host_memory_gib"] for line in steps + resumed["metrics"]) * unbroken["ranks_per_node"]
    price = options.get("cost_per_gpu_hour")
    limits = unbroken["limits"]
    checks = [
        _resumes(unbroken, resumed, options),
        _within("a start", begin, limits["start"], "train.hang_minutes.start"),
        _within("a step", slowest, limits["step"], "train.hang_minutes.step"),
        _within("a save", save, limits["save"], "train.hang_minutes.save"),
        _signal(slowest + save, resources.get("signal_lead_s")),
        _as_planned("step as planned", step, plan.get("step_slowest_s")),
        _as_planned("save as planned", save, _save_slowest(plan, options)),
        _memory("memory of a GPU", memory * GIB, _have(plan, "GPU memory per rank"), "plan.gpu_memory_gib"),
        _memory("memory of a node", host * GIB, _megabytes(resources), "profile, set-resources: train: mem_mb"),
    ]
    rows = [
        Row("memory of a rank", _gib(plan.get("rank_memory_bytes")), f"{memory:.2f} GiB"),
        Row("memory of a node, ranks' peaks added up", _gib(plan.get("host_memory_bytes")), f"{host:.1f} GiB"),
        Row("start", "", _time(unbroken["start_seconds"])),
        Row("resume", "", _time(resumed["start_seconds"])),
        Row("one step", _range(plan, "step"), f"{_time(step)}, slowest {_time(slowest)}"),
        Row("saving a checkpoint", _time(plan.get("checkpoint_s")), _time(save)),
        Row("size of a checkpoint", _gib(plan.get("checkpoint_bytes")), _gib(unbroken["checkpoint_bytes"])),
        Row("the whole run", _range(plan, "run"), _time(run)),
        Row("hours of all ranks", _hours(plan), f"{hours:,.1f}" + (f", cost {hours * price:,.0f}" if price else "")),
    ]
    figures = {
        "checks": {c.name: {"passed": c.passed, "detail": c.detail} for c in checks if c.passed is not None},
        "skipped": {c.name: c.detail for c in checks if c.passed is None},
        "first_loss": steps[0]["loss"],
        "step_seconds": round(step, 3),
        "slowest_step_seconds": round(slowest, 3),
        "save_seconds": round(save, 3),
        "start_seconds": unbroken["start_seconds"],
        "resume_seconds": resumed["start_seconds"],
        "peak_memory_gib": memory,
        "host_memory_gib_per_node": round(host, 3),
        "checkpoint_bytes": unbroken["checkpoint_bytes"],
        "steps": unbroken["planned_steps"],
        "run_seconds": round(run),
        "rank_hours": round(hours, 1),
        "cost": None if price is None else round(hours * price),
        "ranks": ranks,
        "run_id": unbroken["run_id"],
    }
    return Verdict(checks, rows, figures)


def too_long(found: Duration, minutes: int) -> str:
    """Why a rehearsal may not end within its time limit, in a sentence; empty where it will, or nothing is known.

    It trains seven steps in two starts, loads the base once and a checkpoint once, and saves once.
    """
    if found.step is None:
        return ""
    needed = STEPS * found.step.slowest + found.loading_s + 2 * found.checkpoint_s
    if needed <= 60 * minutes:
        return ""
    return (
        f"the rehearsal has {minutes} minutes and may take {_time(needed)} by the plan's slowest figures: give it "
        f"runtime: {-(-round(needed) // 600) * 10} (profile, set-resources: rehearse: runtime)"
    )


def _run_seconds(steps: int, step: float, save: float, start: float, settings: dict[str, Any]) -> float:
    """Seconds of the whole run in one start: its steps and saves at the rehearsal's speed."""
    every = settings["save_every_steps"] * step
    if minutes := saving_tiers.of_shared(settings)["save_every_minutes"]:
        every = min(every, 60 * minutes)
    trained = steps * step
    if settings.get("max_hours"):
        trained = min(trained, 3600 * settings["max_hours"])
    saves = max(1, -(-trained // max(every, 1e-9)))
    return start + trained + saves * save


def _resumes(unbroken: dict[str, Any], resumed: dict[str, Any], options: dict[str, Any]) -> Check:
    """Losses and gradient norms of the steps that were trained twice: equal on CPUs, close on GPUs."""
    allowed = options["loss_tolerance"] if options["accelerator"] == "cuda" else 0.0
    again = {line["step"]: line for line in resumed["metrics"]}
    before = [line for line in unbroken["metrics"] if line["step"] in again]
    said, good = [], len(before) == len(again) > 0
    for first in before:
        second = again[first["step"]]
        for key, most in (("loss", allowed), ("grad_norm", NORM_FACTOR * allowed)):
            one, other = first[key], second[key]
            if one is None or other is None:
                good = False
                said.append(f"step {first['step']}: {key} is not finite")
                continue
            apart = abs(one - other) / max(abs(one), 1e-30)
            good &= apart <= most
            text = "equal" if one == other else f"{other:.9g} instead of {one:.9g}, {apart:.1e} apart"
            said.append(f"step {first['step']}: {key} {text}")
        if any(first[key] != second[key] for key in ("learning_rate", "tokens", "trained_tokens")):
            good = False
            said.append(f"step {first['step']}: another learning rate or other rows")
    bound = f"; allowed {allowed:g}" if allowed else ""
    return Check("a resumed run goes on as an unbroken one", good, "; ".join(said) + bound)


def _within(what: str, seconds: float, limit: float, key: str) -> Check:
    name = f"{what} is no hang"
    good = seconds <= LIMIT_SHARE * limit
    text = f"{_time(seconds)} of {_time(limit)}"
    return Check(name, good, text if good else f"{text}: more than half; set {key} to {4 * seconds / 60:.0f} minutes")


def _signal(needed: float, lead: float | None) -> Check:
    name = "the time limit's signal comes early enough"
    if lead is None:
        return Check(name, None, "the profile gives training no --signal")
    text = f"a step and a save take {_time(needed)}, the signal comes {_time(lead)} before the end"
    good = needed <= lead
    return Check(name, good, text if good else f"{text}: write --signal=USR1@{round(1.25 * needed)} into slurm_extra")


def _as_planned(name: str, seconds: float, slowest: float | None) -> Check:
    if slowest is None:
        return Check(name, None, "the plan has no figure")
    good = seconds <= TIME_MARGIN * slowest
    return Check(name, good, f"{_time(seconds)}, planned at most {_time(slowest)}")


def _save_slowest(plan: dict[str, Any], options: dict[str, Any]) -> float | None:
    # The demo's megabytes are written in the time of a few system calls: no bandwidth is seen there.
    return plan.get("checkpoint_s") if options["accelerator"] == "cuda" else None


def _memory(name: str, need: float, have: float | None, key: str) -> Check:
    if have is None:
        return Check(name, None, f"{key} is not known")
    return Check(name, need <= have, f"{need / GIB:.2f} of {have / GIB:.2f} GiB ({key})")


def _have(plan: dict[str, Any], limit: str) -> float | None:
    return (plan.get("limits", {}).get(limit) or {}).get("have_bytes")


def _megabytes(resources: dict[str, Any]) -> float | None:
    return resources["mem_mb"] * MB if resources.get("mem_mb") else None


def _gib(size: float | None) -> str:
    return "" if size is None else f"{size / GIB:,.2f} GiB"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return ""
    if seconds < 60:
        return f"{seconds:.1f} s"
    hours, rest = divmod(round(seconds), 3600)
    minutes, left = divmod(rest, 60)
    if hours >= 48:
        return f"{hours // 24} d {hours % 24} h"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {left} s"


def _range(plan: dict[str, Any], what: str) -> str:
    ends = [plan.get(f"{what}_{end}_s") for end in ("fastest", "slowest")]
    return "" if None in ends else f"{_time(ends[0])} to {_time(ends[1])}"


def _hours(plan: dict[str, Any]) -> str:
    hours = plan.get("gpu_hours")
    return f"{hours[0]:,.1f} to {hours[1]:,.1f}" if hours else ""


def page(verdict: Verdict, hosts: list[str], end: str) -> str:
    """The verdict on one page.

    Args:
        hosts: the nodes that took part.
        end: when the run would end, in words.
    """
    width = max(len(row.name) for row in verdict.rows)
    planned = max(7, *(len(row.planned) for row in verdict.rows))
    lines = [
        f"rehearsal on {len(hosts)} nodes: {', '.join(hosts[:8])}{' …' if len(hosts) > 8 else ''}",
        "",
        f"{'':{width}}  {'planned':{planned}}  seen",
        *(f"{row.name:{width}}  {row.planned or '-':{planned}}  {row.seen}".rstrip() for row in verdict.rows),
        "",
        *(f"{_MARKS[check.passed]:10}  {check.name}: {check.detail}" for check in verdict.checks),
        "",
        f"started now and never interrupted, the run of {verdict.figures['steps']:,} steps ends {end}",
    ]
    failed = [check.name for check in verdict.failed]
    lines.append(f"verdict: {'not ready: ' + ', '.join(failed) if failed else 'ready'}")
    return "\n".join(lines) + "\n"


_MARKS = {True: "passed", False: "failed", None: "not judged"}
