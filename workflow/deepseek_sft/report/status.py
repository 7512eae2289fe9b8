"""How far a run is, on one screen, from what stages write anyway: receipts, logs, metrics, checkpoints, and squeue.

Looks only: nothing is written, locked or waited for. Whatever cannot be read is left out or said to be unknown.
"""

import dataclasses
import re
import shutil
import socket
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .. import engines, formatting
from ..errors import BadInputError
from ..training import gpu_hours, local_tier, run_folder, slow_nodes
from . import collect, cost, plots, progress, slurm_jobs, validation_rows
from .collect import Stage, mapping
from .progress import Progress
from .slurm_jobs import ALIVE, Job, job_seconds

GIB = 1 << 30
SILENT_S = 600.0  # so long without a line deserves a look
RECENT, STEADY = 10, 20  # steps of the mean loss, and of the median time that predicts the time left


def newest_experiment(results: Path, logs: Path) -> Path:
    """Results folder of the experiment that wrote a log or a receipt last.

    Raises:
        BadInputError: there is none.
    """
    times: dict[str, float] = {}
    for path in [*logs.glob("*/*.log"), *results.glob("*/receipts/*.json")]:
        name = path.parent.name if path.suffix == ".log" else path.parent.parent.name
        # status.log and watch.log are of those who looked
        if (logs / name).is_dir() and name not in ("envs", "slurm") and path.name not in ("status.log", "watch.log"):
            times[name] = max(times.get(name, 0.0), path.lstat().st_mtime)
    if not times:
        raise BadInputError(
            f"no experiment has started here: neither {logs} nor {results} holds one", "start one first"
        )
    return results / max(times, key=lambda name: times[name])


@dataclasses.dataclass(frozen=True)
class Look:
    """An experiment as it was found.

    Attributes:
        known: this user's Slurm jobs; None where squeue does not answer.
        found: each stage as it is now.
        now: the one to speak of.
        snakemakes: living ones of the experiment.
        run: folder of the newest training run.
        metrics: its lines, by step.
    """

    results: Path
    logs: Path | None
    known: list[Job] | None
    stages: dict[str, Stage]
    found: list[Progress]
    now: Progress
    snakemakes: list[str]
    run: Path | None
    metrics: list[dict[str, Any]]

    @property
    def trains(self) -> bool:
        """Whether training is what the experiment is at."""
        return bool(self.run) and self.now.rule == "train" and self.now.state != "complete"


def look(
    results: Path,
    logs: Path | None,
    ask: Callable[[], tuple[list[Job] | None, list[str]]] | None = None,
    read: Callable[[Path], list[dict[str, Any]]] = collect.metrics,
) -> Look:
    """Look at an experiment.

    Args:
        ask: Slurm jobs and living Snakemakes, where they were asked for before.
        read: lines of a file of metrics.

    Raises:
        BadInputError: the experiment has neither a results folder nor logs.
    """
    if not results.is_dir() and not (logs and logs.is_dir()):
        raise BadInputError(f"no experiment at {results}: it has not started", "give results/<experiment>")
    stages = collect.stages(results.resolve(), logs, warnings=False)
    known, snakemakes = ask() if ask else (slurm_jobs.jobs(), progress.snakemakes(logs))
    found = [progress.of_stage(stage, logs, known, project_of(results, logs)) for stage in stages.values()]
    run = newest_run(results)
    metrics = read(run / run_folder.METRICS) if run else []
    return Look(results, logs, known, stages, found, progress.current(found), snakemakes, run, metrics)


def project_of(results: Path, logs: Path | None) -> Path:
    """The folder that an experiment's jobs are submitted from."""
    return (logs or results).resolve().parent.parent


def screen(results: Path, logs: Path | None) -> str:
    """The whole screen.

    Raises:
        BadInputError: the experiment has neither a results folder nor logs.
    """
    seen = look(results, logs)
    rows = [
        ("experiment", f"{results.name}, {results}, {time.strftime('%Y-%m-%d %H:%M:%S')}"),
        *_wrapped("stages", [f"{SYMBOLS.get(one.state, '!')} {one.rule}" for one in seen.found]),
        *rows_of(seen),
        *log_rows(seen.now),
    ]
    return "\n".join(f"{name:<12}{formatting.clean(text)}" for name, text in rows if text)


def rows_of(seen: Look) -> list[tuple[str, str]]:
    """Name and text of all that is known, but the list of stages and the log; texts may be empty."""
    now, run = seen.now, seen.run
    rows = [
        ("stage", _stage_text(now, seen.snakemakes)),
        ("snakemake", "; ".join(seen.snakemakes)),
        ("job", _job_text(now, seen.known)),
    ]
    if run and seen.trains:
        rows += training_rows(run, now, seen.metrics) + _slow_rows(seen.results)
    elif seen.stages["train"].receipt:
        rows.append(("trained", _trained(seen.stages["train"])))
    newest = _newest_marker(run) if run else None
    config = collect.config(seen.results)
    hours = gpu_hours.of(run, seen.metrics) if run else None
    costs = cost.of(seen.stages, seen.metrics, config, seen.logs, hours)
    if run:
        rows += [("GPU hours", hours.text(cost.spent_in_training(costs)))] if hours else []
        rows.append(("checkpoint", _last_checkpoint(run, newest)))
        rows.append(("node-local", _on_nodes(run, newest)))
    rows.append(("cost", cost.sentence(costs, cost.price_of(config))))
    return [*rows, ("disk left", _disk(seen.results, newest))]


def _wrapped(name: str, words: list[str], width: int = 100) -> list[tuple[str, str]]:
    """Words that hold spaces of their own, over as many rows as they need."""
    rows = [""]
    for word in words:
        if len(rows[-1]) + len(word) > width:
            rows.append("")
        rows[-1] += f"{word}  "
    return [(name if number == 0 else "", row.rstrip()) for number, row in enumerate(rows)]


SYMBOLS = {
    "complete": "✓",
    "running": "▶",
    "seems to run": "▶",
    "queued": "…",
    "not run": "–",
    "failed": "✕",
    "stopped": "■",
}


def _stage_text(now: Progress, snakemakes: list[str]) -> str:
    if now.state == "complete":
        return "all done"
    if now.state == "not run":
        return f"{now.rule} is next; {'snakemake is about to start it' if snakemakes else 'nothing runs'}"
    if now.state == "result gone":
        return f"{now.rule}, {now.note}; {collect.REMAKES.get(now.rule, 'snakemake makes it again')}"
    runs = now.state in ("running", "seems to run")
    since = f" for {formatting.duration(now.since)}" if runs and now.since is not None else ""
    note = f": {now.note}" if now.note else ""
    return f"{now.rule}, {now.state}{since}{note}"


def _job_text(now: Progress, known: list[Job] | None) -> str:
    job = now.job
    if job is None:
        if now.state in ("complete", "not run"):
            return ""
        if now.log and now.log.name.startswith("local-"):
            return "none; runs on this machine" if now.state == "running" else ""
        return f"unknown: squeue does not answer on {socket.gethostname()}" if known is None and now.log else ""
    place = f" on {job.nodes}" if job.nodes else ""
    reason = f" ({job.reason})" if job.reason not in ("", "None") else ""
    left = f", {job.left} of its time limit left" if job.state in ALIVE else ""
    return f"{job.id} {job.state}{reason}{place}, partition {job.partition}{left}"


def jobs_of(seen: Look) -> list[tuple[Job, str]]:
    """The experiment's Slurm jobs, each with its stage: those that its logs are named by, and those it submitted."""
    logged = {one.job.id: one.rule for one in seen.found if one.job}
    project, name = project_of(seen.results, seen.logs), seen.results.name
    return [
        (job, rule) for job in seen.known or [] if (rule := logged.get(job.id) or progress.rule_of(job, project, name))
    ]


def newest_run(results: Path) -> Path | None:
    """Folder of the training run that started last."""
    runs = (results / "train" / "runs").glob("*/settings.json")
    newest = max(runs, key=lambda file: file.stat().st_mtime, default=None)
    return newest.parent if newest else None


def training_rows(run: Path, now: Progress, lines: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Step, losses, gradient, speed, memory and time left of a training run, from the lines of its metrics."""
    settings = mapping(collect.read_json(run / "settings.json"))
    total = steps_of(run)
    if not lines or not lines[-1]["step"]:  # a line of step 0 is the base's validation loss
        return [("step", f"none of {total} yet: loading the model, or the first step"), *validation_rows.row(lines)]
    last, step = lines[-1], lines[-1]["step"]
    of = f" of {total:,} ({100 * step / total:.1f} %)" if isinstance(total, int) and total > 0 else ""
    epoch = f", epoch {last['epoch']:.3f}" if isinstance(last.get("epoch"), float) else ""
    skipped = sum(line.get("update") == "skipped" for line in lines)
    rows = [("step", f"{step:,}{of}{epoch}{f', {skipped} updates skipped' if skipped else ''}")]
    _, losses = plots.series(lines, "loss")
    if len(losses):
        mean = f", {losses[-RECENT:].mean():.4f} mean of the last {RECENT}" if len(losses) > RECENT else ""
        rows.append(("loss", f"{losses[-1]:.4f}{mean}, {losses[0]:.4f} at the start"))
    else:
        rows.append(("loss", "not finite"))
    rows += validation_rows.row(lines)
    rows += _measured_rows(lines)
    _, seconds = plots.series(lines[-STEADY:], "seconds")
    _, speeds = plots.series(lines[-STEADY:], "tokens_per_second")
    if len(seconds) and len(speeds):
        each = statistics.median(seconds.tolist())
        _, slots = plots.series(lines[-STEADY:], "useful_slots")
        useful = f", {statistics.median(slots.tolist()):.0%} of token slots useful" if len(slots) else ""
        rows.append(("speed", f"{statistics.median(speeds.tolist()):,.0f} tokens/s, {each:.2f} s a step{useful}"))
        if isinstance(total, int) and now.state in ("running", "seems to run"):
            left = (total - step) * each + validation_rows.seconds_left(
                lines, total - step, mapping(settings.get("settings"))
            )
            rows.append(("time left", _time_left(left, mapping(settings.get("settings")), now.job)))
    return rows


def steps_of(run: Path) -> int | None:
    """Steps of a whole training run."""
    settings = mapping(collect.read_json(run / "settings.json"))
    total = mapping(settings.get("schedule")).get("steps")
    return total if isinstance(total, int) and total > 0 else None


def _measured_rows(lines: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """The last of what only some lines have."""
    rows = []
    _, norms = plots.series(lines, "grad_norm")
    if len(norms):
        rows.append(
            ("gradient", f"{norms[-1]:.3g} before clipping, {statistics.median(norms[-STEADY:].tolist()):.3g} of late")
        )
    sizes = {key: plots.series(lines[-STEADY:], key)[1] for key in ("memory_gib", "host_memory_gib")}
    most = {key: formatting.byte_size(found[-1] * GIB) for key, found in sizes.items() if len(found)}
    if most:
        host = f", {most['host_memory_gib']} resident" if "host_memory_gib" in most else ""
        rows.append(("memory", f"{most.get('memory_gib', formatting.UNKNOWN)} of the rank with the most{host}"))
    return rows


def _slow_rows(results: Path) -> list[tuple[str, str]]:
    """Nodes that the next start leaves out."""
    found = slow_nodes.read(results / "train")
    return [("slow", f"{entry.get('text', host)}; the next start leaves the node out") for host, entry in found.items()]


def _time_left(seconds: float, settings: dict[str, Any], job: Job | None) -> str:
    """Time to the last step, and what may end the run or the job before."""
    if seconds <= 0:
        return "none: the last step is done"
    text = f"{formatting.duration(seconds)} to the last step"
    limit = settings.get("max_hours")
    if isinstance(limit, int | float):
        text += f", or sooner: train.max_hours is {limit:g}"
    left = job_seconds(job.left) if job else None
    if left is not None and left < seconds:
        text += f"; the job has {formatting.duration(left)}: it will save and stop before, and be resumed"
    return text


def _last_checkpoint(run: Path, newest: tuple[Path, Path, int] | None) -> str:
    """The newest committed checkpoint and what is being written now."""
    writing = [path.name for path in run.glob("step_*") if _number(path) and not (path / engines.MARKER).exists()]
    tail = f"; {', '.join(sorted(writing))} being written or not complete" if writing else ""
    if newest is None:
        return f"none yet{tail}"
    marker, folder, size = newest
    age = formatting.duration(max(0.0, time.time() - marker.stat().st_mtime))
    return f"{folder}, {formatting.byte_size(size)}, {age} ago{tail}"


def _on_nodes(run: Path, newest: tuple[Path, Path, int] | None) -> str:
    """The newest checkpoint on the nodes' own disks, where it is newer; that it is still there only the nodes know."""
    told = local_tier.read_note(run)
    if not told or (newest and _number(newest[1]) >= told["step"]):
        return ""
    age = formatting.duration(max(0.0, time.time() - told["time"]))
    size = formatting.byte_size(told["bytes"])
    return f"step_{told['step']} on the nodes' own disks, {size} and as much copied, {age} ago"


def _newest_marker(run: Path) -> tuple[Path, Path, int] | None:
    """Marker, folder and bytes of the newest committed checkpoint."""
    markers = [path for path in run.glob(f"step_*/{engines.MARKER}") if _number(path.parent)]
    if not markers:
        return None
    marker = max(markers, key=lambda path: _number(path.parent))
    sizes = mapping(mapping(collect.read_json(marker)).get("files")).values()
    return marker, marker.parent, sum(size for size in sizes if isinstance(size, int))


def _number(folder: Path) -> int:
    """Step of a checkpoint's folder; 0 where it is none."""
    match = re.fullmatch(r"step_(\d+)", folder.name)
    return int(match[1]) if match else 0


def _disk(results: Path, newest: tuple[Path, Path, int] | None) -> str:
    place = results if results.exists() else results.parent if results.parent.exists() else Path()
    usage = shutil.disk_usage(place)
    text = f"{formatting.byte_size(usage.free)} of {formatting.byte_size(usage.total)} at {place}"
    if newest and newest[2]:
        text += f", room for {usage.free // newest[2]:,} more checkpoints"
    return text


def _trained(train: Stage) -> str:
    figures = train.figures
    first, last = figures.get("first_loss"), figures.get("last_loss")
    losses = f", loss {first:.4g} → {last:.4g}" if isinstance(first, float) and isinstance(last, float) else ""
    return f"{formatting.value('steps', figures.get('steps'))} steps{losses}{validation_rows.of_receipt(figures)}"


def log_rows(now: Progress) -> list[tuple[str, str]]:
    """The last line of the current stage's log, and a warning where it has been silent for long."""
    if now.log is None or now.state == "complete":
        return []
    last = collect.log_tail(now.log, 1)
    age = f", last line {formatting.duration(max(0.0, now.silent))} ago" if now.silent is not None else ""
    counted = re.search(r"\b(\d+)/(\d+)$", last[0]) if last and now.rule != "train" else None
    rows = [("progress", f"{counted[1]} of {counted[2]}")] if counted else []
    rows += [("log", f"{now.log}{age}"), *(("", line[:200]) for line in last)]
    if now.state == "running" and now.silent is not None and now.silent > SILENT_S:
        rows.append(("attention", f"no line for {formatting.duration(now.silent)}: look at the log and the nodes"))
    return rows
