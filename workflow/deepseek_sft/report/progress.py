"""Which stages run, wait or went wrong now: what receipts, logs, processes and squeue say together."""

import dataclasses
import re
import time
from pathlib import Path

from .. import stages as stage_rows
from ..cluster_jobs import holders, record
from .collect import Stage
from .slurm_jobs import ALIVE, Job

FRESH_S = 120.0  # a log that was written so recently belongs to a running stage, where nothing else can be asked
ANSWER_S = 5.0  # for squeue to say whether the job of a Snakemake still runs


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


def of_stage(stage: Stage, logs: Path | None, known: list[Job] | None, project: Path) -> Progress:
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


def rule_of(job: Job, project: Path, experiment: str | None) -> str | None:
    """The rule that Snakemake submitted a job for from this project, for this experiment; None for any other job."""
    name, *more = job.comment.split() or [""]
    rule = name.removeprefix("rule_")
    fits = rule in stage_rows.BY_NAME and (not more or experiment in (None, more[0]))
    return rule if fits and Path(job.folder).resolve() == project else None


def _submitted(rule: str, known: list[Job] | None, project: Path, experiment: str | None) -> Job | None:
    """The job that Snakemake submitted from this project for a rule of an experiment."""
    waiting = [job for job in known or [] if job.state in (*ALIVE, "PENDING")]
    return next((job for job in waiting if rule_of(job, project, experiment) == rule), None)


def _queue_state(job: Job) -> str:
    return "running" if job.state in ALIVE else "queued"


def current(found: list[Progress]) -> Progress:
    """The stage to speak of: one that runs, waits or went wrong, the last of its kind; else the next to run."""
    for states in (("running",), ("seems to run",), ("queued",), ("failed", "stopped", "unreadable")):
        if fitting := [one for one in found if one.state in states]:
            return fitting[-1]
    waiting = [one for one in found if one.state != "complete" and not _is_asked_for(one.rule)]
    return waiting[0] if waiting else found[-1]


def _is_asked_for(rule: str) -> bool:
    """Whether a stage without a receipt is no gap: it is made by name only, or with training."""
    return rule in stage_rows.BY_NAME and stage_rows.BY_NAME[rule].shown_where_run


def snakemakes(logs: Path | None) -> list[str]:
    """Living Snakemakes of the experiment that run stages: between two jobs nothing else shows that the run goes on."""
    found = record.all_records(logs) if logs else []
    return [
        f"process {one.holder.get('pid')} on {one.holder.get('host')} since {one.holder.get('time')}"
        for one in found
        if set(one.rules) & set(stage_rows.SECTIONS) and holders.surely_lives(one.holder, ANSWER_S)
    ]
