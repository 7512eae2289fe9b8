"""Settings from what YAML, JSON or a command line gives, with every problem in words for the person who must act."""

import difflib
import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import pydantic

from .. import json_files
from ..errors import BadInputError
from . import field_types

Settings = TypeVar("Settings")
LONGEST_SHOWN = 200  # characters of a refused value
NAMING = ("missing", "unexpected_keyword_argument", "invalid_key")  # errors of pydantic that end with a key


def read(kind: type[Settings], path: str | Path, complete: bool = False) -> Settings:
    """Read and check a stage's settings file; see ``parse``.

    Raises:
        BadInputError: unreadable, a key missing or unknown, or a value that is not allowed; names file and keys.
    """
    try:
        values = json_files.load(path)
    except (OSError, ValueError) as error:
        raise BadInputError(f"settings {path} cannot be read: {error}") from None
    return parse(kind, values, str(path), complete)


def parse(kind: type[Settings], values: Any, where: str, complete: bool = False) -> Settings:
    """Check a stage's settings.

    Args:
        where: start of the message.
        complete: every key must be given, but for those that came later.

    Raises:
        BadInputError: see ``read``.
    """
    if not isinstance(values, dict):
        raise BadInputError(f"{where}: expected an object, found {type(values).__name__}")
    if complete and (lacking := list(_lacking(kind, values))):
        raise BadInputError(f"{where}: missing settings: {', '.join(lacking)}", "add them (config/README.md)")
    settings, found = check(kind, values)
    if found:
        told = "; ".join(found) if len(found) < 2 else "".join(f"\n  - {problem}" for problem in found)
        raise BadInputError(f"{where}: {told}", "correct the settings (config/README.md)")
    return settings


def check(kind: type[Settings], values: dict[str, Any]) -> tuple[Settings, list[str]]:
    """Settings and what is wrong with them; checks of several keys together need each of them to be right."""
    if found := list(_unwritable(values)):
        return None, found  # type: ignore[return-value]
    try:
        settings = _adapter(kind).validate_python(values)
    except pydantic.ValidationError as error:
        found = error.errors(include_url=False, include_context=False)
        inner = {one["loc"][:length] for one in found for length in range(len(one["loc"]))}  # a list of wrong entries
        told = (_explain(kind, one) for one in found if one["loc"] not in inner)
        return None, list(dict.fromkeys(told))  # type: ignore[return-value]
    return settings, list(problems(settings))


def value(hint: Any, given: Any) -> Any:
    """One value of a type; raises ValueError where it is not allowed."""
    return _adapter(hint).validate_python(given)


def problems(settings: Any, prefix: str = "") -> Iterator[str]:
    """Settings that are each allowed but impossible together, in a section and in those within it."""
    if hasattr(settings, "problems"):
        yield from (f"{prefix}{problem}" for problem in settings.problems())
    for name, key in field_types.keys(type(settings)).items():
        if key.section and (inner := getattr(settings, name)) is not None:
            yield from problems(inner, f"{prefix}{name}.")


def filled(kind: Any, values: Any) -> Any:
    """Values of a configuration file: a section or key with nothing below it, which is null in YAML, is left out."""
    if not isinstance(values, dict):
        return values
    result = dict(values)
    for name, key in field_types.keys(kind).items():
        if result.get(name) is None and not key.nullable:
            result.pop(name, None)
            if key.section:
                result[name] = {}
        if key.section and name in result:
            result[name] = filled(key.section, result[name])
    return result


@functools.cache
def _adapter(kind: Any) -> pydantic.TypeAdapter[Any]:
    return pydantic.TypeAdapter(kind)


def _lacking(kind: Any, values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for name, key in field_types.keys(kind).items():
        if name not in values:
            if "later" not in key.marks:
                yield f"{prefix}{name}"
        elif key.section and isinstance(values[name], dict):
            yield from _lacking(key.section, values[name], f"{prefix}{name}.")


def _explain(kind: Any, error: Any) -> str:
    """One line for one error of pydantic."""
    hint, meaning, path = kind, "", []
    for depth, part in enumerate(error["loc"], 1):
        inner = field_types.inside(hint, part)
        for section in filter(field_types.is_section, field_types.members(hint)):
            meaning = field_types.keys(section)[part].meaning if part in field_types.keys(section) else meaning
        named = error["type"] in NAMING and depth == len(error["loc"])
        if inner is not None or named:  # else it is the tag of an alternative
            path.append(str(part))
            hint = inner if inner is not None else hint
    if error["type"] == "missing" and isinstance(error["loc"][-1], int):  # a list that is too short
        return _explain(kind, error | {"loc": error["loc"][:-1], "type": "list"})
    place = ".".join(path)
    if error["type"] in NAMING[1:]:
        return _unknown_key(kind, hint, path, error["input"])
    if error["type"] == "missing":
        return f"{'.'.join(path[:-1]) or 'top level'}: the key `{path[-1]}` is missing: {meaning}"
    shown = repr(error["input"])
    shown = shown if len(shown) <= LONGEST_SHOWN else f"{shown[:LONGEST_SHOWN]}…"
    return f"{place}: {shown} is not allowed, expected {field_types.expected(hint)}. {meaning}".rstrip()


def _unknown_key(kind: Any, hint: Any, path: list[str], value: Any) -> str:
    *parents, key = path
    place = ".".join(path)
    elsewhere = [
        name for name, one in field_types.keys(kind).items() if one.section and key in field_types.keys(one.section)
    ]
    if elsewhere:
        return f"{place}: unknown key; `{key}` belongs to `{elsewhere[0]}:`"
    known = [
        name
        for member in field_types.members(hint)
        if field_types.is_section(member)
        for name in field_types.keys(member)
    ]
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if near and any(map(str.isdecimal, parents)):
        return f"{place}: unknown key; did you mean `{near[0]}`?"
    if not near:
        return f"{place}: unknown key; known keys here: {', '.join(known)}"
    shown = value if isinstance(value, (str, int, float, bool)) else "…"
    lines = [*(f"{name}:" for name in parents), f"{near[0]}: {shown}"]
    written = "".join(f"\n        {'  ' * depth}{line}" for depth, line in enumerate(lines))
    return f"{place}: unknown key; did you mean `{near[0]}`? Write:{written}"


def _unwritable(value: Any, key: str = "", depth: int = 0) -> Iterator[str]:
    """Keys whose values YAML knows and settings files, command lines or bounds do not, each with the reason."""
    if why := _why_unwritable(value, depth):
        yield f"{key}: {why}"
        return
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    for name, part in items:
        inner = f"{key}.{name}" if key else str(name)
        if depth > 1 and not isinstance(name, str) and isinstance(value, dict):
            yield f"{inner}: is no text as a key; write it in quotation marks"
        else:
            yield from _unwritable(part, inner, depth + 1)


def _why_unwritable(value: Any, depth: int) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return "is infinite or not a number, which no bound would notice"
    if isinstance(value, int) and abs(value) >= 10**json_files.LONGEST_NUMBER:
        return f"is a number of more than {json_files.LONGEST_NUMBER} digits"
    if isinstance(value, str) and ("\0" in value or any("\ud800" <= letter <= "\udfff" for letter in value)):
        return "holds a character that no file or command line takes"
    if depth > json_files.DEEPEST - 4:  # that a settings file puts around it
        return "is nested too deep"
    known = isinstance(value, dict | list | tuple | str | bool | int | float | None)
    return "" if known else f"is {type(value).__name__} in YAML; write it as text, in quotation marks"
