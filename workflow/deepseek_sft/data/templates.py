"""DeepSeek's chat templates as pieces: control tokens and text, and which of them the model writes itself.

Rendering here, rather than through the tokenizer's own template, has two reasons: R1's and V3.1's templates delete the
reasoning of every assistant message, the one to be trained included; and a rendered string no longer tells a control
token from the same characters typed by a person.

Semantics follow the ``chat_template`` of the releases' tokenizer_config.json (R1, V3, V3.1), without their tool calls.
"""

from collections.abc import Callable
from dataclasses import dataclass

from .messages import THINK_CLOSE, THINK_OPEN

USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
END = "<｜end▁of▁sentence｜>"


@dataclass(frozen=True)
class Piece:
    """A part of a rendered message.

    Args:
        text: a control token's name, or text.
        control: whether it is a control token.
        generated: whether the model writes it when serving; only such pieces can carry loss.
        part: ``reasoning`` or ``answer`` where the statistics count it, else empty.
    """

    text: str
    control: bool = False
    generated: bool = False
    part: str = ""


@dataclass(frozen=True)
class Template:
    """One chat template.

    Args:
        answer: (reasoning, answer) → pieces of an assistant message in full, as it is trained.
        history: (reasoning, answer) → pieces of the same message without its reasoning.
        cuts_history: whether the serving template removes the reasoning of earlier messages by itself.
    """

    answer: Callable[[str, str], list[Piece]]
    history: Callable[[str, str], list[Piece]]
    cuts_history: bool


def system_pieces(text: str) -> list[Piece]:
    """System text stands right after the begin-of-sentence token."""
    return [Piece(text)]


def user_pieces(text: str) -> list[Piece]:
    """A user message."""
    return [Piece(USER, control=True), Piece(text)]


def _written(text: str, part: str) -> Piece:
    return Piece(text, generated=True, part=part)


def _r1_answer(reasoning: str, answer: str) -> list[Piece]:
    opening, end = Piece(ASSISTANT, control=True), Piece(END, control=True, generated=True)
    if not reasoning:
        return [opening, _written(answer, "answer"), end]
    return [
        opening,
        Piece(THINK_OPEN, control=True, generated=True),
        _written(f"\n{reasoning}\n", "reasoning"),
        Piece(THINK_CLOSE, control=True, generated=True),
        _written(f"\n\n{answer}", "answer"),
        end,
    ]


def _r1_history(reasoning: str, answer: str) -> list[Piece]:
    # The template keeps what follows the last </think>, line ends included.
    return _r1_answer("", f"\n\n{answer}" if reasoning else answer)


def _v31_answer(reasoning: str, answer: str) -> list[Piece]:
    # The first tag belongs to the prompt: serving with and without thinking differs in it alone. No line ends.
    end = Piece(END, control=True, generated=True)
    if not reasoning:
        return _v31_history("", answer)
    return [
        Piece(ASSISTANT, control=True),
        Piece(THINK_OPEN, control=True),
        _written(reasoning, "reasoning"),
        Piece(THINK_CLOSE, control=True, generated=True),
        _written(answer, "answer"),
        end,
    ]


def _v31_history(reasoning: str, answer: str) -> list[Piece]:
    del reasoning
    return [
        Piece(ASSISTANT, control=True),
        Piece(THINK_CLOSE, control=True),
        _written(answer, "answer"),
        Piece(END, control=True, generated=True),
    ]


TEMPLATES: dict[str, Template] = {
    "deepseek-r1": Template(_r1_answer, _r1_history, cuts_history=True),
    "deepseek-v3": Template(_r1_answer, _r1_history, cuts_history=False),
    "deepseek-v3.1": Template(_v31_answer, _v31_history, cuts_history=True),
}
