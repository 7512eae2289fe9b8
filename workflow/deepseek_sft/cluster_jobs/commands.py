"""sbatch, squeue and sacct as Snakemake's Slurm plugin sees them: the real ones, with patience and a memory.

The plugin calls Slurm's commands by name, so a folder in front of PATH (workflow/slurm_commands) is all that is needed,
whatever its version. Calls of any other form go to the real command as they are. What is added:

- ``sbatch`` finds a job of an earlier Snakemake and hands it over instead of asking for its nodes again; it asks again
  while the controller is away; it never submits what would only refuse.
- ``squeue`` and ``sacct`` answer for the jobs of this Snakemake by their ids. Without slurmdbd ``sacct`` answers from
  squeue: the plugin turns to it whenever the controller is slow once, and would forget its jobs. A job that Slurm has
  forgotten, or that will not come back from a preemption, is said to have ended.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from .. import environment_faults, files, json_files
from ..cli import say
from ..errors import CrashError, StageError
from . import jobs, queue
from .record import PYTHON, VARIABLE, Record

POLL_PATIENCE_S = 45.0  # the plugin waits 60 s for a list of states
SETTLED_S = 60.0  # a job that looks lost for so long is lost
LOST = ("PREEMPTED", "NODE_FAIL", "BOOT_FAIL")  # final, unless Slurm starts the job again: then it is PENDING at once


def main(name: str, arguments: list[str]) -> int:
    """Run command ``name``; returns its exit code."""
    record = Record.read(Path(os.environ.get(VARIABLE, "")))
    if record is None:
        say(f"error: {name}: no record of the Snakemake that calls it")
        return 1
    # Only the real commands from here on, also in the environment that a job inherits.
    os.environ["PATH"] = record.path_variable
    for variable in (VARIABLE, PYTHON):
        os.environ.pop(variable, None)
    try:
        if name == "sbatch" and _after(arguments, "--comment").startswith("rule_"):
            return submit(record, arguments)
        run = _after(arguments, "--name")
        if name in ("squeue", "sacct") and any(job["run"] == run for job in record.jobs()):
            return states(record, name, run, arguments)
    except (StageError, OSError) as error:
        say(f"error: {environment_faults.in_words(error)}")
        return 1
    return subprocess.run([name, *arguments], check=False).returncode


def submit(record: Record, arguments: list[str]) -> int:
    """Submit a rule's job, or find the one that an earlier Snakemake has submitted; prints its id."""
    rule = _after(arguments, "--comment").removeprefix("rule_").split("_wildcards_")[0]
    run, wrapped = _after(arguments, "--job-name"), _after(arguments, "--wrap")
    attempt = re.search(r"--attempt (\d+)", " ".join(arguments))
    marker = record.marker(rule)
    if marker.exists():
        if attempt and int(attempt[1]) > 1:
            say(f"not asked for again: {marker.read_text().strip()}")
            return 1
        marker.unlink()  # an earlier start's
    known = record.rules.get(rule)
    fingerprint = known.fingerprint() if known else "-"
    comment = jobs.comment(rule, record.experiment, fingerprint)
    call = ["sbatch", *_replace(arguments, "--comment", comment)]
    if wrapped:
        # The command waits for a folder of this Snakemake, which is gone when a later one has taken the job over.
        waiting = re.sub(re.escape(record.project) + r"/\.snakemake/tmp\.[^\s'\"]+", lambda _: record.project, wrapped)
        call = _replace(call, "--wrap", waiting)
    call.insert(1, jobs.APPEND)
    found = _earlier(record, rule, run, fingerprint, known is not None and known.shared)
    if found is None:
        answer = _sbatch(record, call, rule, run)
        if answer.returncode:
            sys.stderr.write(answer.stderr)
            return answer.returncode
        found = queue.submitted_job(answer.stdout)
        if found is None:
            sys.stderr.write(f"sbatch printed no job id: {answer.stdout.strip()}\n")
            return 1
        _tell(answer.stderr.rstrip())
    record.note(found, rule, run)
    print(found, flush=True)
    return 0


def _earlier(record: Record, rule: str, run: str, fingerprint: str, shared: bool) -> str | None:
    """Id of a living job that does the same; None where there is none.

    Raises:
        StageError: a job of this rule works with other settings or inputs, or Slurm does not answer.
    """
    try:
        found = jobs.listed(give_up=record.interrupted_file.exists, say=say)
    except CrashError as error:
        if queue.TRANSIENT.search(str(error)):
            raise
        say(f"note: whether a job of an earlier start still runs cannot be told: {error.problem}")
        return None
    found = [job for job in found if job.belongs_to(record.project, record.experiment, rule)]
    for job in found:
        if job.fingerprint == fingerprint and (shared or job.name == run):
            relink(Path(record.logs), rule, job.id)
            return job.id
    if found and shared:
        raise StageError(other_settings(found[0], rule))
    return None


def other_settings(job: jobs.Job, rule: str) -> str:
    """Why a rule cannot start beside a job that works for it with other settings."""
    return (
        f"Slurm job {job.id} ({job.state}) already works on {rule} of this experiment, with other settings or inputs\n"
        f"  fix: wait for it; or save and end it (snakemake stop …); or cancel it: scancel {job.id}"
    )


def relink(logs: Path, rule: str, job: str) -> None:
    """Let ``logs/<experiment>/<rule>.log`` point at the newest log of a job that has been found again."""
    own = sorted((logs / rule).glob(f"{job}-*.log"), key=lambda path: path.stat().st_mtime)
    if own:
        link = logs / f"{rule}.log"
        link.unlink(missing_ok=True)
        link.symlink_to(f"{rule}/{own[-1].name}")


def _sbatch(record: Record, call: list[str], rule: str, run: str) -> subprocess.CompletedProcess[str]:
    """Ask until Slurm has taken the job or refused it. A time-out may come after it was taken: look before asking."""
    # Ctrl-C must not fall between Slurm's taking the job and our noting its id; Snakemake cancels what is noted.
    signal.signal(signal.SIGINT, lambda *_: record.interrupted_file.touch())

    def ask() -> subprocess.CompletedProcess[str]:
        answer = queue.run(call, timeout=300, start_new_session=True)
        if queue.is_transient(answer):
            for job in jobs.listed(give_up=record.interrupted_file.exists):
                if job.name == run and job.belongs_to(record.project, record.experiment, rule):
                    return subprocess.CompletedProcess(call, 0, job.id, "")
        return answer

    return queue.patiently(ask, say=_tell, give_up=record.interrupted_file.exists)


def _tell(text: str) -> None:
    """Say something about a submission that goes on, or has succeeded.

    The plugin takes these two words in the error output for a failure, whatever the exit code, and forgets the job.
    """
    if text:
        say(text.replace("submission failed", "submission not taken"))


def states(record: Record, name: str, run: str, arguments: list[str]) -> int:
    """Print ``id|state`` of all jobs of a run, by their ids: one that was found again has another name."""
    noted = {job["job"]: job for job in record.jobs() if job["run"] == run}
    known = _accounted(noted, arguments) if name == "sacct" and record.accounting else None
    by_database = known is not None
    if known is None:
        command = ["squeue", "--me", "--noheader", "--states=all", "--format=%i|%T"]
        answer = queue.patiently(lambda: queue.run(command, timeout=20), POLL_PATIENCE_S - 20)
        if answer.returncode:
            sys.stderr.write(answer.stderr)
            return answer.returncode
        known = _table(answer.stdout)
    known = {job: known[job] for job in noted if job in known}
    for job, state in _settled(record, noted, known, by_database).items():
        if state == "CANCELLED":  # somebody's decision: no retry asks for the nodes again
            marker = record.marker(noted[job]["rule"])
            if not marker.exists():
                marker.parent.mkdir(parents=True, exist_ok=True)
                marker.write_text(f"Slurm job {job} was cancelled\n")
        print(f"{job}|{state}")
    return 0


def _accounted(noted: dict[str, dict], arguments: list[str]) -> dict[str, str] | None:
    """What slurmdbd says; None where it does not answer."""
    command = ["sacct", *_replace(arguments, "--name", None), "--jobs", ",".join(noted)]
    answer = queue.run(command, timeout=25)
    return None if answer.returncode else _table(answer.stdout)


def _table(text: str) -> dict[str, str]:
    """Job → state; sacct writes ``CANCELLED by 1000``."""
    rows = [line.strip().split("|") for line in text.splitlines() if "|" in line]
    return {row[0]: row[1].split()[0] for row in rows if row[1].strip()}


def _settled(record: Record, noted: dict[str, dict], known: dict[str, str], by_database: bool) -> dict[str, str]:
    """States in which a job that is lost for good has ended: by its receipt well, otherwise not."""
    path = record.path.with_suffix(".states")
    try:
        since = json_files.load(path)
        json_files.require(since, dict.fromkeys(since, float))
    except (OSError, ValueError):
        since = {}
    now, told, doubtful = time.time(), dict(known), {}
    for job, entry in noted.items():
        gone = job not in known and not by_database  # slurmdbd may learn of a job some seconds late
        if not gone and known.get(job) not in LOST:
            continue
        doubtful[job] = min(since.get(job, now), now)
        if now - doubtful[job] < SETTLED_S:
            told.pop(job, None)  # the plugin takes silence for "not yet known"
        elif gone:
            rule = record.rules.get(entry["rule"])
            told[job] = "COMPLETED" if rule and rule.receipt and Path(rule.receipt).is_file() else "FAILED"
        else:
            told[job] = "FAILED"
    if doubtful != since:
        files.write_text(path, json.dumps(doubtful))
    return told


def _after(arguments: list[str], option: str) -> str:
    """Value of an option, as ``--option value`` or ``--option=value``; empty without it."""
    for number, word in enumerate(arguments):
        if word == option and number + 1 < len(arguments):
            return arguments[number + 1]
        if word.startswith(f"{option}="):
            return word.partition("=")[2]
    return ""


def _replace(arguments: list[str], option: str, value: str | None) -> list[str]:
    """The arguments with another value of an option, or without it."""
    result, skip = [], False
    for word in arguments:
        if skip:
            skip = False
        elif word == option or word.startswith(f"{option}="):
            skip = word == option
            if value is not None:
                result += [option, value] if skip else [f"{option}={value}"]
        else:
            result.append(word)
    return result
