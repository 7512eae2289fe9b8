"""Why a record is left out."""

import json
from typing import Any

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
    "tool_call": "a tool call without a name, or whose arguments are no JSON object",
    "tool_definitions": "definitions of tools that are no list of objects, or that the base's template cannot show",
    "tool_output": "tool outputs that do not answer the calls before them one by one, in order",
    "tool_reasoning": "reasoning where the template knows none: with a tool call, or on a tool's output",
    "invalid_content": "content is neither text, text parts nor null",
    "non_text_part": "a content part, or a field beside the text, holds a picture, sound or the like",
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
    "preference_data": "a preferred or rejected answer beside the conversation, or one that is marked as bad",
    "incomplete_reasoning": "no generation whose reasoning is complete",
    "incorrect": "every complete generation was found wrong",
    "no_trained_turn": "no assistant message is trained",
    "duplicate": "the same conversation came before",
    "contaminated": "it holds an item of an evaluation set",
    "invalid_record": "a line of train.jsonl that prepare_data would not have written",
    "too_long": "longer than max_length",
    "nothing_left": "no trained token is left within max_length",
}


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


def short(value: Any) -> str:
    """A value as JSON text of at most 60 characters, for messages."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
    except RecursionError:
        return f"a {type(value).__name__} nested too deeply"
    return text if len(text) <= 60 else text[:57] + "…"
