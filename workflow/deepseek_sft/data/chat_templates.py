"""DeepSeek's chat templates as pieces: control tokens and text, and which of them the model writes itself.

Rendering here, rather than through the tokenizer's own template, has two reasons: R1's and V3.1's templates delete the
reasoning of every assistant message, the one to be trained included; and a rendered string no longer tells a control
token from the same characters typed by a person.

Semantics follow the ``chat_template`` of the releases' tokenizer_config.json (R1, V3, R1-0528, V3-0324, V3.1), tool
calls included. R1's and V3's first templates forget to open a call that is not the conversation's first: history shows
it as they do, but such a call is trained as servers' parsers need it, opened, after the prompt that serving makes.
R1-0528 and V3-0324 open every round of calls and of outputs, and put a line end between outputs.

None of these releases renders definitions of tools; where a base's own template does, its text is used
(``base_template.system_with_tools``).
"""

from collections.abc import Callable
from dataclasses import dataclass

from .messages import THINK_CLOSE, THINK_OPEN

USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
END = "<｜end▁of▁sentence｜>"
CALLS_BEGIN, CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL_BEGIN, CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
CALL_SEPARATOR = "<｜tool▁sep｜>"
OUTPUTS_BEGIN, OUTPUTS_END = "<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>"
OUTPUT_BEGIN, OUTPUT_END = "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>"
NO_LOSS = -100  # label of tokens that are not trained: what cross entropy ignores, by PyTorch's default


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
class Call:
    """A tool call; ``arguments`` is JSON text."""

    type: str
    name: str
    arguments: str


@dataclass(frozen=True)
class Reply:
    """What an assistant message says."""

    reasoning: str
    answer: str
    calls: tuple[Call, ...] = ()


@dataclass(frozen=True)
class Place:
    """Where a message stands.

    Args:
        after_tool: right after a tool's output (of an output: it is not the first of its round).
        called: an earlier message called tools.
        answered: an earlier message is a tool's output.
    """

    after_tool: bool = False
    called: bool = False
    answered: bool = False


Pieces = list[Piece]


@dataclass(frozen=True)
class Template:
    """One chat template.

    Args:
        reply: pieces of an assistant message in full, as it is trained; None where the template has no place for it.
        history: the same message as later turns see it; the flag says whether reasoning is cut where the template
            cuts it.
        output: pieces of a tool's output.
        cuts_history: whether the serving template removes the reasoning of earlier messages by itself.
        call_line: what a later call puts at the end of the user's message before it, in history.
        prompt_decides_thinking: whether the prompt opens the reasoning, or closes it at once, as the request asks.
    """

    reply: Callable[[Reply, Place], Pieces | None]
    history: Callable[[Reply, Place, bool], Pieces]
    output: Callable[[str, Place], Pieces]
    cuts_history: bool
    call_line: str = ""
    prompt_decides_thinking: bool = False


def system_pieces(text: str) -> Pieces:
    """System text stands right after the begin-of-sentence token."""
    return [Piece(text)]


def user_pieces(text: str) -> Pieces:
    """A user message."""
    return [Piece(USER, control=True), Piece(text)]


def _written(text: str, part: str = "answer") -> Piece:
    return Piece(text, generated=True, part=part)


def _token(name: str) -> Piece:
    return Piece(name, control=True, generated=True)


def _calls(calls: tuple[Call, ...], middle: Callable[[Call], Pieces], between: Pieces) -> Pieces:
    pieces: Pieces = []
    for call in calls:
        pieces += between if pieces else []
        pieces += [_token(CALL_BEGIN), *middle(call), _token(CALL_END)]
    return [*pieces, _token(CALLS_END)]


def _r1_call(call: Call) -> Pieces:
    text = f"{call.name}\n```json\n{call.arguments}\n```"
    return [_written(call.type), _token(CALL_SEPARATOR), _written(text)]


def _r1_reply(reply: Reply, place: Place) -> Pieces:
    pieces = [Piece(OUTPUTS_END if place.after_tool else ASSISTANT, control=True)]
    answer = reply.answer
    if reply.reasoning:
        pieces += [_token(THINK_OPEN), _written(f"\n{reply.reasoning}\n", "reasoning"), _token(THINK_CLOSE)]
        answer = f"\n\n{answer}"
    if answer:
        pieces.append(_written(answer))
    if reply.calls:
        pieces += [_token(CALLS_BEGIN), *_calls(reply.calls, _r1_call, [_written("\n")])]
    return [*pieces, _token(END)]


def _r1_history(reply: Reply, place: Place, cut: bool) -> Pieces:
    if reply.calls and place.called:  # neither opened nor preceded by its text
        line = [_written("\n")]
        return [*(line if place.after_tool else []), *_calls(reply.calls, _r1_call, line), _token(END)]
    if not cut or not reply.reasoning or reply.calls or place.after_tool:
        return _r1_reply(reply, place)  # the template cuts plain answers to users only
    # It keeps what follows the last </think>, line ends included.
    return _r1_reply(Reply("", f"\n\n{reply.answer}"), place)


def _r1_output(text: str, place: Place) -> Pieces:
    names = (OUTPUT_BEGIN,) if place.answered else (OUTPUTS_BEGIN, OUTPUT_BEGIN)
    return [*(Piece(name, control=True) for name in names), Piece(text), Piece(OUTPUT_END, control=True)]


def _rounds_history(reply: Reply, place: Place, cut: bool) -> Pieces:
    if not cut or not reply.reasoning:
        return _r1_reply(reply, place)
    # Calls and answers to outputs lose their reasoning too; what follows the last </think> stays, line ends included.
    return _r1_reply(Reply("", f"\n\n{reply.answer}", reply.calls), place)


def _rounds_output(text: str, place: Place) -> Pieces:
    opened = [Piece("\n")] if place.after_tool else [Piece(OUTPUTS_BEGIN, control=True)]
    return [*opened, Piece(OUTPUT_BEGIN, control=True), Piece(text), Piece(OUTPUT_END, control=True)]


def _v31_call(call: Call) -> Pieces:
    return [_written(call.name), _token(CALL_SEPARATOR), _written(call.arguments)]


def _v31_reply(reply: Reply, place: Place) -> Pieces | None:
    # The first tag belongs to the prompt: serving with and without thinking differs in it alone. No line ends.
    if not reply.reasoning:
        return _v31_history(reply, place, True)
    if reply.calls or place.after_tool:
        return None  # tools are called without thinking, and their outputs answered without
    return [
        Piece(ASSISTANT, control=True),
        Piece(THINK_OPEN, control=True),
        _written(reply.reasoning, "reasoning"),
        _token(THINK_CLOSE),
        _written(reply.answer),
        _token(END),
    ]


def _v31_history(reply: Reply, place: Place, cut: bool) -> Pieces:
    if not cut and reply.reasoning and (shown := _v31_reply(reply, place)):
        return shown
    pieces = [] if place.after_tool else [Piece(ASSISTANT, control=True), Piece(THINK_CLOSE, control=True)]
    if reply.answer:
        pieces.append(_written(reply.answer))
    if reply.calls:
        pieces += [_token(CALLS_BEGIN), *_calls(reply.calls, _v31_call, [])]
    return [*pieces, _token(END)]


def _v31_output(text: str, place: Place) -> Pieces:
    del place
    return [Piece(OUTPUT_BEGIN, control=True), Piece(text), Piece(OUTPUT_END, control=True)]


TEMPLATES: dict[str, Template] = {
    "deepseek-r1": Template(_r1_reply, _r1_history, _r1_output, cuts_history=True, call_line="\n"),
    "deepseek-v3": Template(_r1_reply, _r1_history, _r1_output, cuts_history=False, call_line="\n"),
    "deepseek-v3.1": Template(_v31_reply, _v31_history, _v31_output, cuts_history=True, prompt_decides_thinking=True),
    "deepseek-r1-0528": Template(_r1_reply, _rounds_history, _rounds_output, cuts_history=True),
    "deepseek-v3-0324": Template(_r1_reply, _rounds_history, _rounds_output, cuts_history=False),
}
BASE = "base"  # the base's own chat template, rendered (``base_rendering``)
AUTO = "auto"  # the template that fits the base's own
