"""Formats of chat records: the registry. A new format is one small function and one line in ``FORMATS``.

A format turns a record (a decoded JSON object or Parquet row) into messages of OpenAI's form, which
``messages.normalise`` then checks; so a format only says where its fields are.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .messages import Rejection

Record = dict[str, Any]
Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Format:
    """One format of records.

    Args:
        fields: fields by which ``auto`` recognises it; all must be there and not null.
        convert: record → messages of OpenAI's form; raises Rejection.
        summary: one line for --help and the documentation.
    """

    fields: tuple[str, ...]
    convert: Callable[[Record], Messages]
    summary: str


def from_openai(record: Record) -> Messages:
    """``messages`` as they are."""
    return record.get("messages")  # type: ignore[return-value]  # normalise refuses what is no list


SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant"}


def from_sharegpt(record: Record) -> Messages:
    """``conversations`` of ``{"from", "value"}`` (or ``role``, ``content``), optionally a ``system`` text beside."""
    turns = record.get("conversations")
    if not isinstance(turns, list):
        raise Rejection("no_messages", "conversations is missing or not a list")
    messages: Messages = []
    if record.get("system") is not None:
        messages.append({"role": "system", "content": record["system"]})
    for number, turn in enumerate(turns, 1):
        role = (turn.get("from") or turn.get("role")) if isinstance(turn, dict) else None
        if not isinstance(role, str):
            raise Rejection("invalid_message", f"message {number}: no sender")
        content = turn["value"] if turn.get("value") is not None else turn.get("content")
        messages.append({**turn, "role": SHAREGPT_ROLES.get(role, role), "content": content})
    return messages


def from_alpaca(record: Record) -> Messages:
    """``instruction`` (+ ``input`` on the next line) and ``output``, with optional ``system`` and ``history`` pairs."""
    texts = {}
    for field in ("instruction", "input", "output", "system"):
        texts[field] = record.get(field) if record.get(field) is not None else ""
        if not isinstance(texts[field], str):
            raise Rejection("missing_field", f"{field} is not text")
    messages: Messages = [{"role": "system", "content": texts["system"]}]
    history = record.get("history")
    for pair in history if history is not None else []:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise Rejection("missing_field", "history is not a list of [instruction, answer] pairs")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    prompt = "\n".join(text for text in (texts["instruction"], texts["input"]) if text)
    answer = {name: record[name] for name in ("reasoning_content", "reasoning", "loss", "weight") if name in record}
    return [
        *messages,
        {"role": "user", "content": prompt},
        {"role": "assistant", "content": texts["output"], **answer},
    ]


FORMATS: dict[str, Format] = {
    "openai": Format(("messages",), from_openai, "messages of {role, content, reasoning_content, loss}"),
    "sharegpt": Format(("conversations",), from_sharegpt, "conversations of {from, value}, optional system"),
    "alpaca": Format(("instruction", "output"), from_alpaca, "instruction, input, output, optional system, history"),
}

AUTO = "auto"


def convert(record: Any, name: str = AUTO) -> Messages:
    """Messages of a record in the named format; ``auto`` takes the first format whose fields it has.

    Raises:
        Rejection: ``not_an_object``, ``unknown_format`` and those of the format.
    """
    if not isinstance(record, dict):
        raise Rejection("not_an_object", f"the record is a {type(record).__name__}, not an object")
    if name != AUTO:
        return FORMATS[name].convert(record)
    for candidate in FORMATS.values():
        if all(record.get(field) is not None for field in candidate.fields):
            return candidate.convert(record)
    fields = ", ".join(sorted(map(str, record))[:12]) or "none"
    raise Rejection("unknown_format", f"no known format has these fields: {fields}")
