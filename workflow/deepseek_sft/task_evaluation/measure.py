"""Evaluates a served model on the tasks that are not measured yet, by lm-eval in its own environment."""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from .. import cli, json_files
from ..errors import BadInputError, CrashError, StoppedError, looked_for
from ..python_path import with_library
from . import items, measured
from .measured import Subject

OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE", "TRANSFORMERS_OFFLINE")
KINDS = {kind.exit_code: kind for kind in (BadInputError, StoppedError, CrashError)}


@dataclasses.dataclass(frozen=True)
class Served:
    """The server to ask.

    Attributes:
        url: its base URL.
        model: name it serves the model under.
        reasoning_parser: its parser; None if reasoning stays in the text.
        concurrency: requests at the same time.
        timeout_s: deadline of one.
    """

    url: str
    model: str
    reasoning_parser: str | None
    concurrency: int
    timeout_s: float


def measure(
    python: str, served: Served, subject: Subject, tasks: dict[str, dict[str, Any]], folder: Path
) -> dict[str, Path]:
    """Measure what is missing in ``folder``.

    Args:
        python: interpreter of the environment ``evaluate``.
        tasks: settings of each task by its name.

    Returns:
        Task → its result.

    Raises:
        BadInputError: a task's files, lm-eval's answer to them, or a request that the server refused.
        CrashError: the server went away.
    """
    folder.mkdir(parents=True, exist_ok=True)
    missing = measured.missing(folder, subject, tasks)
    for name in tasks:
        if name not in missing:
            cli.say(f"  task {name} is measured already")
    if missing:
        with tempfile.TemporaryDirectory(prefix="lm-eval-") as work:
            _run(python, served, {name: tasks[name] for name in missing}, missing, Path(work))
            for name, path in missing.items():
                measured.write(path, subject.of(name, tasks[name]), json_files.load(Path(work, f"{name}.json")))
    return {name: measured.place(folder, name, subject.of(name, task)) for name, task in tasks.items()}


def _run(python: str, served: Served, tasks: dict[str, Any], places: dict[str, Path], work: Path) -> None:
    request = dataclasses.asdict(served) | {
        "tasks": {
            name: {
                "settings": task,
                "items": items.own_items(name, task) if task["data"] else None,
                "transcript": str(places[name].with_suffix(".answers.jsonl")),
                "result": str(work / f"{name}.json"),
            }
            for name, task in tasks.items()
        }
    }
    file, message = work / "request.json", work / "message.txt"
    file.write_text(json.dumps(request, ensure_ascii=False), encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": with_library(os.environ), "TQDM_DISABLE": "1"}
    # lm-eval and datasets keep what they make: for this run alone, on this node. Nothing is asked of a network.
    environment |= dict.fromkeys(OFFLINE, "1") | {"HF_HOME": str(work), "LM_HARNESS_CACHE_PATH": str(work)}
    if not Path(python).exists():
        raise BadInputError(
            f"{python} does not exist", f"python3 workflow/scripts/build_env.py evaluate   {looked_for(python)}"
        )
    command = [python, "-m", f"{__package__}.lm_eval_run", str(file), str(message)]
    code = subprocess.run(command, env=environment, stdout=sys.stderr, check=False).returncode
    if code:
        told = (
            json_files.load(message)
            if message.exists()
            else {"problem": f"lm-eval ended with exit code {code}", "fix": ""}
        )
        raise KINDS.get(code, CrashError)(told["problem"], told["fix"])
