"""Asking the site's Slurm, all at once and in bounded time: a tool that hangs costs seconds, and a warning."""

import concurrent.futures
import getpass
import os
import shlex
import signal
import subprocess
from collections.abc import Sequence

from ..errors import StageError
from . import notation
from .answers import Site

ANSWER_S = 6.0  # Slurm's tools answer within a second; the start of a run may not take longer for one that hangs
SCONTROL = ("scontrol", "--oneliner", "--all", "show")


class SilentError(StageError):
    """A tool of Slurm is absent, fails or hangs."""


def site() -> tuple[Site, list[str]]:
    """What Slurm says, and sentences on what it did not say.

    Raises:
        SilentError: scontrol does not answer, so that nothing can be judged.
    """
    with concurrent.futures.ThreadPoolExecutor(max_workers=5) as pool:
        asked = {what: pool.submit(ask, [*SCONTROL, what]) for what in ("config", "partition", "node", "reservation")}
        answers = {what: future.result() for what, future in asked.items()}
    silent = []
    accounts: dict[str, str] = {}
    if notation.settings(answers["config"]).get("AccountingStorageType", "").endswith("slurmdbd"):
        try:
            accounts = _accounts()
        except SilentError as error:
            silent.append(f"{error.problem}: limits of accounts and QOS are not checked")
    return Site.from_text(
        answers["config"], answers["partition"], answers["node"], answers["reservation"], **accounts
    ), silent


def _accounts() -> dict[str, str]:
    show, user = ["sacctmgr", "--parsable2", "show"], getpass.getuser()
    questions = {
        "associations": [*show, "associations", "where", f"user={user}"],
        "qos": [*show, "qos"],
        "users": [*show, "user", user],
    }
    with concurrent.futures.ThreadPoolExecutor(max_workers=3) as pool:
        asked = {name: pool.submit(ask, question) for name, question in questions.items()}
        answers = {name: future.result() for name, future in asked.items()}
    mine = sorted({row.get("Account", "") for row in notation.table(answers["associations"])} - {""})
    if mine:
        answers["of_accounts"] = ask([*show, "associations", "where", f"accounts={','.join(mine)}"])
    return answers


def ask(command: Sequence[str], seconds: float = ANSWER_S) -> str:
    """Standard output of a command.

    Raises:
        SilentError: it is absent, fails, or says nothing for ``seconds``; then it is killed with its children.
    """
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
    except OSError as error:
        raise SilentError(f"{command[0]}: {error.strerror}") from None
    try:
        output, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise SilentError(f"`{shlex.join(command)}` has not answered for {seconds:.0f} s") from None
    if process.returncode:
        raise SilentError(f"`{shlex.join(command)}` failed: {' '.join(errors.split()) or process.returncode}")
    return output


def node_memory_mb(partition: str, nodes: int = 1) -> int | None:
    """Memory that each of ``nodes`` nodes of a partition has for jobs, in MB; None where sinfo does not say it."""
    command = ["sinfo", "--noheader", "--Node", "--format=%N %m", *(["--partition", partition] if partition else [])]
    try:
        answer = ask(command)
    except SilentError:
        return None
    pairs = [line.split() for line in answer.splitlines() if len(line.split()) == 2]
    found = sorted({name: int(size) for name, size in pairs if size.isdigit()}.values(), reverse=True)
    return found[nodes - 1] if len(found) >= nodes else None


def rehearse(submissions: dict[str, str]) -> list[str]:
    """What ``sbatch --test-only`` says against each rule's sbatch line: warnings, since it errs in both directions.

    Args:
        submissions: rule → options of its sbatch line, as shell text.
    """
    commands = {
        rule: ["sbatch", "--test-only", *shlex.split(text), "--wrap", "true"] for rule, text in submissions.items()
    }
    found = []
    with concurrent.futures.ThreadPoolExecutor(max_workers=4) as pool:
        asked = {rule: pool.submit(ask, command, ANSWER_S / 2) for rule, command in commands.items()}
        for rule, future in asked.items():
            try:
                future.result()
            except SilentError as error:
                said = error.problem.partition("failed: ")[2].replace("allocation failure: ", "")
                if said:
                    found.append(f"{rule}: `sbatch --test-only` says: {said}")
    return found
