"""Tools in chats: definitions beside the messages, and calls with their arguments."""

import json
from typing import Any

from .fields import Leftovers, empty
from .rejection import Rejection, short


def read_calls(message: dict[str, Any], left: Leftovers | None) -> tuple[list[dict[str, Any]], list[Any]]:
    """Calls ``{"type", "function": {"name", "arguments"}}`` and their ids, of ``tool_calls`` or ``function_call``.

    Raises:
        Rejection: ``tool_call``.
    """
    given, single = message.get("tool_calls"), message.get("function_call")
    if given is None and single is None:
        return [], []
    if empty(given):
        given = []
    if not empty(single):
        if given:
            raise Rejection("tool_call", "both tool_calls and function_call are given")
        given = [{"function": single}]
    if not isinstance(given, list):
        raise Rejection("tool_call", f"tool_calls is {short(given)}")
    calls = []
    for call in given:
        function = call.get("function") if isinstance(call, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str) or not name.strip():
            raise Rejection("tool_call", f"a call without a function's name: {short(call)}")
        kind = call.get("type") or "function"
        if not isinstance(kind, str):
            raise Rejection("tool_call", f"the type of a call of {short(name)} is {short(kind)}")
        calls.append({"type": kind, "function": {"name": name, "arguments": read_arguments(name, function)}})
        if left is not None:
            _count(call, ("id", "type", "function"), "tool_calls[]", left)
            _count(function, ("name", "arguments"), "tool_calls[].function" if empty(single) else "function_call", left)
    return calls, [call.get("id") for call in given]


def _count(value: dict[str, Any], used: tuple[str, ...], path: str, left: Leftovers) -> None:
    if len(value) > len(used) or not value.keys() <= set(used):
        for name in value.keys() - set(used):
            left.add(f"{path}.{name}", value[name])


def read_arguments(name: str, function: dict[str, Any]) -> str:
    """Arguments of a call as the text of a JSON object; text that is one already stays as it is.

    Empty text becomes ``{}``; an object that was encoded twice is decoded once.

    Raises:
        Rejection: ``tool_call``: missing, not JSON, not an object, or with NaN or infinity, which JSON does not know.
    """
    arguments = function.get("arguments")
    if isinstance(arguments, dict):
        return dump(arguments, "tool_call", f"arguments of {short(name)}")
    if not isinstance(arguments, str):
        raise Rejection("tool_call", f"arguments of {short(name)} are {short(arguments)}")
    if not arguments.strip():
        return "{}"
    value = _loaded(arguments, name)
    if isinstance(value, str):  # encoded twice
        arguments, value = value, _loaded(value, name)
    if not isinstance(value, dict):
        raise Rejection("tool_call", f"arguments of {short(name)} are not a JSON object: {short(arguments)}")
    return arguments


def _loaded(text: str, name: str) -> Any:
    try:
        return json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise Rejection("tool_call", f"arguments of {short(name)} are not JSON ({error}): {short(text)}") from None


def _no_constant(word: str) -> None:
    raise ValueError(f"{word} is no JSON")


def read_definitions(field: str, value: Any) -> list[dict[str, Any]]:
    """Definitions of tools beside the messages: a list of objects, or JSON text of one; its items may be JSON text too.

    ``functions``, the older form, comes out as the newer.

    Raises:
        Rejection: ``tool_definitions``.
    """
    fix = f"leave it out with data.fields: {{{field}: ignore}} if it defines no tools"
    if isinstance(value, str):
        value = _definitions_text(field, value, fix)
    if not isinstance(value, list):
        raise Rejection("tool_definitions", f"{field} is {short(value)}, not a list; {fix}")
    found = []
    for one in value:
        one = _definitions_text(field, one, fix) if isinstance(one, str) else one
        if not isinstance(one, dict):
            raise Rejection("tool_definitions", f"{field} holds {short(one)}, not an object; {fix}")
        found.append({"type": "function", "function": one} if field == "functions" else one)
    return found


def _definitions_text(field: str, text: str, fix: str) -> Any:
    try:
        return json.loads(text) if text.strip() else []
    except (ValueError, RecursionError):
        raise Rejection("tool_definitions", f"{field} is text, but not JSON: {short(text)}; {fix}") from None


def dump(value: Any, reason: str, what: str) -> str:
    """JSON text of a value.

    Raises:
        Rejection: with the reason, where JSON cannot say it: NaN, infinity, dates, bytes, too deep.
    """
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (ValueError, TypeError, RecursionError) as error:
        raise Rejection(reason, f"{what} cannot be written as JSON: {error}") from None


def without_filled_nulls(value: Any) -> Any:
    """A Parquet row without the nulls of its structs; lists keep theirs.

    Arrow gives every struct of a column the fields of all of them, so that a null says no more than a missing field.
    """
    if isinstance(value, dict):
        return {name: without_filled_nulls(inner) for name, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [without_filled_nulls(inner) for inner in value]
    return value


def call_ids(messages: list[dict[str, Any]]) -> list[list[str]]:
    """Ids that a server gives the calls of a conversation: of each message, its calls, or the one it is the output of.

    Templates that show ids (Kimi-K2's) want this form: the function's name and the number of the call in the whole
    conversation. vLLM makes the same for Kimi-K2; other templates do not show them.
    """
    found, opened, number = [], [], 0
    for message in messages:
        own: list[str] = []
        if message["role"] == "assistant":
            names = [call["function"]["name"] for call in message.get("tool_calls") or ()]
            own = [f"functions.{name}:{number + at}" for at, name in enumerate(names)]
            opened, number = list(own), number + len(own)
        elif message["role"] == "tool" and opened:
            own = [opened.pop(0)]
        found.append(own)
    return found
