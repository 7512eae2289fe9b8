"""Formats of chat records: the registry. A new format is one small function and one line in ``FORMATS``
(docs/adding-a-format.md).

A format turns a record (a decoded JSON object or Parquet row) into messages of OpenAI's form, which
``messages.normalise`` then checks; so a format only says where its fields are. What stands beside them (system text,
tools, reasoning, flags) is read by ``beside`` for all formats alike.
"""

import functools
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .beside import Conversation, read_beside
from .fields import PLAIN, PREFERENCE, Leftovers, Vocabulary, empty
from .messages import THINK_CLOSE
from .rejection import Rejection, short

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
        reads: further fields of the record that ``convert`` uses.
        side_notes: fields known to carry nothing for training, however their names sound; counted like others.
        list_of_messages: the field that holds the messages; empty where the record is one turn, whose answer takes
            the reasoning and loss that stand beside it.
        unwanted_system: text that a system message is left out for.
    """

    fields: tuple[str, ...]
    convert: Callable[[Record], Messages]
    summary: str
    marks: Callable[[Record], bool] = lambda record: True
    reads: tuple[str, ...] = ()
    side_notes: tuple[str, ...] = ()
    list_of_messages: str = ""
    unwanted_system: str = ""

    @functools.cached_property
    def own(self) -> frozenset[str]:
        """Fields of the record that ``convert`` uses."""
        return frozenset((*self.fields, *self.reads))

    def fits(self, record: Record) -> bool:
        """Whether ``auto`` may take it for this record."""
        return all(record.get(field) is not None for field in self.fields) and self.marks(record)


def from_openai(record: Record) -> Messages:
    """``messages`` as they are."""
    messages = record.get("messages")
    if text := _as_text(messages):
        raise Rejection("no_messages", f"messages is not a list{text}")
    return messages  # type: ignore[return-value]  # normalise refuses what is no list


SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "observation": "tool"}


def from_sharegpt(record: Record) -> Messages:
    """``conversations`` of ``{"from", "value"}`` (or ``role``, ``content``)."""
    turns = record.get("conversations")
    if not isinstance(turns, list):
        raise Rejection("no_messages", f"conversations is missing or not a list{_as_text(turns)}")
    messages: Messages = []
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict):
            raise Rejection("invalid_message", f"message {number}: no sender")
        message = dict(turn)
        role = _only_one(number, "from", "role", *(_role(message.pop(name, None)) for name in ("from", "role")))
        if not isinstance(role, str):
            raise Rejection("invalid_message", f"message {number}: no sender")
        content = _only_one(number, "value", "content", message.pop("value", None), message.pop("content", None))
        if role == "function_call":
            if not empty(turn.get("tool_calls")) or not empty(turn.get("function_call")):
                raise Rejection("tool_call", f"message {number}: a function call with further calls beside it")
            message |= {"role": "assistant", "content": None, "tool_calls": _written_calls(content, number)}
        else:
            message["role"], message["content"] = role, content
        messages.append(message)
    return messages


def _role(name: Any) -> Any:
    return SHAREGPT_ROLES.get(name, name) if isinstance(name, str) else name


def _only_one(number: int, first_name: str, second_name: str, first: Any, second: Any) -> Any:
    """The one of two fields that is given; both may say the same."""
    if empty(first) or empty(second) or first == second:
        return second if empty(first) and second is not None else first
    raise Rejection("invalid_message", f"message {number}: {first_name} and {second_name} differ")


def _as_text(value: Any) -> str:
    """What to do about a list that was written as text."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        return ": it is JSON text; decode it (json.loads) before the record is written"
    return ""


def _written_calls(text: Any, number: int) -> list[dict[str, Any]]:
    """Tool calls of a ``function_call`` turn, whose value is JSON: one call or a list of them."""
    try:
        calls = json.loads(text) if isinstance(text, str) else text
    except (ValueError, RecursionError):
        raise Rejection("tool_call", f"message {number}: the function call is not JSON") from None
    return [{"function": call} for call in (calls if isinstance(calls, list) else [calls])]


def from_alpaca(record: Record) -> Messages:
    """``instruction`` (+ ``input`` on the next line) and ``output``, with optional ``history`` pairs."""
    texts = {}
    for field in ("instruction", "input", "output"):
        texts[field] = record.get(field) if record.get(field) is not None else ""
        if not isinstance(texts[field], str):
            raise Rejection("missing_field", f"{field} is not text")
    messages: Messages = []
    history = [] if empty(record.get("history")) else record["history"]
    for pair in history if isinstance(history, list) else [history]:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise Rejection("missing_field", "history is not a list of [instruction, answer] pairs")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    prompt = "\n".join(text for text in (texts["instruction"], texts["input"]) if text)
    return [*messages, {"role": "user", "content": prompt}, {"role": "assistant", "content": texts["output"]}]


THOUGHT_TAGS = re.compile(
    r"\s*<\|begin_of_thought\|>(.*?)<\|end_of_thought\|>\s*<\|begin_of_solution\|>(.*?)<\|end_of_solution\|>\s*",
    re.DOTALL,
)
ANSWER_TAGS = re.compile(r"\s*<answer>(.*)</answer>\s*", re.DOTALL)


def from_thought_tags(record: Record) -> Messages:
    """OpenThoughts-114k, Bespoke-Stratos-17k: ShareGPT whose answers are ``<|begin_of_thought|>…<|end_of_solution|>``.

    Their system prompt asks for these very tags; it is left out (``unwanted_system``), since the model trained here
    writes others.
    """
    messages = from_sharegpt(record)
    for number, message in enumerate(messages, 1):
        text = message["content"]
        if message["role"] != "assistant" or not isinstance(text, str):
            continue
        if not (parts := THOUGHT_TAGS.fullmatch(text)) or "_of_thought|>" in parts[1] or "_of_solution|>" in parts[2]:
            raise Rejection("think_tags", f"message {number}: not one thought and one solution between their tags")
        if not empty(message.get("reasoning_content")):
            raise Rejection("double_reasoning", f"message {number}: a thought and reasoning_content")
        message |= {"reasoning_content": parts[1].strip(), "content": parts[2].strip()}
    return messages


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
    return _single_turn(record.get("problem"), record.get("deepseek_reasoning"), record.get("deepseek_solution"))


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
        if empty(values):
            return [None] * len(generations)
        if not isinstance(values, list) or len(values) != len(generations):
            raise Rejection("missing_field", f"{name} is {short(values)}, not one value for each generation")
        return values

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
            converted.append(_without_info(message))
        elif isinstance(thought, str) and isinstance(answer, str):
            if not empty(message.get("reasoning_content")):
                raise Rejection("double_reasoning", "info and reasoning_content both give reasoning")
            same = isinstance(text, str) and thought.strip() in text and answer.strip() in text
            converted.append(
                _without_info(message, "think_content", "answer_content")
                | {"reasoning_content": thought, "content": answer.strip()}
                | ({} if same else {"content (beside info)": text})
            )
        elif isinstance(text, str):
            head, close, tail = text.rpartition(THINK_CLOSE)
            inner = ANSWER_TAGS.fullmatch(tail)
            content = f"{head}{close}{inner[1].strip()}" if inner else text
            converted.append(_without_info(message) | {"content": content})
        else:
            converted.append(_without_info(message))
    return converted


def _without_info(message: dict[str, Any], *used: str) -> dict[str, Any]:
    """The message with what is left of its ``info`` as fields of their own, so that they are counted."""
    info = message.get("info")
    if not isinstance(info, dict):
        return message
    rest = {f"info.{name}": value for name, value in info.items() if name not in used}
    return {name: value for name, value in message.items() if name != "info"} | rest


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
    "openr1-math": Format(
        *(("problem", "generations"), from_openr1_math, "OpenR1-Math-220k: problem, generations"),
        reads=("is_reasoning_complete", "correctness_math_verify", "correctness_llama"),
    ),
    "am-r1-distilled": Format(
        ("messages",), from_am_distilled, "AM-DeepSeek-R1-Distilled: info", has_answer_info, list_of_messages="messages"
    ),
    "openai": Format(
        *(("messages",), from_openai, "messages of {role, content, reasoning_content, tool_calls, loss}"),
        list_of_messages="messages",
    ),
    "thought-tags": Format(
        ("conversations",),
        from_thought_tags,
        "OpenThoughts, Bespoke-Stratos: <|begin_of_thought|>",
        has_thought_tags,
        list_of_messages="conversations",
        unwanted_system="<|begin_of_thought|>",
    ),
    "sharegpt": Format(
        *(("conversations",), from_sharegpt, "conversations of {from, value}, optional system"),
        list_of_messages="conversations",
    ),
    "openthoughts-columns": Format(
        ("problem", "deepseek_solution"),
        from_openthoughts_columns,
        "OpenThoughts' raw columns: problem, deepseek_*",
        reads=("deepseek_reasoning",),
    ),
    "s1k-1.1": Format(
        *(("question", "deepseek_attempt"), from_s1k_deepseek, "s1K-1.1: question, deepseek_*"),
        reads=("deepseek_thinking_trajectory",),
        side_notes=("cot", "gemini_thinking_trajectory", "thinking_trajectories"),
    ),
    "s1k": Format(
        *(("question", "thinking_trajectories"), from_s1k, "s1K: question, thinking_trajectories, attempt"),
        reads=("attempt",),
        side_notes=("cot",),
    ),
    "chinese-r1-distill": Format(
        ("input", "content", "reasoning_content"), from_chinese_r1, "Chinese-DeepSeek-R1-Distill: input, content"
    ),
    "alpaca": Format(
        *(("instruction", "output"), from_alpaca, "instruction, input, output (also Chinese-DeepSeek-R1-Distill-SFT)"),
        reads=("input", "history"),
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
    if beside := [name for name, value in record.items() if PLAIN.of_record(name) == PREFERENCE and not empty(value)]:
        raise Rejection("preference_data", f"{', '.join(beside[:3])} without a conversation of a known format")
    fields = ", ".join(sorted(map(str, record))[:12]) or "none"
    raise Rejection("unknown_format", f"no known format has these fields: {fields}")


def read(record: Any, name: str, vocabulary: Vocabulary = PLAIN, left: Leftovers | None = None) -> Conversation:
    """A record in the named format: its messages, not yet normalised, and the tools defined beside them.

    Args:
        record: as decoded.
        name: of the format.
        vocabulary: what the names of fields mean.
        left: where fields of the record are counted that nothing uses.

    Raises:
        Rejection: those of ``choose``, of the format and of ``beside.read_beside``.
    """
    left = Leftovers(vocabulary) if left is None else left
    return read_beside(record, FORMATS[choose(record, name)], vocabulary, left)


def convert(record: Any, name: str = AUTO) -> Messages:
    """Messages of a record in the named format, not yet normalised.

    Raises:
        Rejection: those of ``read``.
    """
    return read(record, name).messages
