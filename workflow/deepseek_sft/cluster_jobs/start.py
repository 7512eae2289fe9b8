"""What a Snakemake does with earlier ones' locks and jobs when it starts, and with its own jobs when it ends."""

import atexit
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..cli import say
from ..errors import BadInputError, CrashError
from . import commands, holders, jobs, queue
from .record import FOLDER, PYTHON, VARIABLE, Record, Rule, all_records
from .retries import Retries

COMMANDS = Path(__file__).resolve().parents[2] / "slurm_commands"
LOCKS = Path(".snakemake/locks")
BESIDE = {"status", "watch", "stop", "clean_preview"}  # rules that look at a run which another Snakemake works on
ANSWER_S = 30.0  # how long a start waits for squeue before it goes on without
CANCELLED_S = 60.0


def free_locks_of_the_dead(logs: Path, words: list[str], own: dict[str, Any]) -> None:
    """Remove Snakemake's locks that processes left which are gone for certain; name the owners of the others.

    Args:
        logs: the experiment's folder of logs.
        words: the command line; nothing is said to who only looks.
        own: ``holders.own`` of this process.
    """
    there = _locks()
    records = [record for record in all_records(logs) if record.holder.get("pid") != own["pid"] or _dead(record, own)]
    dead = [record for record in records if _dead(record, own)]
    living = [record for record in records if record not in dead]
    kept = {name for record in living for name in record.locks}
    for record in dead:
        mine = [name for name, written in record.locks.items() if there.get(name) == written and name not in kept]
        for name in mine:
            Path(name).unlink(missing_ok=True)
        if mine:
            say(f"took over the lock of {_who(record)}, which is gone")
    if BESIDE & set(words):
        return
    for record in living:
        if any(there.get(name) == written for name, written in record.locks.items()):
            say(f"note: {_who(record)} holds this experiment's lock: {_advice(record, own)}")


def _dead(record: Record, own: dict[str, Any]) -> bool:
    try:
        return holders.reason_to_respect(record.holder, ANSWER_S, own) is None
    except CrashError:
        return False


def _who(record: Record) -> str:
    job = f" in Slurm job {record.holder['job_id']}" if record.holder.get("job_id") else ""
    return f"snakemake, process {record.holder['pid']} on {record.holder['host']}{job} since {record.holder['time']}"


def _advice(record: Record, own: dict[str, Any]) -> str:
    if holders.surely_lives(record.holder, ANSWER_S, own):
        return "wait for it or stop it; do not use --unlock"
    pid, host = record.holder["pid"], record.holder["host"]
    return (
        f"look there whether it runs (ssh {host} ps -p {pid}); only if it does not, repeat your command with --unlock "
        "once, then as it was: it finds the jobs again"
    )


def _locks() -> dict[str, int]:
    """Snakemake's lock files and when they were written, in nanoseconds."""
    found = {}
    for path in LOCKS.glob("*.lock"):
        try:
            found[str(path)] = path.stat().st_mtime_ns
        except FileNotFoundError:
            continue  # removed since it was listed
    return found


def _own_locks(workflow: Any) -> dict[str, int]:
    """Lock files that name an output of this run."""
    outputs = {str(file) for job in workflow.dag.jobs for file in job.output}
    found = {}
    for name, written in _locks().items():
        try:
            if outputs & set(Path(name).read_text().splitlines()):
                found[name] = written
        except OSError:
            continue
    return found


def begin(workflow: Any, experiment: str, logs: Path, results: Path, own: dict[str, Any], slurm: bool) -> None:
    """Find what earlier Snakemakes have left, note this one, and put our commands before Slurm's.

    Args:
        workflow: Snakemake's, about to start its first job.
        own: ``holders.own`` of this process, taken before the Slurm plugin removed SLURM_* from the environment.
        slurm: whether rules become Slurm jobs.

    Raises:
        BadInputError: another Snakemake or a job is at work on the same, or training is told to stop.
    """
    needed = {job.rule.name: job for job in workflow.dag.needrun_jobs()}
    for rule in workflow.rules:
        number = 0 if workflow.is_local(rule) else rule.restart_times
        rule.restart_times = Retries(number, logs / rule.name, say)
    refuse_twin(logs, set(needed), own)
    stop_file = results / "train" / "stop"
    if "train" in needed and stop_file.exists():
        raise BadInputError(f"training is told to stop: {stop_file} exists", f"to train on: rm {stop_file}")
    rules = {name: _rule(job) for name, job in needed.items() if not workflow.is_local(job.rule)}
    record = Record(
        path=logs / FOLDER / f"{socket.gethostname()}-{os.getpid()}.json",
        holder=own,
        experiment=experiment,
        project=str(Path.cwd()),
        logs=str(logs),
        path_variable=os.environ.get("PATH", os.defpath),
        accounting=slurm and _accounting(),
        rules=rules,
        locks=_own_locks(workflow),
        command=" ".join(sys.argv),
    )
    if slurm and rules:
        say_what_runs(record, made={str(file) for job in needed.values() for file in job.output})
        if "train" in rules:
            say_how_time_limits_end(workflow.executor_settings)
    for other in all_records(logs):
        if _dead(other, own):
            other.remove()
    record.path.parent.mkdir(parents=True, exist_ok=True)
    record.remove()  # of an earlier process with the same number
    record.write()
    if slurm:
        os.environ |= {
            VARIABLE: str(record.path.resolve()),
            PYTHON: sys.executable,
            "PATH": f"{COMMANDS}{os.pathsep}{record.path_variable}",
        }
        _cancel_on_interrupt(record)
    atexit.register(end, record)


def refuse_twin(logs: Path, rules: set[str], own: dict[str, Any]) -> None:
    """Raises BadInputError when a living Snakemake works on the same rules.

    Snakemake's own lock says so as well, but one that ends removes everybody's locks, other experiments' too.
    """
    for record in all_records(logs):
        same = (rules & set(record.rules)) - BESIDE
        if same and record.holder != own and holders.surely_lives(record.holder, ANSWER_S, own):
            raise BadInputError(f"{_who(record)} already works on {', '.join(sorted(same))}", "wait for it or stop it")


def say_what_runs(record: Record, made: set[str]) -> None:
    """Tell which jobs of earlier Snakemakes will be waited for.

    Args:
        made: files that this run makes before; what depends on them cannot be compared yet.

    Raises:
        BadInputError: one works with other settings or inputs.
    """
    try:
        found = jobs.listed(ANSWER_S)
    except (CrashError, FileNotFoundError) as error:
        say(f"note: whether jobs of an earlier start still run cannot be told now: {error}")
        return
    for name, rule in record.rules.items():
        for job in found:
            if not rule.shared or not job.belongs_to(record.project, record.experiment, name):
                continue
            if job.fingerprint == rule.fingerprint():
                say(f"Slurm job {job.id} ({job.state}) of an earlier start works on {name}: waiting for it")
            elif not made & set(rule.inputs):
                raise BadInputError(commands.other_settings(job, name))


def say_how_time_limits_end(settings: Any, config: Mapping[str, str] | None = None) -> None:
    """Tell where a job of training that reaches its time limit does not start again by itself."""
    if getattr(settings, "requeue", False):
        return
    by_default = (slurm_config() if config is None else config).get("JobRequeue") == "1"
    if by_default and not getattr(settings, "no_requeue", False):
        return
    say(
        "note: jobs are not requeued here (the profile has no `slurm-requeue: true`): after its time limit or a crash "
        "training is submitted anew, at most `retries` times"
    )


def slurm_config() -> dict[str, str]:
    """Slurm's settings (``scontrol show config``); empty where it does not answer."""
    try:
        answer = queue.patiently(lambda: queue.run(["scontrol", "show", "config"]), ANSWER_S)
    except FileNotFoundError:
        return {}
    return dict(re.findall(r"^(\w+)\s*= (.*?)\s*$", answer.stdout, re.MULTILINE))


def _accounting() -> bool:
    return slurm_config().get("AccountingStorageType", "").endswith("slurmdbd")


def _rule(job: Any) -> Rule:
    params = {str(name): str(value) for name, value in job.params.items()}
    asked = params.pop("asked", None)  # preflight: a new question at each start
    outputs = [str(file) for file in job.output]
    text = json.dumps([params, [str(value) for value in job.params] if not params else []], sort_keys=True)
    return Rule(text, [str(file) for file in job.input], outputs[0] if outputs else "", asked is None)


def _cancel_on_interrupt(record: Record) -> None:
    """Cancel at the first Ctrl-C, whatever Snakemake's plugin is doing then, and look again at the end."""
    if signal.getsignal(signal.SIGINT) in (signal.SIG_IGN, None):
        return

    def interrupt(number: int, frame: object) -> None:
        if not record.interrupted_file.exists():
            record.interrupted_file.touch()
            noted = [job["job"] for job in record.jobs()]
            if noted:
                say(f"interrupted: cancelling Slurm job {', '.join(noted)}")
                subprocess.Popen(["scancel", *noted], start_new_session=True, stderr=subprocess.DEVNULL)
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)


def end(record: Record, pause: Callable[[float], None] = time.sleep) -> None:
    """Leave no job behind after an interruption; after any other end, say which jobs go on."""
    if os.getpid() != record.holder["pid"]:
        return  # a child that Snakemake has forked
    os.environ["PATH"] = record.path_variable
    noted = {job["job"] for job in record.jobs()}
    if noted:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        interrupted = record.interrupted_file.exists()
        left = _cancel(noted, pause) if interrupted else _living(noted)
        if left and interrupted:
            say(f"Slurm has not ended its jobs yet; make sure with: scancel {' '.join(sorted(left))}")
        elif left:
            say(f"Slurm job {', '.join(sorted(left))} goes on; the same command finds it again and waits for it")
    record.remove()


def _cancel(noted: set[str], pause: Callable[[float], None]) -> set[str]:
    """Cancel what lives of ``noted`` until nothing does; returns what is left after a minute."""
    deadline = time.monotonic() + CANCELLED_S
    while left := _living(noted):
        queue.cancel(sorted(left))
        if time.monotonic() >= deadline:
            break
        pause(1.0)
    return left


def _living(noted: set[str]) -> set[str]:
    try:
        return {job.id for job in jobs.listed(ANSWER_S) if job.state != "COMPLETING"} & noted
    except (CrashError, FileNotFoundError):
        return set(noted)
