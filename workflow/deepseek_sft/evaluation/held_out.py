"""Held-out samples: reading them, and judging an answer's form and content.

File: one JSON object a line, in the form of training data or as a bare prompt::

    {"id", "messages": […, {"role": "user"}, {"role": "assistant", "content", "reasoning_content"}][, "answer"]}
    {"id", "messages": […, {"role": "user"}][, "answer"]}

A last message of the assistant is the reference that the loss is measured on. ``answer`` is the expected final answer
(reasoning in front of it, closed by ``</think>``, is ignored); without it, a short answer of the reference, or the last
``\\boxed{…}`` in it, is expected.
"""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from ..data.messages import Rejection, normalise, split_reasoning
from ..errors import BadInputError
from . import template_tokens
from .api import Reply
from .final_answers import BOXED, final_answer, normalised

THINK_TAG = re.compile(r"</?think>")
EXPECTED_CHARACTERS = 80  # a longer reference answer is an essay, which no other answer equals
PLACEHOLDER = {"role": "assistant", "content": "."}


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One held-out sample.

    Attributes:
        id: its name, unique in the file.
        messages: what is asked, ending with the user's turn.
        answer: the expected final answer, None where only the form is judged.
        reference: the assistant's message to measure the loss on, as ``train.jsonl`` has it; None if there is none.
    """

    id: str
    messages: list[dict[str, Any]]
    answer: str | None
    reference: str | None = None

    @property
    def question(self) -> str:
        """The user's last turn."""
        return self.messages[-1]["content"]


def read_prompts(path: Path) -> list[Prompt]:
    """Read held-out samples.

    Raises:
        BadInputError: unreadable, empty, a line that is no sample, or two of one id; names file and line.
    """
    return parse_prompts(read_lines(path)[0], path)


def read_lines(path: Path, most: int | None = None) -> tuple[list[str], bool]:
    """Lines of a file of samples, of its first ``most`` bytes where it is larger; and whether these are all.

    Raises:
        BadInputError: it cannot be read.
    """
    try:
        with open(path, "rb") as stream:
            content = stream.read(-1 if most is None else most)
            whole = most is None or not stream.read(1)
        if not whole:
            content = content[: content.rfind(b"\n") + 1]
        # Not splitlines(): U+2028 and its like may stand inside a JSON string.
        return content.decode("utf-8").split("\n"), whole
    except (OSError, UnicodeDecodeError) as error:
        raise BadInputError(f"held-out prompts {path} cannot be read: {error}") from None


def parse_prompts(lines: list[str], path: Path) -> list[Prompt]:
    """Samples of lines that ``read_lines`` read; raises as ``read_prompts`` does."""
    prompts: dict[str, Prompt] = {}
    for number, line in enumerate(lines, 1):
        if line.strip():
            prompt = _prompt(line, f"{path}, line {number}", number)
            if prompt.id in prompts:
                raise BadInputError(f"{path}, line {number}: the id {prompt.id} is there already")
            prompts[prompt.id] = prompt
    if not prompts:
        raise BadInputError(f"held-out prompts {path}: no prompt in it", "leave smoke_test.prompts null to do without")
    return list(prompts.values())


def _prompt(line: str, where: str, number: int) -> Prompt:
    try:
        value: Any = json.loads(line)
    except ValueError as error:
        raise BadInputError(f"{where}: not JSON: {error}") from None
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise BadInputError(f"{where}: a text holds half a character, which no request can carry: {error}") from None
    messages = value.get("messages") if isinstance(value, dict) else None
    if not isinstance(messages, list) or not messages:
        raise BadInputError(f'{where}: expected {{"id", "messages": [...], "answer"}}')
    last = messages[-1].get("role") if isinstance(messages[-1], dict) else None
    try:
        # The form of training data asks for a trained turn at the end; a bare prompt gets one for this check only.
        turns = normalise(messages if last == "assistant" else [*messages, PLACEHOLDER])
    except Rejection as rejection:
        raise BadInputError(f"{where}: {rejection.reason}: {rejection.message}") from None
    asked = [{name: text for name, text in message.items() if name != "loss"} for message in turns[:-1]]
    if asked[-1]["role"] != "user":
        raise BadInputError(f"{where}: the last message before the answer is of {asked[-1]['role']}, expected user")
    reference = turns[-1]["content"] if last == "assistant" else None
    answer = value.get("answer")
    if answer is None and reference is not None:
        answer = _expected(split_reasoning(reference)[1])
    if answer is not None and not isinstance(answer, str):
        answer = json.dumps(answer)  # numbers
    return Prompt(str(value.get("id", number)), asked, answer, reference)


def _expected(answer: str) -> str | None:
    """What another answer must give to count as this one; None where that cannot be told."""
    boxed = BOXED.findall(answer)
    if boxed:
        return boxed[-1]
    return answer if len(answer) <= EXPECTED_CHARACTERS and "\n" not in answer.strip() else None


def leaked_tokens(
    reply: Reply, reasoning_parser: str | None, tokens: re.Pattern[str] = template_tokens.IN_BARS
) -> list[str]:
    """Template tokens (``template_tokens``) that appear as text; without a parser, think tags belong into the text."""
    text = f"{reply.reasoning}\0{reply.answer}"
    return tokens.findall(text) + (THINK_TAG.findall(text) if reasoning_parser else [])


def well_formed(reply: Reply, reasoning_parser: str | None, tokens: re.Pattern[str] = template_tokens.IN_BARS) -> bool:
    """Whether reasoning closed, an answer follows it, and the model ended by itself, with no template token as text.

    vLLM's parser puts everything into the reasoning until ``</think>`` comes, so an answer implies that it closed.
    """
    answered = bool(final_answer(reply, reasoning_parser).strip())
    return answered and reply.finish_reason == "stop" and not leaked_tokens(reply, reasoning_parser, tokens)


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
