"""The one reader of JSON that this project wrote, or that belongs to a model: receipts, markers, statuses, headers.

Such a file may be torn, edited, copied or hostile. What Python's reader lets pass and a later line trips over is
refused here, in words: another type than the one needed, a key twice, NaN and infinities, numbers that no computation
takes, deep nesting, bytes that are not UTF-8. Data of users (chats, prompts, answers) has readers of its own.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from .errors import BadInputError

DEEPEST = 64  # levels of objects and lists; the deepest file of ours has 7
LONGEST_NUMBER = 40  # digits
LARGEST = 1 << 30  # bytes of a file
WORDS = {dict: "an object", list: "a list", str: "a text", int: "a whole number", float: "a number", bool: "true/false"}
WORDS[type(None)] = "null"
AGAIN = "restore it, or remove it and run the stage that wrote it again"


@dataclasses.dataclass(frozen=True)
class Maybe:
    """In ``require``: the key may be absent or null, else it is of this type."""

    kind: Any


class NotJsonError(ValueError):
    """The text is not the JSON that is needed; the words say why, without naming the file."""


def parse(text: str | bytes | bytearray, kind: type | None = dict) -> Any:
    """Parse strict JSON.

    Args:
        kind: what the whole has to be; None: anything.

    Raises:
        NotJsonError: it is none, or another thing than ``kind``.
    """
    try:
        if not isinstance(text, str):
            text = bytes(text).decode()
        value = json.loads(
            text, object_pairs_hook=_unique, parse_constant=_constant, parse_int=_integer, parse_float=_number
        )
    except UnicodeDecodeError as error:
        raise NotJsonError(f"not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        what = "empty" if not str(text).strip() else f"{error.msg}, line {error.lineno} column {error.colno}"
        raise NotJsonError(f"torn or no JSON ({what})") from None
    except RecursionError:
        raise NotJsonError(f"nested deeper than {DEEPEST} levels") from None
    _shallow(value)
    if kind is not None and not _is(value, kind):
        raise NotJsonError(f"it is {describe(value)}, not {WORDS[kind]}")
    return value


def load(path: str | Path, kind: type | None = dict) -> Any:
    """Parse a file.

    Raises:
        OSError: it is not there or cannot be read.
        NotJsonError: see ``parse``.
    """
    with open(path, "rb") as stream:
        content = stream.read(LARGEST + 1)
    if len(content) > LARGEST:
        raise NotJsonError(f"larger than {LARGEST >> 20} MiB")
    return parse(content, kind)


def read(path: str | Path, fields: Mapping[str, Any] | None = None, fix: str = AGAIN) -> dict[str, Any]:
    """The object in a file, with the fields that the caller relies on.

    Args:
        fields: key → type, as ``require`` takes it.
        fix: what the reader of the message can do.

    Raises:
        BadInputError: one sentence with the file and what is wrong in it.
    """
    try:
        value = load(path)
        require(value, fields or {})
    except (OSError, NotJsonError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise BadInputError(f"{path} cannot be read: {reason}", fix) from None
    return value


def require(value: dict[str, Any], fields: Mapping[str, Any]) -> None:
    """Check that keys are there with values of their types.

    Args:
        fields: key → type (``float``: any number), tuple of types, for a nested object a mapping of the same form, or
            one of these in ``Maybe``.

    Raises:
        NotJsonError: naming the key.
    """
    for key, kind in fields.items():
        if isinstance(kind, Maybe):
            if value.get(key) is None:
                continue
            kind = kind.kind
        if key not in value:
            raise NotJsonError(f"{key} is missing")
        nested = isinstance(kind, Mapping)
        kinds = (dict,) if nested else kind if isinstance(kind, tuple) else (kind,)
        if not any(_is(value[key], one) for one in kinds):
            raise NotJsonError(f"{key} is {describe(value[key])}, not {' or '.join(WORDS[one] for one in kinds)}")
        if nested:
            require(value[key], kind)


def describe(value: Any) -> str:
    """A value in a message: its type, and itself where that is short."""
    shown = json.dumps(value, ensure_ascii=True) if isinstance(value, bool | int | float | str) else ""
    return f"{WORDS[type(value)]}" + (f" ({shown[:60]})" if shown else "")


def _is(value: Any, kind: type) -> bool:
    if kind in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, (int, float) if kind is float else kind)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise NotJsonError(f"the key {json.dumps(twice)[:60]} stands twice")
    return value


def _constant(name: str) -> NoReturn:
    raise NotJsonError(f"{name} is no JSON")


def _integer(digits: str) -> int:
    if len(digits) > LONGEST_NUMBER:
        raise NotJsonError(f"a number of {len(digits)} digits")
    return int(digits)


def _number(digits: str) -> float:
    value = float(digits)
    if value in (float("inf"), float("-inf")):
        raise NotJsonError(f"the number {digits[:40]} is too large")
    return value


def _shallow(value: Any) -> None:
    level = [value]
    for _ in range(DEEPEST):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer if isinstance(outer, list) else ())
            if isinstance(inner, dict | list)
        ]
        if not level:
            return
    raise NotJsonError(f"nested deeper than {DEEPEST} levels")
