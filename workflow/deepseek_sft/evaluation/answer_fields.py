"""Fields of a server's answers, each of the type that it must have: a server that answers something else fails a check.

Texts come without lone surrogates, which JSON can spell and no file can hold.
"""

from typing import Any


class CheckFailed(Exception):
    """A check's promise does not hold; the text says what was seen."""


def objects(owner: Any, name: str) -> list[dict[str, Any]]:
    """A list of objects that is not empty."""
    value = _of(owner, name)
    if not isinstance(value, list) or not value or not all(isinstance(entry, dict) for entry in value):
        raise _unlike(name, value, "a list of objects")
    return value


def mapping(owner: Any, name: str) -> dict[str, Any]:
    """An object."""
    value = _of(owner, name)
    if not isinstance(value, dict):
        raise _unlike(name, value, "an object")
    return value


def text(owner: Any, name: str) -> str:
    """A text; empty where it is absent or null, as servers leave out what they have nothing to say in."""
    value = _of(owner, name)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise _unlike(name, value, "text")
    return value.encode("utf-8", "replace").decode()


def count(owner: Any, name: str) -> int:
    """A number of things."""
    value = _of(owner, name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise _unlike(name, value, "a number")
    return value


def number(owner: Any, name: str) -> float:
    """A number, which may be infinite or NaN."""
    value = _of(owner, name)
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise _unlike(name, value, "a number")
    return float(value)


def ids(owner: Any, name: str) -> list[int]:
    """Token ids; none where they are absent or null: servers before vLLM 0.10.2 do not tell them."""
    value = _of(owner, name)
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(i, int) and not isinstance(i, bool) for i in value):
        raise _unlike(name, value, "a list of token ids")
    return value


def _of(owner: Any, name: str) -> Any:
    if not isinstance(owner, dict):
        raise CheckFailed(f"{shown(owner)} where an object with {name} belongs")
    return owner.get(name)


def _unlike(name: str, value: Any, expected: str) -> CheckFailed:
    return CheckFailed(f"{name} is {shown(value)}, expected {expected}")


def shown(value: Any) -> str:
    """The beginning of a value, for messages."""
    words = repr(value)
    return words if len(words) <= 120 else f"{words[:120]}…"
