"""What settings are made of: types with their bounds, marks of a key, and the words for both.

A section is a class with one field a key: type, default, meaning (the text below it) and marks; checks of several keys
together are its ``problems``. Everything else follows: what is read (``reading``), config/README.md (``document``),
options of scripts (``options``), and which keys make another run.
"""

import functools
import math
import types
import typing
from collections.abc import Iterator
from dataclasses import MISSING, dataclass
from typing import Annotated, Any, Literal

import pydantic
from annotated_types import Ge, Gt, Le, Lt, MinLen, MultipleOf
from pydantic import PlainValidator, StrictBool, StrictStr
from pydantic.dataclasses import dataclass as validated

from ..errors import BadInputError
from ..json_files import LONGEST_NUMBER
from ..tensors.sizes import parse_size

WORDS = {bool: "true or false", int: "an integer", float: "a number", str: "text", types.NoneType: "null"}
BOUNDS = {Ge: "of at least {0.ge}", Gt: "above {0.gt}", Le: "at most {0.le}", Lt: "below {0.lt}"}
BOUNDS |= {MultipleOf: "a multiple of {0.multiple_of}", MinLen: "that is not empty"}


@dataclass(frozen=True)
class Said:
    """Words for a type that say more than its parts."""

    words: str


def _number(value: Any) -> Any:
    """An integer stays one, since 1 and 1.0 are two texts in JSON; YAML 1.1 reads 2e-7 (no dot, or no sign) as text."""
    value = float(value) if isinstance(value, str) else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError("no finite number")
    return value


def _whole(value: Any) -> int:
    """500.0 is 500; true is not 1."""
    if isinstance(value, str) or _number(value) != int(value):
        raise ValueError("no integer")
    if len(str(int(value))) > LONGEST_NUMBER:
        raise ValueError("no reader of settings takes it")
    return int(value)


def _part(value: Any) -> Any:
    """A share as a number, or as text such as 0.5 %."""
    if isinstance(value, str) and value.rstrip().endswith("%"):
        return _number(value.rstrip()[:-1]) / 100
    return _number(value)


def _finite(check: Any) -> PlainValidator:
    def checked(value: Any) -> Any:
        try:
            return check(value)
        except (OverflowError, TypeError):
            raise ValueError("too large, or no number") from None

    return PlainValidator(checked)


def _size_or(word: str) -> Any:
    """A size, read by the very code of the stages, or a word."""

    def checked(text: Any) -> str:
        try:
            if text != word:
                parse_size(text)
        except (BadInputError, TypeError) as error:
            raise ValueError(str(error)) from None
        return text

    return Annotated[str, PlainValidator(checked), Said(f"`{word}` or a size like 5GB or 512MiB")]


def _text_or_number(value: Any) -> Any:
    return value if isinstance(value, str) else _number(value)


def matching(pattern: str, words: str) -> Any:
    """Text of a form."""
    return Annotated[str, pydantic.StringConstraints(strict=True, pattern=pattern), Said(words)]


Truth, Text = StrictBool, StrictStr
Named = Annotated[Text, MinLen(1)]
Number, Whole = Annotated[float, _finite(_number)], Annotated[int, _finite(_whole)]
AboveZero, NotNegative = Annotated[Number, Gt(0)], Annotated[Number, Ge(0)]
Share = Annotated[Number, Ge(0), Le(1)]
Part = Annotated[float, _finite(_part), Said("a share of 0 to below 1, such as 0.005 or 0.5 %"), Ge(0), Lt(1)]
Positive, Count = Annotated[Whole, Ge(1)], Annotated[Whole, Ge(0)]
SizeOrAuto, SizeOrBase = _size_or("auto"), _size_or("base")
Variables = dict[str, Annotated[str, _finite(_text_or_number), Said("text or a number")]]


def section(kind: type) -> Any:
    """A frozen dataclass whose values are checked and whose fields' meanings stand below them."""
    config = pydantic.ConfigDict(extra="forbid", use_attribute_docstrings=True)
    return validated(frozen=True, kw_only=True, config=config)(kind)


def setting(
    default: Any, *, operational: bool = False, same_run: bool = False, later: bool = False, topology: bool = False
) -> Any:
    """A key with marks.

    Args:
        operational: changing it re-runs nothing, and it is no part of a run's id.
        same_run: changing it runs training again, which goes on with the same run.
        later: it came after experiments had begun, whose settings lack it: at its default, under which they go on, it
            is no part of params and ids.
        topology: it says how work is spread over ranks, not what is computed.
    """
    marks = {"operational": operational, "same_run": same_run, "later": later, "topology": topology}
    return pydantic.Field(default, json_schema_extra={"marks": [name for name, set_ in marks.items() if set_]})


@dataclass(frozen=True)
class Key:
    """One setting.

    Attributes:
        hint: its type, with bounds.
        default: MISSING where it must be given.
        meaning: for people.
        marks: see ``setting``.
        section: the class of its own keys, where it has some.
    """

    hint: Any
    default: Any
    meaning: str
    marks: frozenset[str]
    section: Any

    @property
    def nullable(self) -> bool:
        return types.NoneType in members(self.hint)

    @property
    def choices(self) -> tuple[Any, ...]:
        """The values that it, or each of its entries, may have, where these are named; null last."""
        inner = [part for one in members(self.hint) if typing.get_origin(one) is tuple for part in typing.get_args(one)]
        literal = [one for one in (*members(self.hint), *inner) if typing.get_origin(one) is Literal]
        found = tuple(choice for one in literal for choice in typing.get_args(one))
        return (*found, None) if found and self.nullable else found


@functools.cache
def keys(kind: Any) -> dict[str, Key]:
    """The keys of a section, in their order."""
    hints = typing.get_type_hints(kind, include_extras=True)
    found = {}
    for name, field in kind.__pydantic_fields__.items():
        default = MISSING if field.is_required() else plain(field.get_default(call_default_factory=True))
        marks = (field.json_schema_extra or {}).get("marks", ())
        inner = next((member for member in members(hints[name]) if is_section(member)), None)
        texts = (base.__pydantic_fields__[name].description for base in kind.__mro__ if _knows(base, name))
        meaning = " ".join((next(filter(None, texts), "")).split())  # pydantic gives it to the class that says it
        found[name] = Key(hints[name], default, meaning, frozenset(marks), inner)
    return found


def marked(kind: Any, *marks: str) -> frozenset[str]:
    """Names of the keys that have one of these marks."""
    return frozenset(name for name, key in keys(kind).items() if key.marks & set(marks))


def settled(kind: Any, values: dict[str, Any]) -> dict[str, Any]:
    """Values without the later keys that are at their defaults: as params and ids were before these existed."""
    known = keys(kind)
    return {
        name: settled(inner, value) if (inner := known[name].section) and isinstance(value, dict) else value
        for name, value in values.items()
        if not ("later" in known[name].marks and value == known[name].default)
    }


def plain(value: Any) -> Any:
    """Settings as JSON and YAML know them: dictionaries and lists."""
    if is_section(type(value)):
        return {name: plain(getattr(value, name)) for name in keys(type(value))}
    if isinstance(value, dict):
        return {name: plain(entry) for name, entry in value.items()}
    return [plain(entry) for entry in value] if isinstance(value, list | tuple) else value


def _knows(kind: Any, name: str) -> bool:
    return name in getattr(kind, "__pydantic_fields__", ())


def is_section(kind: Any) -> bool:
    return isinstance(kind, type) and hasattr(kind, "__pydantic_fields__")


def inside(hint: Any, part: Any) -> Any:
    """The type of one entry of a mapping or list, or of one key of a section; None where there is none of that name."""
    for member in members(hint):
        if is_section(member) and part in keys(member):
            return keys(member)[part].hint
        if typing.get_origin(member) is dict:
            return typing.get_args(member)[1]
        if typing.get_origin(member) is tuple and isinstance(part, int):
            return typing.get_args(member)[0]
    return None


def expected(hint: Any) -> str:
    """Words for what is allowed."""
    if types.NoneType in members(hint) and (choices := [m for m in members(hint) if typing.get_origin(m) is Literal]):
        return f"{expected(choices[0])}, null"
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(f"`{values[0]}`" if len(values := _choices(one)) == 1 else expected(one) for one in parts)
    if origin is Annotated:
        said = next((mark.words for mark in parts if isinstance(mark, Said)), None)
        bounds = [BOUNDS[type(mark)].format(mark) for mark in parts if type(mark) in BOUNDS]
        first, colon, rest = expected(parts[0]).partition(":")
        return said or " ".join([first, " and ".join(bounds)]).strip() + colon + rest
    if origin is Literal:
        return f"one of {', '.join(map(str, parts))}"
    if origin is tuple:
        count = "" if Ellipsis in parts else f"{len(parts)} values, "
        return f"a list: {count}each {expected(parts[0])}"
    return WORDS.get(hint, "keys and their values")


def _choices(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) is Literal else ()


def members(hint: Any) -> Iterator[Any] | tuple[Any, ...]:
    """A type's alternatives, without marks around them."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return (hint, *members(parts[0])) if typing.get_origin(parts[0]) else (parts[0],)
    if origin in (typing.Union, types.UnionType):
        return tuple(member for part in parts for member in members(part))
    return (hint,)
