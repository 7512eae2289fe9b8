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
from typing import Any

THINK_OPEN = "<think>"
THINK_CLOSE = "</think>"

REASONS = {
    "invalid_utf8": "the line is not UTF-8",
    "invalid_json": "the line is not JSON",
    "too_large": "more bytes than any context can hold",
    "not_an_object": "the record is not a JSON object",
    "unknown_format": "no known format has these fields",
    "missing_field": "a field of the format is missing or has the wrong type",
    "no_messages": "the conversation is missing, empty or not a list",
    "invalid_message": "a message is not an object with a role",
    "unsupported_role": "a role other than system, developer, user, assistant, tool, function",
    "tool_call": "a tool call without a name, or whose arguments are neither text nor an object",
    "tool_output": "tool outputs that do not answer the calls before them one by one, in order",
    "tool_definitions": "definitions of tools that the base's chat template refuses, or shows where we cannot",
    "tool_reasoning": "reasoning where the template knows none: with a tool call, or on a tool's output",
    "invalid_content": "content is neither text, text parts nor null",
    "non_text_part": "a content part is not text",
    "invalid_text": "text that is not valid Unicode (a lone surrogate)",
    "empty_content": "a user message or an answer without text",
    "role_order": "roles do not alternate, or an assistant message comes first",
    "late_system": "a system message after the conversation began",
    "think_tags": "thinking tags that are not exactly one block at the start of an answer",
    "double_reasoning": "reasoning given both as a field and as tags in the content",
    "reasoning_conflict": "two reasoning fields that differ",
    "misplaced_reasoning": "reasoning on a message that is not the assistant's",
    "invalid_loss": "loss is not true, false or one of their spellings",
    "misplaced_loss": "loss asked for on a message that is not the assistant's",
    "incomplete_reasoning": "no generation whose reasoning is complete",
    "incorrect": "every complete generation was found wrong",
    "no_trained_turn": "no assistant message is trained",
    "duplicate": "the same conversation came before",
    "invalid_record": "a line of train.jsonl that prepare_data would not have written",
    "too_long": "longer than max_length",
    "nothing_left": "no trained token is left within max_length",
}

_REASONING_FIELDS = ("reasoning_content", "reasoning")
_TEXT_PARTS = (None, "text", "input_text", "output_text")


class Rejection(Exception):
    """A record that cannot be used.

    Args:
        reason: a key of ``REASONS``.
        message: what is wrong in this very record.
    """

    def __init__(self, reason: str, message: str = ""):
        super().__init__(message or REASONS[reason])
        self.reason = reason
        self.message = message or REASONS[reason]

    def __reduce__(self) -> tuple[Any, ...]:
        return Rejection, (self.reason, self.message)


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


def parse_loss(value: Any) -> bool | None:
    """``loss`` as a boolean, or None where it is not given (missing or null).

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
    raise Rejection("invalid_loss", f"loss is {_short(value)}; write true or false")


def parse_text(content: Any) -> str:
    """Text of a message's content: a string, a list of text parts (joined by line ends, as servers do), or null.

    Raises:
        Rejection: ``invalid_content``, ``non_text_part``.
    """
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise Rejection("invalid_content", f"content is {_short(content)}")
    texts = []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, dict) and part.get("type") in _TEXT_PARTS and isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            kind = part.get("type") if isinstance(part, dict) else part
            raise Rejection("non_text_part", f"content part {_short(kind)} is not text")
    return "\n".join(texts)


def normalise(messages: Any) -> list[dict[str, Any]]:
    """Bring messages of OpenAI's form into the one form of this module.

    Args:
        messages: list of ``{"role", "content"}`` with, optionally, ``reasoning_content`` or ``reasoning``, and ``loss``
            or OpenAI's ``weight``.

    Raises:
        Rejection: with the code and the number of the message (from 1).
    """
    if not isinstance(messages, list) or not messages:
        raise Rejection("no_messages")
    system: list[str] = []
    turns: list[dict[str, Any]] = []
    open_calls: list[str | None] = []  # ids of calls without an output yet
    for number, message in enumerate(messages, 1):
        try:
            turn, calls = _normalise_one(message)
            if turn["role"] == "system":
                if turns:
                    raise Rejection("late_system")
                system.append(turn["content"])
                continue
            _check_order(turn, turns[-1] if turns else None)
            if turn["role"] == "tool":
                _answer_call(message, open_calls)
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


def _answer_call(message: dict[str, Any], open_calls: list[str | None]) -> None:
    if not open_calls:
        raise Rejection("tool_output", "more outputs than calls")
    call, given = open_calls.pop(0), message.get("tool_call_id")
    if isinstance(call, str) and isinstance(given, str) and call != given:
        raise Rejection("tool_output", f"the output is of call {_short(given)}, the next call is {_short(call)}")


def _normalise_one(message: Any) -> tuple[dict[str, Any], list[str | None]]:
    """The message in this module's form and the ids of its tool calls."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise Rejection("invalid_message")
    role = {"developer": "system", "function": "tool"}.get(message["role"], message["role"])
    if role not in ("system", "user", "assistant", "tool"):
        raise Rejection("unsupported_role", f"role {_short(role)}")
    calls, call_ids = _tool_calls(message)
    text = parse_text(message.get("content"))
    reasoning = _reasoning_field(message)
    loss = _loss_field(message)
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
            content = join_reasoning(reasoning, answer)
            return {"role": role, "content": content, "tool_calls": calls, "loss": loss is not False}, call_ids
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


def _tool_calls(message: dict[str, Any]) -> tuple[list[dict[str, Any]], list[str | None]]:
    """Calls in this module's form and their ids, of ``tool_calls`` or the older ``function_call``."""
    given = message.get("tool_calls") or []
    if not given and message.get("function_call"):
        given = [{"function": message["function_call"]}]
    if not isinstance(given, list):
        raise Rejection("tool_call", f"tool_calls is {_short(given)}")
    calls = []
    for call in given:
        function = call.get("function") if isinstance(call, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str) or not name.strip():
            raise Rejection("tool_call", f"a call without a function's name: {_short(call)}")
        arguments = function.get("arguments")
        if isinstance(arguments, dict):
            arguments = json.dumps(arguments, ensure_ascii=False)
        kind = call.get("type") or "function"
        if not isinstance(arguments, str) or not isinstance(kind, str):
            raise Rejection("tool_call", f"arguments of {_short(name)} are {_short(arguments)}")
        calls.append({"type": kind, "function": {"name": name, "arguments": arguments}})
    return calls, [call.get("id") for call in given]


def _reasoning_field(message: dict[str, Any]) -> str:
    given = [message[field] for field in _REASONING_FIELDS if message.get(field) is not None]
    for value in given:
        if not isinstance(value, str):
            raise Rejection("invalid_content", f"reasoning is {_short(value)}")
    texts = {value.strip(): value for value in given if value.strip()}
    if len(texts) > 1:
        raise Rejection("reasoning_conflict")
    return next(iter(texts.values()), "")


def _loss_field(message: dict[str, Any]) -> bool | None:
    loss, weight = parse_loss(message.get("loss")), parse_loss(message.get("weight"))
    if None not in (loss, weight) and loss != weight:
        raise Rejection("invalid_loss", f"loss is {_short(message['loss'])} but weight is {_short(message['weight'])}")
    return weight if loss is None else loss


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "…"
