"""Settings as options of a script, one each: their help, their values, and the command line that gives them."""

import argparse
from collections.abc import Callable
from types import NoneType
from typing import Any, TypeVar

from . import field_types, reading

Settings = TypeVar("Settings")


def add(parser: argparse._ActionsContainer, kind: Any, *names: str) -> None:
    """One option for each key of a section, or for these; a value that is not allowed is refused with what is."""
    for name in names or field_types.keys(kind):
        key = field_types.keys(kind)[name]
        option, help_ = f"--{name.replace('_', '-')}", key.meaning.replace("%", "%%")
        if bool in field_types.members(key.hint):
            parser.add_argument(option, action=argparse.BooleanOptionalAction, default=key.default, help=help_)
        else:
            default = ",".join(map(str, key.default)) if isinstance(key.default, list) else key.default
            parser.add_argument(option, type=_reader(key), default=default, choices=key.choices or None, help=help_)


def chosen(kind: type[Settings], arguments: argparse.Namespace) -> Settings:
    """The settings that a command line gives.

    Raises:
        BadInputError: naming the setting, its value and what is expected.
    """
    return reading.parse(kind, {name: getattr(arguments, name) for name in field_types.keys(kind)}, "command line")


def words(settings: Any) -> list[str]:
    """The command line that gives these settings."""
    found = []
    for name in field_types.keys(type(settings)):
        option, value = name.replace("_", "-"), getattr(settings, name)
        if isinstance(value, bool):
            found.append(f"--{option}" if value else f"--no-{option}")
        else:
            found.append(f"--{option}={','.join(map(str, value)) if isinstance(value, tuple) else _word(value)}")
    return found


def _word(value: Any) -> str:
    return "none" if value is None else str(value)


def _reader(key: field_types.Key) -> Callable[[str], Any]:
    kind = next(member for member in field_types.members(key.hint) if member is not NoneType)

    def value(text: str) -> Any:
        if isinstance(key.default, list):
            return [int(word) for word in text.split(",")]
        return None if key.nullable and text == "none" else kind(text) if kind in (int, float) else text

    def parse(text: str) -> Any:
        try:
            return reading.value(key.hint, value(text))
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not allowed, expected {field_types.expected(key.hint)}"
            ) from None

    return parse if not key.choices else value
