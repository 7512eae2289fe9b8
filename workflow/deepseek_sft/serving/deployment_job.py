"""Submitting a lasting deployment as a Slurm job of its own, and waiting until it answers."""

import dataclasses
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import NoReturn

from .. import files, json_files
from ..cli import say
from ..cluster_jobs import queue
from ..errors import BadInputError, CrashError, StageError
from .lasting_endpoint import ENDPOINT, Endpoint

POLL_S = 2.0
PROGRESS_EVERY_S = 30.0
LIVING = queue.LIVING
CANCEL_S = 60.0
SHOWN_LINES = 60


@dataclasses.dataclass(frozen=True)
class Deployment:
    """A submitted job, as ``serve/deployment/job.json`` keeps it.

    Attributes:
        job: Slurm's id.
        run_dir: folder of the deployment.
        log: the job's output.
        model: fingerprint of the receipt that names the served model.
    """

    job: str
    run_dir: str
    log: str
    model: str


def deploy(results: Path, logs: Path) -> Endpoint:
    """Submit ``results``/serve/deployment/serve.sbatch, or find the job that serves this model already.

    Raises:
        BadInputError: no Slurm, Slurm refuses the job, or a deployment of an earlier model is still there.
        StageError: the job ended before it answered; with its exit code and the message from its log.
    """
    folder = results / "serve" / "deployment"
    model = files.fingerprint(results / "receipts" / "verify_model.json")
    deployment = _read(folder / "job.json")
    if deployment and state(deployment.job)[0] in LIVING:
        if deployment.model != model:
            raise BadInputError(
                f"job {deployment.job} still serves an earlier model of this experiment",
                f"stop it first: scancel {deployment.job}",
            )
        say(f"job {deployment.job} serves this model already")
    else:
        deployment = _submit(results, logs, folder, model)
    return _wait(deployment)


# Slurm's own words: "slurmstepd: error: StepId=7.0 exceeded memory limit (…)", "srun: error: node2: task 1: Killed".
SLURM_KILLED = re.compile(
    r"^(?:\d+: )?(slurmstepd.*(?:memory limit|oom.?kill).*|srun: error: .*(?:Out Of Memory|Killed).*)$", re.MULTILINE
)
SLURM_MEMORY = re.compile(r"memory limit|oom.?kill|Out Of Memory")


def state(job: str) -> tuple[str, str]:
    """A job's state and what it waits for or where it runs; an empty state for a job that Slurm has forgotten.

    Raises:
        BadInputError: Slurm's commands are not installed.
    """
    command = ["squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T|%R"]
    answer = _run(command)
    if answer.returncode and "Invalid job id" not in answer.stderr:
        return "UNKNOWN", answer.stderr.strip()  # the controller is away; it will come back
    found, _, why = answer.stdout.strip().partition("|")
    return found, why


def _read(path: Path) -> Deployment | None:
    """
    Raises:
        BadInputError: the file is torn or edited; its job may still hold nodes.
    """
    if not path.exists():
        return None
    names = [field.name for field in dataclasses.fields(Deployment)]
    fix = "look with squeue whether its job still runs, end it with scancel, and remove the file"
    value = json_files.read(path, dict.fromkeys(names, str), fix)
    return Deployment(**{name: value[name] for name in names})


def _submit(results: Path, logs: Path, folder: Path, model: str) -> Deployment:
    (logs / "serve").mkdir(parents=True, exist_ok=True)
    script = folder / "serve.sbatch"
    answer = queue.patiently(lambda: _run(["sbatch", "--parsable", str(script)]), say=say)
    if queue.is_transient(answer):
        raise CrashError(
            f"Slurm did not answer while {script} was submitted: {answer.stderr.strip()}",
            "see whether it took the job (squeue --me), then run the same command again",
        )
    if answer.returncode:
        raise BadInputError(f"Slurm does not take {script}: {answer.stderr.strip()}", "see `serve:` in the profile")
    job = queue.submitted_job(answer.stdout)
    if job is None:
        raise CrashError(
            f"sbatch took {script}, but printed no job id: {answer.stdout.strip()!r}",
            "look for the job with squeue --me and cancel it",
        )
    run_dir, log = results / "serve" / f"deployment-{job}", logs / "serve" / f"{job}.log"
    deployment = Deployment(job, str(run_dir), str(log), model)
    try:
        files.write_json(folder / "job.json", dataclasses.asdict(deployment))
    except BaseException:  # a full disk: nobody would find it again
        _cancel(job)
        raise
    say(f"submitted job {job}; its log: {log}; Ctrl-C cancels it until it answers")
    return deployment


def _wait(deployment: Deployment) -> Endpoint:
    """Until the endpoint is there; a signal cancels the job."""
    previous = {number: signal.signal(number, _interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return _poll(deployment)
    except BaseException:  # also an error of ours: what was submitted must not stay unseen
        _cancel(deployment.job)
        raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _cancel(job: str) -> None:
    """Cancel a job that has not ended by itself."""
    if state(job)[0] not in (*LIVING, "UNKNOWN"):
        return
    answer = queue.patiently(lambda: _run(["scancel", job]), CANCEL_S)
    say(f"cancelled job {job}" if answer.returncode == 0 else f"job {job} could not be cancelled: scancel {job}")


def _poll(deployment: Deployment) -> Endpoint:
    begin = said = time.monotonic()
    while True:
        found, why = state(deployment.job)
        endpoint = Endpoint.read(Path(deployment.run_dir) / ENDPOINT)
        if endpoint and found == "RUNNING":
            return endpoint
        if found not in (*LIVING, "UNKNOWN"):
            _explain(deployment, found)
        if time.monotonic() - said >= PROGRESS_EVERY_S:
            said = time.monotonic()
            say(f"{said - begin:.0f} s: job {deployment.job} is {found} ({why}); {_last_line(deployment)}")
        time.sleep(POLL_S)


def _explain(deployment: Deployment, found: str) -> NoReturn:
    """Raise the error with which the job ended, as its log tells it."""
    try:
        text = Path(deployment.log).read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    lines = re.sub(r"^\d+: ", "", text, flags=re.MULTILINE).splitlines()  # srun --label
    first = next((i for i, line in enumerate(lines) if line.startswith("error: ")), max(0, len(lines) - 20))
    shown = "".join(f"\n  {line}" for line in lines[first : first + SHOWN_LINES])
    code = _exit_code(deployment.job)
    kind = {2: BadInputError}.get(code, CrashError)
    # Slurm kills the whole step, the program that could have said so included.
    killed = "; ".join(dict.fromkeys(line.strip() for line in SLURM_KILLED.findall(text)))
    memory = bool(SLURM_MEMORY.search(killed))
    cause = f", killed by Slurm for lack of memory: {killed}" if memory else ""
    error: StageError = kind(
        f"job {deployment.job} ended before the model answered ({found or 'gone'}, exit code {code}){cause}; "
        f"{deployment.log} says:{shown}",
        "raise `mem_mb` of the rule serve (or smoke_test) in the profile" if memory else "",
    )
    raise error


def _exit_code(job: str) -> int | None:
    match = re.search(r"ExitCode=(\d+):", _run(["scontrol", "show", "job", job]).stdout)
    return int(match[1]) if match else None


def _last_line(deployment: Deployment) -> str:
    try:
        lines = Path(deployment.log).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return "it has written nothing yet"
    return lines[-1][:200] if lines else "it has written nothing yet"


def _run(command: list[str]) -> subprocess.CompletedProcess:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    except FileNotFoundError:
        raise BadInputError(
            f"the target `serve` submits a Slurm job, and there is no `{command[0]}` here",
            "run it on the cluster, or in the foreground: bash results/<experiment>/serve/deployment/serve.sbatch",
        ) from None
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", f"{command[0]} does not answer")


def _interrupt(_number: int, _frame: object) -> NoReturn:
    raise KeyboardInterrupt
