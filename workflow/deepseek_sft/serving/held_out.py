"""Held-out prompts: reading them, and judging an answer's form and content.

File: one JSON object a line, ``{"id", "messages", "answer"}``; messages end with the user's turn, ``answer`` is the
expected final answer (reasoning in front of it, closed by ``</think>``, is ignored).
"""

import dataclasses
import json
import re
import unicodedata
from pathlib import Path
from typing import Any

from ..errors import BadInputError
from .api import Reply

TEMPLATE_TOKEN = re.compile(r"<｜[^｜<>]{1,40}｜>")
THINK_TAG = re.compile(r"</?think>")
BOXED = re.compile(r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}")


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One held-out prompt; ``answer`` is None where only the form is judged."""

    id: str
    messages: list[dict[str, str]]
    answer: str | None


def read_prompts(path: Path) -> list[Prompt]:
    """Read held-out prompts.

    Raises:
        BadInputError: unreadable, empty, or a line that is no prompt; names file and line.
    """
    prompts = []
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInputError(f"held-out prompts {path} cannot be read: {error}") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            prompts.append(_prompt(line, f"{path}, line {number}", number))
    if not prompts:
        raise BadInputError(f"held-out prompts {path}: no prompt in it", "leave smoke_test.prompts null to do without")
    return prompts


def _prompt(line: str, where: str, number: int) -> Prompt:
    try:
        value: Any = json.loads(line)
    except ValueError as error:
        raise BadInputError(f"{where}: not JSON: {error}") from None
    messages = value.get("messages") if isinstance(value, dict) else None
    if not isinstance(messages, list) or not messages:
        raise BadInputError(f'{where}: expected {{"id", "messages": [...], "answer"}}')
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise BadInputError(f'{where}: a message is not {{"role": text, "content": text}}: {message!r}')
    if messages[-1]["role"] != "user":
        raise BadInputError(f"{where}: the last message is of {messages[-1]['role']}, expected user")
    answer = value.get("answer")
    if answer is not None and not isinstance(answer, str):
        answer = json.dumps(answer)  # numbers
    plain = [{"role": message["role"], "content": message["content"]} for message in messages]
    return Prompt(str(value.get("id", number)), plain, answer)


def leaked_tokens(reply: Reply, reasoning_parser: str | None) -> list[str]:
    """Template tokens that appear as text; without a parser, think tags belong into the text."""
    text = f"{reply.reasoning}\0{reply.answer}"
    return TEMPLATE_TOKEN.findall(text) + (THINK_TAG.findall(text) if reasoning_parser else [])


def final_answer(reply: Reply, reasoning_parser: str | None) -> str:
    """The answer without reasoning; empty where reasoning never closed."""
    if reasoning_parser or "<think>" not in reply.answer:
        return reply.answer
    return reply.answer.partition("</think>")[2]


def well_formed(reply: Reply, reasoning_parser: str | None) -> bool:
    """Whether reasoning closed, an answer follows it, and the model ended by itself, with no template token as text.

    vLLM's parser puts everything into the reasoning until ``</think>`` comes, so an answer implies that it closed.
    """
    answered = bool(final_answer(reply, reasoning_parser).strip())
    return answered and reply.finish_reason == "stop" and not leaked_tokens(reply, reasoning_parser)


def matches(answer: str, expected: str) -> bool:
    r"""Whether an answer gives the expected one.

    Both are compared after Unicode NFKC, case folding and collapsing of white space. Where the answer has a
    ``\boxed{…}``, its last one must equal the expected answer (or the one boxed there). Otherwise the expected answer
    must equal the answer or stand in it as whole words: ``5`` is not found in ``15`` or ``5.5``.
    """
    expected = expected.rpartition("</think>")[2]
    boxed = BOXED.findall(answer)
    wanted = normalised((BOXED.findall(expected) or [expected])[-1])
    if not wanted:
        return False
    if boxed:
        return normalised(boxed[-1]) == wanted
    given = normalised(answer)
    whole = rf"(?<![\w])(?<!\d[.,]){re.escape(wanted)}(?![\w])(?![.,]\d)"
    return given == wanted or re.search(whole, given) is not None


def normalised(text: str) -> str:
    """Text as ``matches`` compares it; a full stop at the end does not count."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).rstrip(".").strip()
