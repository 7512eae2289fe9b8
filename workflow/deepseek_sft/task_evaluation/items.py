"""What tasks are made of: items of one's own, or a task file of lm-eval; checked in seconds, before anything runs."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from .. import files
from ..errors import BadInputError
from ..evaluation.held_out import read_prompts
from ..settings.evaluate import GATES
from . import judges

LOCAL_BUILDERS = {"json", "csv", "parquet", "text", "arrow"}  # of the library datasets: they read files alone


def own_items(name: str, task: dict[str, Any]) -> list[dict[str, Any]]:
    """Items of ``task["data"]``, each ``{"id", "messages", "answer"}``.

    Raises:
        BadInputError: unreadable, an item without an expected answer, or one that the judge can never find.
    """
    path = Path(task["data"])
    items = []
    for prompt in read_prompts(path):
        where = f"evaluate.tasks.{name}: {path}, item {prompt.id}"
        if prompt.answer is None:
            raise BadInputError(
                f"{where} has no expected answer", "give it `answer`, or end `messages` with a short answer"
            )
        expected = prompt.answer.rpartition("</think>")[2].strip()
        judges.check(task, expected, where)
        items.append({"id": prompt.id, "messages": prompt.messages, "answer": expected})
    return items


class _Loader(yaml.SafeLoader):
    """Reads `!function module.name` as its text; nothing is imported."""


class _Function(str):
    pass


_Loader.add_constructor("!function", lambda loader, node: _Function(loader.construct_scalar(node)))


def lm_eval_files(name: str, path: Path) -> list[Path]:
    """Every local file that a task of lm-eval is made of: its YAML files, their functions' modules, its data.

    Raises:
        BadInputError: unreadable, of a kind that a chat API cannot answer, or something would be fetched at run time.
    """
    where = f"evaluate.tasks.{name}: {path}"
    found = [path]
    values = _with_includes(path, where, found)
    if not isinstance(values.get("task"), str):
        raise BadInputError(f"{where}: is no task: it has no `task: <name>`", "groups are given task by task")
    kind = values.get("output_type", "generate_until")
    if kind != "generate_until":
        raise BadInputError(
            f"{where}: output_type: {kind} needs log-probabilities of choices, which a chat API does not give",
            "ask for the choice's letter: output_type: generate_until, with a filter that finds it",
        )
    if values.get("unsafe_code"):
        raise BadInputError(f"{where}: runs code that the model wrote (unsafe_code), which is not done here")
    for function in _functions(values):
        module = path.parent / f"{function.rpartition('.')[0].replace('.', '/')}.py"
        if not module.is_file():
            raise BadInputError(f"{where}: !function {function}: {module} does not exist")
        found.append(module)
    if not isinstance(values.get("custom_dataset"), _Function):
        found += _data_files(values, where)
    return list(dict.fromkeys(found))


def _with_includes(path: Path, where: str, found: list[Path]) -> dict[str, Any]:
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise BadInputError(f"{where}: {path} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise BadInputError(f"{where}: {path} holds no keys")
    includes = values.pop("include", None) or []
    merged: dict[str, Any] = {}
    for include in [includes] if isinstance(includes, str) else includes:
        other = path.parent / str(include)
        if other in found:
            raise BadInputError(f"{where}: {other} includes itself")
        found.append(other)
        merged |= _with_includes(other, where, found)
    return merged | values


def _functions(value: Any) -> Iterator[str]:
    if isinstance(value, _Function):
        yield str(value)
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _functions(inner)


def _data_files(values: dict[str, Any], where: str) -> list[Path]:
    """Files that ``dataset_path`` and ``dataset_kwargs`` name; relative ones begin at the project's folder."""
    source = str(values.get("dataset_path"))
    given = values.get("dataset_kwargs") or {}
    named = given.get("data_files") if isinstance(given, dict) else None
    if source in LOCAL_BUILDERS and named:
        texts = [text for one in (named.values() if isinstance(named, dict) else [named]) for text in _listed(one)]
        if strange := next((text for text in texts if re.match(r"\w+://", text) or re.search(r"[*?\[]", text)), None):
            raise BadInputError(
                f"{where}: data_files: {strange}: is no file by its name", "name each file; nothing is fetched"
            )
        paths = [Path(given.get("data_dir") or "", text) for text in texts]
    elif Path(source).is_dir():
        paths = sorted(file for file in Path(source).rglob("*") if file.is_file())
    else:
        raise BadInputError(
            f"{where}: dataset_path: {source} would be fetched when it runs",
            "download its files once and write dataset_path: json (csv, parquet) with dataset_kwargs: {data_files: "
            "{test: FILE}}; see docs/evaluation.md",
        )
    if missing := next((file for file in paths if not file.is_file()), None):
        raise BadInputError(
            f"{where}: its data {missing} does not exist", "relative paths begin at the project's folder"
        )
    return paths


def _listed(value: Any) -> list[str]:
    return [str(one) for one in value] if isinstance(value, list) else [str(value)]


def content(name: str, task: dict[str, Any]) -> dict[str, Any]:
    """What shapes a task's result: its settings without gates, and the fingerprints of its files.

    Raises:
        BadInputError: see ``own_items`` and ``lm_eval_files``.
    """
    shaping = {key: value for key, value in task.items() if key not in (*GATES, "data", "lm_eval")}
    paths = [Path(task["data"])] if task["data"] else lm_eval_files(name, Path(task["lm_eval"]))
    prints = []
    for path in paths:
        try:
            prints.append([path.name, files.fingerprint_file(path)])
        except OSError as error:
            raise BadInputError(f"evaluate.tasks.{name}: {path} cannot be read: {error.strerror}") from None
    return {"name": name, "kind": "own" if task["data"] else "lm_eval", **shaping, "files": prints}


def check(tasks: dict[str, dict[str, Any]]) -> dict[str, int | None]:
    """Look at every task as it will be read.

    Returns:
        Task → number of its items; None for tasks of lm-eval, which alone knows.

    Raises:
        BadInputError: a file is missing, an item cannot be judged, something would be fetched.
    """
    found = {}
    for name, task in tasks.items():
        content(name, task)
        found[name] = len(own_items(name, task)) if task["data"] else None
    return found
