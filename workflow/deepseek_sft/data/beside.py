"""What stands beside the messages of a record: system text, tools, reasoning, flags; and what must not stand there."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from .fields import (
    IGNORE,
    LOSS,
    MEDIA,
    NOT_LOSS,
    PREFERENCE,
    REASONING,
    SPANS,
    SYSTEM,
    TOOLS,
    VERDICT,
    Leftovers,
    Vocabulary,
    empty,
    plain_name,
)
from .messages import THINK_CLOSE, parse_loss, read_reasoning, split_reasoning
from .rejection import Rejection, short
from .tools import read_definitions

Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Conversation:
    """A record read: messages of OpenAI's form, not yet normalised, and definitions of tools."""

    messages: Messages
    tools: list[dict[str, Any]]


class Layout(Protocol):
    """What is to be known of a format: see ``formats.Format``."""

    own: frozenset[str]
    convert: Callable[[dict[str, Any]], Messages]
    side_notes: tuple[str, ...]
    list_of_messages: str
    unwanted_system: str


def read_beside(record: dict[str, Any], known: Layout, vocabulary: Vocabulary, left: Leftovers) -> Conversation:
    """Convert a record and join to its messages what stands beside them.

    Raises:
        Rejection: ``preference_data``, ``non_text_part``, ``tool_definitions``, ``misplaced_reasoning``,
            ``reasoning_conflict``, ``invalid_content``, ``invalid_loss``, ``no_trained_turn``, and the format's own.
    """
    found: dict[str, list[tuple[str, Any]]] = {}
    own = known.own
    for name, value in record.items():
        if name in own or value is None:
            continue
        meaning = vocabulary.of_record(name)
        if meaning in (MEDIA, PREFERENCE, VERDICT, SPANS):
            _refuse(name, value, meaning, left)
        elif meaning:
            found.setdefault(meaning, []).append((name, value))
        elif name == "id" and isinstance(value, str | int) and not isinstance(value, bool):
            continue
        else:
            left.add(name, value, known=name in known.side_notes)
    messages = known.convert(record)
    tools = _tools(found[TOOLS]) if TOOLS in found else []
    if (found or known.unwanted_system) and _are_messages(messages):  # normalise refuses what is none
        messages = _with_system(messages, found.get(SYSTEM, []), known, left)
        messages = _with_flags(messages, found, known, left)
        for name, value in found.get(REASONING, []):
            if text := read_reasoning(name, value, left).strip():
                messages = _with_reasoning(messages, name, text, known)
    left.prefix = f"{known.list_of_messages}[]." if known.list_of_messages else ""
    return Conversation(messages, tools)


def _are_messages(messages: Any) -> bool:
    return isinstance(messages, list) and all(isinstance(message, dict) for message in messages)


def _refuse(name: str, value: Any, meaning: str, left: Leftovers) -> None:
    """Reject what cannot be trained on as it stands; count what only bears such a name."""
    ignoring = f"data.fields: {{{name}: {IGNORE}}} leaves the field out"
    if empty(value):
        return
    if meaning == VERDICT:
        if value in (False, 0) or (isinstance(value, str) and value.strip().lower() == "false"):
            raise Rejection("preference_data", f"{name} is {short(value)}: the answer is marked as bad; {ignoring}")
    elif meaning == SPANS:
        raise Rejection("invalid_loss", f"{name}: only whole answers can be trained or not; {ignoring}")
    elif meaning == PREFERENCE:
        bad = value is (plain_name(name) != "chosen")
        if bad or isinstance(value, str | list | dict):
            raise Rejection("preference_data", f"{name} beside the conversation; {ignoring}")
    elif isinstance(value, str | list | dict | bytes):
        raise Rejection("non_text_part", f"{name} beside the text; {ignoring}")
    left.add(name, value, known=True)


def _tools(given: list[tuple[str, Any]]) -> list[dict[str, Any]]:
    tools: list[dict[str, Any]] = []
    for name, value in given:
        read = [] if empty(value) else read_definitions(name, value)
        if tools and read and tools != read:
            raise Rejection("tool_definitions", f"{given[0][0]} and {name} differ")
        tools = tools or read
    return tools


def _with_system(messages: Messages, given: list[tuple[str, Any]], known: Layout, left: Leftovers) -> Messages:
    """System texts beside the messages come first; a text that is there already is not said twice."""
    unwanted = known.unwanted_system
    kept = []
    for message in messages:
        if unwanted and message.get("role") == "system" and unwanted in str(message.get("content")):
            left.add(f"{known.list_of_messages}[].value", message.get("content"), known=True)
        else:
            kept.append(message)
    texts = [message.get("content") for message in kept if message.get("role") in ("system", "developer")]
    beside = []
    for name, value in given:
        if unwanted and unwanted in str(value):
            left.add(name, value, known=True)
        elif not empty(value) and value not in texts:
            texts.append(value)
            beside.append({"role": "system", "content": value})
    return [*beside, *kept]


def _with_flags(
    messages: Messages, found: dict[str, list[tuple[str, Any]]], known: Layout, left: Leftovers
) -> Messages:
    """Loss beside a single turn is its answer's; beside a list of messages it speaks of all of them."""
    flags = [(name, value, meaning) for meaning in (LOSS, NOT_LOSS) for name, value in found.get(meaning, [])]
    if not flags or not messages:
        return messages
    if not known.list_of_messages:
        return [*messages[:-1], {**messages[-1], **{name: value for name, value, _ in flags}}]
    for name, value, meaning in flags:
        try:
            flag = parse_loss(value, name)
        except Rejection:  # a measure or a number of repetitions that only shares the name
            left.add(name, value)
            continue
        if flag is not None and flag is (meaning == NOT_LOSS):
            raise Rejection("no_trained_turn", f"{name} is {short(value)} for the whole record")
    return messages


def _with_reasoning(messages: Messages, name: str, text: str, known: Layout) -> Messages:
    """Reasoning beside the messages is that of the one answer."""
    answers = [number for number, message in enumerate(messages) if message.get("role") == "assistant"]
    if not known.list_of_messages:
        answers = answers[-1:]
    if len(answers) != 1:
        raise Rejection(
            "misplaced_reasoning",
            f"{name} beside {len(answers)} answers; data.fields: {{{name}: {IGNORE}}} leaves it out",
        )
    (at,) = answers
    message = messages[at]
    content, other = message.get("content"), message.get("reasoning_content")
    if isinstance(content, str) and THINK_CLOSE in content and split_reasoning(content)[0].split() == text.split():
        return messages  # the answer's own thinking block says the same
    if isinstance(other, str) and other.strip():
        if other.split() != text.split():
            raise Rejection("reasoning_conflict", f"{name} and the answer's own reasoning differ")
        return messages
    if not empty(other):
        return messages  # normalise refuses it
    return [*messages[:at], {**message, "reasoning_content": text}, *messages[at + 1 :]]
