"""How far a run is, on one screen, from what stages write anyway: receipts, logs, metrics, checkpoints, and squeue.

Looks only: nothing is written, locked or waited for. Whatever cannot be read is left out or said to be unknown.
"""

import dataclasses
import re
import shutil
import socket
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

from .. import engines, formatting
from .. import stages as stage_rows
from ..cluster_jobs import holders, record
from ..errors import BadInputError
from ..training import gpu_hours, run_folder, slow_nodes
from . import collect, cost, plots, validation_rows
from .collect import Stage, mapping

JOB_FIELDS = ("id", "state", "comment", "nodes", "partition", "elapsed", "left", "reason", "folder")
SQUEUE = ["squeue", "--me", "--noheader", "--format=%i|%T|%k|%N|%P|%M|%L|%r|%Z"]
ALIVE = ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "CONFIGURING")
FRESH_S = 120.0  # a log that was written so recently belongs to a running stage, where nothing else can be asked
ANSWER_S = 5.0  # for squeue to say whether the job of a Snakemake still runs
SILENT_S = 600.0  # so long without a line deserves a look
RECENT, STEADY = 10, 20  # steps of the mean loss, and of the median time that predicts the time left


@dataclasses.dataclass(frozen=True)
class Job:
    """One Slurm job as squeue shows it; ``comment`` of Snakemake's is ``rule_<rule> <experiment> <fingerprint>``."""

    id: str
    state: str
    comment: str
    nodes: str
    partition: str
    elapsed: str
    left: str
    reason: str
    folder: str


@dataclasses.dataclass(frozen=True)
class Progress:
    """One stage as it is now.

    Attributes:
        state: those of ``collect.Stage``, and ``running``, ``seems to run``, ``queued``, ``stopped``.
        log: its newest log; None where it has none.
        job: its Slurm job, while squeue knows it.
        since: seconds since its last start; None where unknown.
        silent: seconds since the log's last line; None without a log.
    """

    rule: str
    state: str
    note: str = ""
    log: Path | None = None
    job: Job | None = None
    since: float | None = None
    silent: float | None = None


def newest_experiment(results: Path, logs: Path) -> Path:
    """Results folder of the experiment that wrote a log or a receipt last.

    Raises:
        BadInputError: there is none.
    """
    times: dict[str, float] = {}
    for path in [*logs.glob("*/*.log"), *results.glob("*/receipts/*.json")]:
        name = path.parent.name if path.suffix == ".log" else path.parent.parent.name
        # status.log is what target `status` showed
        if (logs / name).is_dir() and name not in ("envs", "slurm") and path.name != "status.log":
            times[name] = max(times.get(name, 0.0), path.lstat().st_mtime)
    if not times:
        raise BadInputError(
            f"no experiment has started here: neither {logs} nor {results} holds one", "start one first"
        )
    return results / max(times, key=lambda name: times[name])


def screen(results: Path, logs: Path | None) -> str:
    """The whole screen.

    Raises:
        BadInputError: the experiment has neither a results folder nor logs.
    """
    if not results.is_dir() and not (logs and logs.is_dir()):
        raise BadInputError(f"no experiment at {results}: it has not started", "give results/<experiment>")
    stages = collect.stages(results.resolve(), logs)
    known = jobs()
    project = logs.resolve().parent.parent if logs else results.resolve().parent.parent
    found = [_progress(stage, logs, known, project) for stage in stages.values()]
    now = _current(found)
    rows = [
        ("experiment", f"{results.name}, {results}, {time.strftime('%Y-%m-%d %H:%M:%S')}"),
        *_wrapped("stages", [f"{SYMBOLS.get(one.state, '!')} {one.rule}" for one in found]),
        ("stage", _stage_text(now, snakemakes := _snakemakes(logs))),
        ("snakemake", "; ".join(snakemakes)),
        ("job", _job_text(now, known)),
    ]
    train = next(one for one in found if one.rule == "train")
    run = newest_run(results)
    if run and train.state != "complete" and now.rule == "train":
        rows += training_rows(run, now) + _slow_rows(results)
    elif stages["train"].receipt:
        rows.append(("trained", _trained(stages["train"])))
    newest = _newest_marker(run) if run else None
    if run:
        hours = gpu_hours.read(run)
        rows += [("GPU hours", hours.text())] if hours else []
        rows.append(("checkpoint", _last_checkpoint(run, newest)))
    config = collect.config(results)
    costs = cost.of(stages, collect.metrics(run / run_folder.METRICS if run else None), config, logs)
    rows.append(("cost", cost.sentence(costs, cost.price_of(config))))
    rows += [("disk left", _disk(results, newest)), *_log_rows(now)]
    return "\n".join(f"{name:<12}{formatting.clean(text)}" for name, text in rows if text)


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


def jobs() -> list[Job] | None:
    """This user's jobs; None where squeue is absent or does not answer."""
    try:
        answer = subprocess.run(SQUEUE, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if answer.returncode:
        return None
    rows = [line.strip().split("|", len(JOB_FIELDS) - 1) for line in answer.stdout.splitlines()]
    return [Job(*row) for row in rows if len(row) == len(JOB_FIELDS)]


def _progress(stage: Stage, logs: Path | None, known: list[Job] | None, project: Path) -> Progress:
    """A stage's state now: that of its receipt, or without one what log, process and squeue say."""
    link = logs / f"{stage.rule}.log" if logs else None
    log, since, silent = None, None, None
    if link and link.is_symlink():
        since = time.time() - link.lstat().st_mtime  # the link is made anew at each start
        log = link.parent / link.readlink()
        silent = time.time() - log.stat().st_mtime if log.exists() else None
    if stage.state not in ("not finished", "not run", "failed") or stage.receipt:
        return Progress(stage.rule, stage.state, stage.note, log, None, since, silent)
    queued = _submitted(stage.rule, known, project, logs.name if logs else None)
    if stage.state == "not finished" and log:
        job = next((one for one in known or [] if one.id == log.name.rsplit("-", 1)[0]), None)
        state = _state_of(log, job, known, silent)
        if state == "stopped" and queued:
            return Progress(stage.rule, _queue_state(queued), "an earlier attempt ended", log, queued, None, None)
        return Progress(stage.rule, state, "", log, job, since, silent)
    if queued and stage.state != "failed":
        return Progress(stage.rule, _queue_state(queued), "", None, queued)
    return Progress(stage.rule, stage.state, stage.note, log, None, since, silent)


def _state_of(log: Path, job: Job | None, known: list[Job] | None, silent: float | None) -> str:
    """Whether the stage that writes ``log`` runs: by its Slurm job, by its process, or else by the log's age."""
    owner = log.name.rsplit("-", 1)[0]  # <job id>, or local-<pid of stage.sh>
    if job:
        return _queue_state(job)
    if owner.isdecimal() and known is not None:
        return "stopped"
    if match := re.fullmatch(r"local-(\d+)", owner):
        try:
            if b"stage.sh" in Path(f"/proc/{match[1]}/cmdline").read_bytes():
                return "running"
        except OSError:
            pass  # it has ended, or runs on another host
    return "seems to run" if silent is not None and silent < FRESH_S else "stopped"


def _submitted(rule: str, known: list[Job] | None, project: Path, experiment: str | None) -> Job | None:
    """The job that Snakemake submitted from this project for a rule of an experiment."""

    def fits(job: Job) -> bool:
        name, *more = job.comment.split() or [""]
        return name in (f"rule_{rule}", rule) and (not more or experiment in (None, more[0]))

    named = [job for job in known or [] if fits(job) and job.state in (*ALIVE, "PENDING")]
    return next((job for job in named if Path(job.folder).resolve() == project), None)


def _queue_state(job: Job) -> str:
    return "running" if job.state in ALIVE else "queued"


def _current(found: list[Progress]) -> Progress:
    """The stage to speak of: one that runs, waits or went wrong, the last of its kind; else the next to run."""
    for states in (("running",), ("seems to run",), ("queued",), ("failed", "stopped", "unreadable")):
        if fitting := [one for one in found if one.state in states]:
            return fitting[-1]
    waiting = [one for one in found if one.state != "complete" and not _is_asked_for(one.rule)]
    return waiting[0] if waiting else found[-1]


def _is_asked_for(rule: str) -> bool:
    """Whether a stage without a receipt is no gap: it is made by name only, or with training."""
    return rule in stage_rows.BY_NAME and stage_rows.BY_NAME[rule].shown_where_run


def _snakemakes(logs: Path | None) -> list[str]:
    """Living Snakemakes of the experiment that run stages: between two jobs nothing else shows that the run goes on."""
    found = record.all_records(logs) if logs else []
    return [
        f"process {one.holder.get('pid')} on {one.holder.get('host')} since {one.holder.get('time')}"
        for one in found
        if set(one.rules) & set(stage_rows.SECTIONS) and holders.surely_lives(one.holder, ANSWER_S)
    ]


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


def newest_run(results: Path) -> Path | None:
    """Folder of the training run that started last."""
    runs = (results / "train" / "runs").glob("*/settings.json")
    newest = max(runs, key=lambda file: file.stat().st_mtime, default=None)
    return newest.parent if newest else None


def training_rows(run: Path, now: Progress) -> list[tuple[str, str]]:
    """Step, loss, speed and time left of a training run, from its metrics."""
    lines = collect.metrics(run / run_folder.METRICS)
    settings = mapping(collect.read_json(run / "settings.json"))
    total = mapping(settings.get("schedule")).get("steps")
    if not lines:
        return [("step", f"none of {total} yet: loading the model, or the first step")]
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


def job_seconds(text: str) -> float | None:
    """Seconds of a time as squeue writes it, ``[days-][hours:]minutes:seconds``; None for UNLIMITED and the like."""
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text)
    if not match:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return ((24.0 * days + hours) * 60 + minutes) * 60 + seconds


def _last_checkpoint(run: Path, newest: tuple[Path, Path, int] | None) -> str:
    """The newest committed checkpoint and what is being written now."""
    writing = [path.name for path in run.glob("step_*") if _number(path) and not (path / engines.MARKER).exists()]
    tail = f"; {', '.join(sorted(writing))} being written or not complete" if writing else ""
    if newest is None:
        return f"none yet{tail}"
    marker, folder, size = newest
    age = formatting.duration(max(0.0, time.time() - marker.stat().st_mtime))
    return f"{folder}, {formatting.byte_size(size)}, {age} ago{tail}"


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


def _log_rows(now: Progress) -> list[tuple[str, str]]:
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
