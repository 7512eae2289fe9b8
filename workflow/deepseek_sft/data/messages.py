"""The one form of a conversation that the data stage works with, and the checks that lead to it.

A conversation is a list of messages ``{"role", "content"[, "loss"]}``:

* at most one ``system`` message, first; then ``user`` and ``assistant`` in turn, ``user`` first;
* assistant content is ``<think>\\n{reasoning}\\n</think>\\n\\n{answer}``, or the bare answer without reasoning;
* an assistant message may carry ``tool_calls`` of ``{"type", "function": {"name", "arguments"}}``, arguments being JSON
  text; then one ``tool`` message per call follows, in the calls' order, and ``assistant`` again;
* every assistant message carries a boolean ``loss``, no other message does, and at least one is true.

What does not fit is rejected with a code of ``REASONS``; nothing is guessed. docs/data.md lists every outcome.
"""

import json
from typing import Any, NamedTuple

from .fields import (
    IGNORE,
    LOSS,
    MEDIA,
    NOT_LOSS,
    PLAIN,
    REASONING,
    SPANS,
    Leftovers,
    Vocabulary,
    empty,
    is_switch,
    plain_name,
)
from .rejection import Rejection, short
from .tools import read_calls

THINK_OPEN = "<think>"
THINK_CLOSE = "</think>"

_TEXT_PARTS = (None, "text", "input_text", "output_text")
_THINKING_PARTS = {"thinking": ("thinking", "text"), "reasoning": ("reasoning", "text"), "thought": ("thought", "text")}
_SWITCHES = ("reasoning", "thinking", "think")  # names that also stand for a mode: reasoning: "on"
_BASE = ("role", "content", "tool_calls", "function_call", "tool_call_id", "name")  # read by their own rules


def json_line(value: Any) -> bytes:
    """One line of JSON Lines in UTF-8; lone surrogates come out as JSON escapes."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    return escape_separators(text).encode("utf-8", "backslashreplace") + b"\n"


def escape_separators(text: str) -> str:
    """JSON text with line and paragraph separators escaped, so that readers which split at them see one line."""
    if text.isascii():
        return text
    for separator in "\x85\u2028\u2029":
        text = text.replace(separator, f"\\u{ord(separator):04x}")
    return text


def join_reasoning(reasoning: str, answer: str) -> str:
    """Assistant content as ``train.jsonl`` holds it."""
    return f"{THINK_OPEN}\n{reasoning}\n{THINK_CLOSE}\n\n{answer}" if reasoning else answer


def split_reasoning(content: str) -> tuple[str, str]:
    """``(reasoning, answer)`` of assistant content: one thinking block at the start, or no tag anywhere.

    The reasoning loses surrounding whitespace, the answer surrounding line ends. Whitespace alone is no reasoning.

    Raises:
        Rejection: ``think_tags``.
    """
    opened, closed = content.count(THINK_OPEN), content.count(THINK_CLOSE)
    if not opened and not closed:
        return "", content.strip("\r\n")
    head, _, rest = content.partition(THINK_OPEN)
    reasoning, close, answer = rest.partition(THINK_CLOSE)
    if (opened, closed) != (1, 1) or head.strip() or not close:
        where = "" if opened != 1 or closed != 1 else ", not as one block at the start"
        raise Rejection("think_tags", f"assistant content has {opened} <think> and {closed} </think>{where}")
    return reasoning.strip(), answer.strip("\r\n")


def parse_loss(value: Any, name: str = "loss") -> bool | None:
    """``loss`` (or a field of the same meaning) as a boolean, or None where it is not given (missing or null).

    Accepted: booleans, the numbers 0 and 1, the words "true" and "false" in any case.

    Raises:
        Rejection: ``invalid_loss``.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int | float) and value in (0, 1):
        return bool(value)
    if isinstance(value, str) and value.strip().lower() in ("true", "false"):
        return value.strip().lower() == "true"
    raise Rejection("invalid_loss", f"{name} is {short(value)}; write true or false")


class Content(NamedTuple):
    """Content of a message taken apart: text, reasoning of thinking blocks, and flags of parts by their names."""

    text: str
    reasoning: str = ""
    flags: tuple[tuple[str, bool | None], ...] = ()


def read_content(content: Any, vocabulary: Vocabulary = PLAIN, left: Leftovers | None = None) -> Content:
    """A string, a list of text parts (joined by line ends, as servers do) after thinking blocks, or null.

    Raises:
        Rejection: ``invalid_content``, ``non_text_part``, ``think_tags``, ``invalid_loss``.
    """
    if content is None or isinstance(content, str):
        return Content(content or "")
    if not isinstance(content, list):
        raise Rejection("invalid_content", f"content is {short(content)}")
    texts: list[str] = []
    thinking: list[str] = []
    flags: list[tuple[str, bool | None]] = []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
            continue
        kind = part.get("type") if isinstance(part, dict) else part
        field = next((n for n in _thinking_fields(kind) if isinstance(part.get(n), str)), "")
        if field:
            if texts:
                raise Rejection("think_tags", "a thinking block follows text")
            thinking.append(part[field])
        elif isinstance(part, dict) and kind in _TEXT_PARTS and isinstance(part.get("text"), str):
            field = "text"
            texts.append(part[field])
        else:
            raise Rejection("non_text_part", f"content part {short(kind)} is not text")
        if len(part) > 2 or part.keys() - {"type", field}:
            flags += _rest_of_part(part, field, vocabulary, left)
    return Content("\n".join(texts), "\n".join(text for text in thinking if text.strip()), tuple(flags))


def _thinking_fields(kind: Any) -> tuple[str, ...]:
    return _THINKING_PARTS.get(kind, ()) if isinstance(kind, str) else ()


def _rest_of_part(
    part: dict[str, Any], field: str, vocabulary: Vocabulary, left: Leftovers | None
) -> list[tuple[str, bool | None]]:
    """Flags of a part of content; its other fields are counted."""
    flags: list[tuple[str, bool | None]] = []
    for name in part.keys() - {"type", field}:
        meaning = vocabulary.of_part(name)
        if meaning in (LOSS, NOT_LOSS):
            flags.append(_flag(name, part[name], meaning))
        elif left is not None and meaning != IGNORE:
            left.add(f"content[].{name}", part[name])
    return flags


def _flag(name: str, value: Any, meaning: str) -> tuple[str, bool | None]:
    flag = parse_loss(value, name)
    return name, (not flag) if meaning == NOT_LOSS and flag is not None else flag


def normalise(messages: Any, vocabulary: Vocabulary = PLAIN, left: Leftovers | None = None) -> list[dict[str, Any]]:
    """Bring messages of OpenAI's form into the one form of this module.

    Args:
        messages: list of ``{"role", "content"}`` with, optionally, fields that mean reasoning or loss.
        vocabulary: what the fields' names mean.
        left: where fields are counted that nothing uses.

    Raises:
        Rejection: with the code and the number of the message (from 1).
    """
    if not isinstance(messages, list) or not messages:
        raise Rejection("no_messages")
    system: list[str] = []
    turns: list[dict[str, Any]] = []
    open_calls: list[tuple[Any, str]] = []  # ids and names of calls without an output yet
    for number, message in enumerate(messages, 1):
        try:
            turn, calls = _normalise_one(message, vocabulary, left)
            if turn["role"] == "system":
                if turns:
                    raise Rejection("late_system")
                system.append(turn["content"])
                continue
            _check_order(turn, turns[-1] if turns else None)
            if turn["role"] == "tool":
                _answer_call(message, open_calls, left)
            elif open_calls:
                raise Rejection("tool_output", f"{len(open_calls)} calls have no output")
            open_calls += calls
            turns.append(turn)
        except Rejection as rejection:
            raise Rejection(rejection.reason, f"message {number}: {rejection.message}") from None
    if not any(turn.get("loss") for turn in turns):
        raise Rejection("no_trained_turn")
    prompt = "\n\n".join(text for text in system if text.strip())
    return [{"role": "system", "content": prompt}, *turns] if prompt else turns


def check_canonical(messages: Any) -> list[dict[str, Any]]:
    """Check that messages have this module's form already, and return them.

    Raises:
        Rejection: ``invalid_record``.
    """
    try:
        same = normalise(messages)
    except Rejection as rejection:
        raise Rejection("invalid_record", f"{rejection.reason}: {rejection.message}") from None
    if same != messages or any(type(m.get("loss", True)) is not bool for m in messages):
        raise Rejection("invalid_record", "the messages are not in the form that prepare_data writes")
    return same


def _check_order(turn: dict[str, Any], before: dict[str, Any] | None) -> None:
    if before is None:
        allowed: tuple[str, ...] = ("user",)
    elif before["role"] == "assistant":
        allowed = ("tool",) if "tool_calls" in before else ("user",)
    else:
        allowed = ("assistant",) if before["role"] == "user" else ("tool", "assistant")
    if turn["role"] not in allowed:
        place = "comes first" if before is None else f"follows {before['role']}"
        raise Rejection("role_order", f"{turn['role']} {place}")


def _answer_call(message: dict[str, Any], open_calls: list[tuple[Any, str]], left: Leftovers | None) -> None:
    if not open_calls:
        raise Rejection("tool_output", "more outputs than calls")
    (call, name), given = open_calls.pop(0), message.get("tool_call_id")
    if type(call) is type(given) and isinstance(call, str | int):
        if call != given:
            raise Rejection("tool_output", f"the output is of call {short(given)}, the next call is {short(call)}")
    elif left is not None:
        left.add("tool_call_id", given)
    if left is not None and message.get("name") != name:
        left.add("name", message.get("name"))


def _normalise_one(
    message: Any, vocabulary: Vocabulary, left: Leftovers | None
) -> tuple[dict[str, Any], list[tuple[Any, str]]]:
    """The message in this module's form, and ids and names of its tool calls."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise Rejection("invalid_message")
    role = {"developer": "system", "function": "tool"}.get(message["role"], message["role"])
    if role not in ("system", "user", "assistant", "tool"):
        raise Rejection("unsupported_role", f"role {short(role)}")
    has_calls = "tool_calls" in message or "function_call" in message
    calls, ids = read_calls(message, left) if has_calls else ([], [])
    content = read_content(message.get("content"), vocabulary, left)
    text = content.text
    thoughts, loss = _read_fields(message, role, content, vocabulary, left)
    reasoning = _one_reasoning(thoughts)
    if role == "assistant":
        if reasoning.strip():
            if THINK_OPEN in text or THINK_CLOSE in text:
                raise Rejection("double_reasoning")
            if THINK_OPEN in reasoning or THINK_CLOSE in reasoning:
                raise Rejection("think_tags", "the reasoning itself contains thinking tags")
            reasoning, answer = reasoning.strip(), text.strip("\r\n")
        else:
            reasoning, answer = split_reasoning(text)
        if calls:
            answer = answer if answer.strip() else ""
            turn = {"role": role, "content": join_reasoning(reasoning, answer), "tool_calls": calls}
            names = (call["function"]["name"] for call in calls)
            return turn | {"loss": loss is not False}, list(zip(ids, names, strict=True))
        if not answer.strip():
            raise Rejection("empty_content", f"no answer{' after the reasoning' if reasoning else ''}")
        return {"role": role, "content": join_reasoning(reasoning, answer), "loss": loss is not False}, []
    if calls:
        raise Rejection("tool_call", f"{role} message with tool calls")
    if reasoning.strip():
        raise Rejection("misplaced_reasoning", f"{role} message with reasoning")
    if loss:
        raise Rejection("misplaced_loss", f"{role} message with loss: true")
    if role == "user" and not text.strip():
        raise Rejection("empty_content", "the user message is empty")
    return {"role": role, "content": text}, []


def _read_fields(
    message: dict[str, Any], role: str, content: Content, vocabulary: Vocabulary, left: Leftovers | None
) -> tuple[list[str], bool | None]:
    """Reasoning and loss of a message, by the meanings of its fields; what has none is counted."""
    thoughts = [content.reasoning] if content.reasoning else []
    flags: list[tuple[str, bool | None]] = []
    for name, value in message.items():
        if name in _BASE or value is None:
            continue
        meaning = vocabulary.of_message(name)
        if meaning in (LOSS, NOT_LOSS):
            flags.append(_flag(name, value, meaning))
        elif meaning == REASONING:
            thoughts.append(read_reasoning(name, value, left))
        elif meaning == MEDIA and not empty(value):
            raise Rejection("non_text_part", f"{name} beside the text")
        elif meaning == SPANS and not empty(value):
            raise Rejection("invalid_loss", f"{name}: only whole answers can be trained or not")
        elif left is not None and meaning != IGNORE:
            left.add(name, value)
    if left is not None and role != "tool":
        for name in ("tool_call_id", "name"):
            if name in message:
                left.add(name, message[name])
    return thoughts, _one_loss(flags, content, role) if flags or content.flags else None


def _one_loss(flags: list[tuple[str, bool | None]], content: Content, role: str) -> bool | None:
    given = [(name, flag) for name, flag in flags if flag is not None]
    for name, flag in given[1:]:
        if flag != given[0][1]:
            raise Rejection("invalid_loss", f"{given[0][0]} and {name} contradict each other")
    loss = given[0][1] if given else None
    for name, flag in content.flags:
        if flag is not None and flag != (role == "assistant" and loss is not False):
            raise Rejection("invalid_loss", f"{name} of a content part: only whole answers can be trained or not")
    return loss


def read_reasoning(name: str, value: Any, left: Leftovers | None) -> str:
    """Text of a reasoning field: a string, or of ``reasoning_details`` its text parts.

    A switch (``reasoning: "on"``) is no text; it is counted as unclear.

    Raises:
        Rejection: ``invalid_content``.
    """
    if plain_name(name) in _SWITCHES and is_switch(value) and not (left and name in left.vocabulary.given):
        if left is not None:
            left.add(name, value, unclear=True)
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and plain_name(name) == "reasoning_details":
        return _text_of_details(name, value, left)
    if empty(value):
        return ""
    raise Rejection("invalid_content", f"{name} is {short(value)}, not text")


def _text_of_details(name: str, details: list[Any], left: Leftovers | None) -> str:
    """OpenRouter's ``reasoning_details``; pieces of one index are one text, as they were streamed."""
    texts: list[str] = []
    before = None
    for part in details:
        if not isinstance(part, dict):
            raise Rejection("invalid_content", f"{name} holds {short(part)}")
        if isinstance(part.get("text"), str):
            joined = part.get("index") is not None and part.get("index") == before
            texts[-1:] = [texts[-1] + part["text"]] if joined and texts else [*texts[-1:], part["text"]]
            before = part.get("index")
        if left is not None:
            for field in part.keys() - {"type", "text"}:
                left.add(f"{name}[].{field}", part[field], known=True)
    if not any(text.strip() for text in texts) and not empty(details):
        raise Rejection("invalid_content", f"{name} has no text: encrypted or summed-up reasoning cannot be trained")
    return "\n".join(texts)


def _one_reasoning(thoughts: list[str]) -> str:
    if len(thoughts) < 2:
        return thoughts[0] if thoughts else ""
    texts = {" ".join(text.split()): text for text in reversed(thoughts) if text.strip()}
    if len(texts) > 1:
        raise Rejection("reasoning_conflict")
    return next(iter(texts.values()), "")
