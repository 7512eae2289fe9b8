"""No field is dropped without a word: each is used, or counted by name, or its record is rejected.

Whether a field is used is not asked of the code but seen: where the record becomes the same without it, it was not.
"""

import copy
import os
import random
from typing import Any

import pytest
from unit.data.helpers import assistant, called, tool, user
from unit.data.records import RECORDS

from deepseek_sft.data.fields import LOSS, PLAIN, REASONING, SYSTEM, TOOLS, empty
from deepseek_sft.data.formats import FORMATS
from deepseek_sft.data.prepare import convert_record
from deepseek_sft.data.rejection import REASONS
from deepseek_sft.data.sources import RawRecord

CASES = int(os.environ.get("FUZZED_RECORDS", "20000"))  # in all
PARTS = {"messages": [user([{"type": "text", "text": "Q"}]), assistant([{"type": "text", "text": "A"}], reasoning="R")]}
PAIRS = {"instruction": "Q", "input": "I", "output": "A", "history": [["q", "a"]], "system": "S", "reasoning": "R"}
CALLS = [user(), {**assistant(None), "function_call": {"name": "f", "arguments": "{}"}}, tool("4"), assistant()]
BASES = {
    **{name: (record, chosen) for name, (record, chosen, _) in RECORDS.items()},
    "content in parts": (PARTS, "openai"),
    "alpaca with history": (PAIRS, "alpaca"),
    "function_call": ({"messages": CALLS}, "openai"),
    "two calls": ({"messages": [user(), called("f", "g"), tool("4"), tool("5"), assistant()]}, "openai"),
}
KNOWN = [
    "loss", "weight", "train", "training", "trainable", "loss_scale", "train_detail", "mask", "masked",
    "train_on_input",
    "reasoning", "reasoning_content", "reasoningContent", "reasoning_details", "reasoning_text", "thinking", "Thinking",
    "think", "thought", "thoughts", "cot", "rationale", "chain_of_thought", "system", "system_prompt", "systemPrompt",
    "sys", "tools", "functions", "tool_calls", "function_call", "tool_call_id", "name", "id", "chosen", "rejected",
    "rejected_response", "label", "kto_tag", "image", "images", "videos", "audios", "image_url", "info", "metadata",
    "messages", "conversations", "role", "from", "content", "value", "text", "prompt", "response", "input", "output",
    "instruction", "history", "prefix", "refusal", "channel", "index", "cache_control", "parameters", "score", "notes",
    "is_reasoning_complete", "correctness_llama", "solution", "answer", "finish_reason", "thinking_trajectories",
]  # fmt: skip
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
VALUES = [
    None, "", " ", [], {}, [None], {"a": None}, [[], {"b": ""}], True, False, 0, 1, 0.0, 1.0, 0.5, 2, -1, 10**20,
    float("nan"), "text", "true", "False", "on", "off", "R", "<think>R</think>", "\ud800", "[]", "{}", "{broken", ["x"],
    [0], [True], {"a": 1}, {"train": False}, {"reasoning": "why"}, [{"type": "text", "text": "x"}],
    [{"type": "reasoning.text", "text": "R", "index": 0}], [{"type": "reasoning.encrypted", "data": "x"}], [TOOL],
    '[{"type": "function", "function": {"name": "f"}}]', [user("x"), assistant("y")], {"name": "f", "arguments": "{}"},
]  # fmt: skip


def fields_of(record: dict[str, Any]) -> list[tuple[tuple, str]]:
    """Paths of every dictionary of a record, and how their fields are written."""
    found: list[tuple[tuple, str]] = []

    def walk(value: Any, path: tuple, shown: str) -> None:
        if isinstance(value, dict):
            found.append((path, f"{shown}." if shown else ""))
            for key, inner in value.items():
                walk(inner, (*path, key), f"{shown}.{key}" if shown else key)
        elif isinstance(value, list):
            for number, inner in enumerate(value):
                walk(inner, (*path, number), f"{shown}[]")

    walk(record, (), "")
    return found


def inside(record: Any, path: tuple) -> Any:
    for key in path:
        record = record[key]
    return record


def result(record: dict[str, Any], chosen: str) -> tuple[bytes, dict[str, bool], str]:
    outcome = convert_record(RawRecord("a.jsonl", chosen, 1, 1, record))
    assert bool(outcome.written) != bool(outcome.reason)
    assert not outcome.reason or outcome.reason in REASONS
    return outcome.written, dict(outcome.unused), outcome.reason


def is_counted(path: str, unused: dict[str, bool]) -> bool:
    """Whether a field or what holds it is counted; messages[].x of an own field may hold parts of lists."""
    names = [path[:end] for end in range(1, len(path) + 1) if end == len(path) or path[end] in ".["]
    return any(name in unused for name in names) or f"{path} (beside info)" in unused


def says_what_holds_anyway(path: str, name: str, value: Any) -> bool:
    """Whether a field has a meaning that its value only confirms: trained, the same reasoning, no text at all."""
    level = "record" if path == name else "message"
    meaning = PLAIN.of_record(name) if level == "record" else PLAIN.of_message(name)
    meaning = meaning or PLAIN.of_part(name)
    if meaning == LOSS:
        return isinstance(value, bool | float | int | str)
    if meaning in (REASONING, SYSTEM):
        texts = [one.get("text") for one in value] if isinstance(value, list) else [value]
        return all(isinstance(text, str) and text.strip() in ("", "R", "S") for text in texts)
    if meaning == TOOLS:
        return value == "[]" or (isinstance(value, str) and not value.strip())
    return name in ("id", "name", "tool_call_id", "role", "from", "type")


@pytest.mark.parametrize("name", BASES)
def test_a_field_is_used_or_counted_or_its_record_is_rejected(name):
    base, chosen = BASES[name]
    chance = random.Random(name)
    places = fields_of(base)
    accepted = unchanged = 0
    for number in range(-(-CASES // len(BASES))):
        record, extra = copy.deepcopy(base), []
        for _ in range(chance.randint(1, 3)):
            path, prefix = chance.choice(places)
            field = chance.choice(KNOWN) if chance.random() < 0.8 else f"x{chance.randrange(10**6)}"
            where = inside(record, path)
            if field not in where:
                where[field] = copy.deepcopy(chance.choice(VALUES))
                extra.append((path, prefix + field, field, where[field]))
        given = "auto" if number % 2 else chosen
        written, unused, reason = result(record, given)
        if reason:
            continue
        accepted += 1
        for path, shown, field, value in extra:
            less = copy.deepcopy(record)
            del inside(less, path)[field]
            if result(less, given)[0] != written or empty(value):
                continue
            unchanged += 1
            told = is_counted(shown, unused) or says_what_holds_anyway(shown, field, value)
            assert told, f"{shown} = {value!r} was dropped without a word; counted are {unused}"
    assert accepted > 20 and unchanged > 20


def test_the_bases_cover_every_format():
    assert {chosen for _, chosen in BASES.values()} == set(FORMATS)
