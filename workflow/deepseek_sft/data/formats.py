"""Formats of chat records: the registry. A new format is one small function and one line in ``FORMATS``
(docs/adding-a-format.md).

A format turns a record (a decoded JSON object or Parquet row) into messages of OpenAI's form, which
``messages.normalise`` then checks; so a format only says where its fields are.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .messages import THINK_CLOSE, Rejection

Record = dict[str, Any]
Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Format:
    """One format of records.

    Args:
        fields: fields by which ``auto`` recognises it; all must be there and not null.
        convert: record → messages of OpenAI's form; raises Rejection.
        summary: one line for --help and the documentation.
        marks: a further test for ``auto``, where fields alone do not tell.
    """

    fields: tuple[str, ...]
    convert: Callable[[Record], Messages]
    summary: str
    marks: Callable[[Record], bool] = lambda record: True

    def fits(self, record: Record) -> bool:
        """Whether ``auto`` may take it for this record."""
        return all(record.get(field) is not None for field in self.fields) and self.marks(record)


def from_openai(record: Record) -> Messages:
    """``messages`` as they are."""
    return record.get("messages")  # type: ignore[return-value]  # normalise refuses what is no list


SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "observation": "tool"}


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
        if role == "function_call":
            messages.append(
                {**turn, "role": "assistant", "content": None, "tool_calls": _written_calls(content, number)}
            )
        else:
            messages.append({**turn, "role": SHAREGPT_ROLES.get(role, role), "content": content})
    return messages


def _written_calls(text: Any, number: int) -> list[dict[str, Any]]:
    """Tool calls of a ``function_call`` turn, whose value is JSON: one call or a list of them."""
    try:
        calls = json.loads(text) if isinstance(text, str) else text
    except (ValueError, RecursionError):
        raise Rejection("tool_call", f"message {number}: the function call is not JSON") from None
    return [{"function": call} for call in (calls if isinstance(calls, list) else [calls])]


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


THOUGHT_TAGS = re.compile(
    r"\s*<\|begin_of_thought\|>(.*?)<\|end_of_thought\|>\s*<\|begin_of_solution\|>(.*?)<\|end_of_solution\|>\s*",
    re.DOTALL,
)
ANSWER_TAGS = re.compile(r"\s*<answer>(.*)</answer>\s*", re.DOTALL)


def from_thought_tags(record: Record) -> Messages:
    """OpenThoughts-114k, Bespoke-Stratos-17k: ShareGPT whose answers are ``<|begin_of_thought|>…<|end_of_solution|>``.

    Their system prompt asks for these very tags; it is left out, since the model trained here writes others.
    """
    messages = from_sharegpt(record)
    for number, message in enumerate(messages, 1):
        text = message["content"]
        if message["role"] != "assistant" or not isinstance(text, str):
            continue
        if not (parts := THOUGHT_TAGS.fullmatch(text)) or "_of_thought|>" in parts[1] or "_of_solution|>" in parts[2]:
            raise Rejection("think_tags", f"message {number}: not one thought and one solution between their tags")
        message |= {"reasoning_content": parts[1].strip(), "content": parts[2].strip()}
    return [m for m in messages if m["role"] != "system" or "<|begin_of_thought|>" not in str(m["content"])]


def has_thought_tags(record: Record) -> bool:
    """Whether a turn opens a thought."""
    turns = record["conversations"]
    return isinstance(turns, list) and any(
        isinstance(turn, dict) and turn.get("from", turn.get("role")) in ("gpt", "assistant")
        and "<|begin_of_thought|>" in str(turn.get("value", turn.get("content")))
        for turn in turns
    )  # fmt: skip


def from_openthoughts_columns(record: Record) -> Messages:
    """OpenThoughts' raw columns: ``problem``, ``deepseek_reasoning`` (or ``reasoning``), ``deepseek_solution``."""
    reasoning = record.get("deepseek_reasoning")
    reasoning = record.get("reasoning") if reasoning is None else reasoning
    return _single_turn(record.get("problem"), reasoning, record.get("deepseek_solution"))


def from_openr1_math(record: Record) -> Messages:
    """OpenR1-Math-220k: ``problem`` and the first of ``generations`` that is complete and was found correct.

    ``is_reasoning_complete`` tells which have their ``</think>``; where it is missing, the tag itself does. Correct is
    what either ``correctness_math_verify`` or ``correctness_llama`` says; where neither says anything, the first
    complete one counts.
    """
    generations = record.get("generations")
    if not isinstance(generations, list) or not generations:
        raise Rejection("missing_field", "generations is not a list of texts")

    def column(name: str) -> list[Any]:
        values = record.get(name)
        return values if isinstance(values, list) and len(values) == len(generations) else [None] * len(generations)

    complete = [
        number
        for number, (text, flag) in enumerate(zip(generations, column("is_reasoning_complete"), strict=True))
        if isinstance(text, str) and (flag is True or (flag is None and THINK_CLOSE in text))
    ]
    if not complete:
        raise Rejection("incomplete_reasoning", f"none of {len(generations)} generations has complete reasoning")
    verdicts = list(zip(column("correctness_math_verify"), column("correctness_llama"), strict=True))
    correct = [number for number in complete if any(verdict is True for verdict in verdicts[number])]
    unknown = [number for number in complete if all(verdict is None for verdict in verdicts[number])]
    if not correct and not unknown:
        raise Rejection("incorrect", f"none of {len(complete)} complete generations was found correct")
    text = generations[(correct or unknown)[0]]
    return _single_turn(record.get("problem"), None, text)


def from_s1k(record: Record) -> Messages:
    """s1K: ``question``, the first of ``thinking_trajectories``, ``attempt``."""
    trajectories = record.get("thinking_trajectories")
    if not isinstance(trajectories, list) or not trajectories:
        raise Rejection("missing_field", "thinking_trajectories is not a list of texts")
    return _single_turn(record.get("question"), trajectories[0], record.get("attempt"))


def from_s1k_deepseek(record: Record) -> Messages:
    """s1K-1.1: ``question``, ``deepseek_thinking_trajectory``, ``deepseek_attempt``; Gemini's columns are not used."""
    return _single_turn(
        record.get("question"), record.get("deepseek_thinking_trajectory"), record.get("deepseek_attempt")
    )


def from_chinese_r1(record: Record) -> Messages:
    """Chinese-DeepSeek-R1-Distill-110k: ``input``, ``reasoning_content``, ``content``. Its -SFT version is alpaca."""
    return _single_turn(record.get("input"), record.get("reasoning_content"), record.get("content"))


def from_am_distilled(record: Record) -> Messages:
    """AM-DeepSeek-R1-Distilled-1.4M: OpenAI's messages whose ``info`` holds thought and answer apart.

    Where ``info`` does not, the content is ``<think>…</think><answer>…</answer>``.
    """
    messages = record.get("messages")
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        return messages  # type: ignore[return-value]  # normalise refuses it
    converted = []
    for message in messages:
        info = message["info"] if isinstance(message.get("info"), dict) else {}
        thought, answer, text = info.get("think_content"), info.get("answer_content"), message.get("content")
        if message.get("role") != "assistant":
            converted.append(message)
        elif isinstance(thought, str) and isinstance(answer, str):
            converted.append({**message, "reasoning_content": thought, "content": answer.strip()})
        elif isinstance(text, str):
            head, close, tail = text.rpartition(THINK_CLOSE)
            inner = ANSWER_TAGS.fullmatch(tail)
            converted.append({**message, "content": f"{head}{close}{inner[1].strip()}" if inner else text})
        else:
            converted.append(message)
    return converted


def has_answer_info(record: Record) -> bool:
    """Whether a message carries AM's ``info``."""
    messages = record["messages"]
    infos = [m.get("info") for m in messages if isinstance(m, dict)] if isinstance(messages, list) else []
    return any(isinstance(info, dict) and "answer_content" in info for info in infos)


def _single_turn(question: Any, reasoning: Any, answer: Any) -> Messages:
    for name, text in (("question", question), ("answer", answer)):
        if not isinstance(text, str):
            raise Rejection("missing_field", f"the {name} is not text")
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer, "reasoning_content": reasoning},
    ]


# ``auto`` takes the first that fits, so what has more marks comes first.
FORMATS: dict[str, Format] = {
    "openr1-math": Format(("problem", "generations"), from_openr1_math, "OpenR1-Math-220k: problem, generations"),
    "am-r1-distilled": Format(("messages",), from_am_distilled, "AM-DeepSeek-R1-Distilled: info", has_answer_info),
    "openai": Format(("messages",), from_openai, "messages of {role, content, reasoning_content, tool_calls, loss}"),
    "thought-tags": Format(
        ("conversations",), from_thought_tags, "OpenThoughts, Bespoke-Stratos: <|begin_of_thought|>", has_thought_tags
    ),
    "sharegpt": Format(("conversations",), from_sharegpt, "conversations of {from, value}, optional system"),
    "openthoughts-columns": Format(
        ("problem", "deepseek_solution"), from_openthoughts_columns, "OpenThoughts' raw columns: problem, deepseek_*"
    ),
    "s1k-1.1": Format(("question", "deepseek_attempt"), from_s1k_deepseek, "s1K-1.1: question, deepseek_*"),
    "s1k": Format(("question", "thinking_trajectories"), from_s1k, "s1K: question, thinking_trajectories, attempt"),
    "chinese-r1-distill": Format(
        ("input", "content", "reasoning_content"), from_chinese_r1, "Chinese-DeepSeek-R1-Distill: input, content"
    ),
    "alpaca": Format(
        ("instruction", "output"), from_alpaca, "instruction, input, output (also Chinese-DeepSeek-R1-Distill-SFT)"
    ),
}

AUTO = "auto"


def choose(record: Any, name: str = AUTO) -> str:
    """Name of the format a record is read in: the named one, or with ``auto`` the first that fits.

    Raises:
        Rejection: ``not_an_object``, ``unknown_format``.
    """
    if not isinstance(record, dict):
        raise Rejection("not_an_object", f"the record is a {type(record).__name__}, not an object")
    if name != AUTO:
        return name
    for candidate, known in FORMATS.items():
        if known.fits(record):
            return candidate
    fields = ", ".join(sorted(map(str, record))[:12]) or "none"
    raise Rejection("unknown_format", f"no known format has these fields: {fields}")


def convert(record: Any, name: str = AUTO) -> Messages:
    """Messages of a record in the named format.

    Raises:
        Rejection: those of ``choose`` and of the format.
    """
    return FORMATS[choose(record, name)].convert(record)
