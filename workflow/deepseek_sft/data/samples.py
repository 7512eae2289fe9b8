"""One record → samples: which turns each sample trains, and what its history shows."""

import dataclasses
import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .chat_templates import BASE, NO_LOSS, TEMPLATES, Call, Piece, Place, Reply, Template, system_pieces, user_pieces
from .encoding import Encoder, Segment
from .lines import Oversized
from .messages import Rejection, check_canonical, split_reasoning
from .similarity import Signature, language, signature
from .template_process import TemplateError

LONGEST_ESCAPE = 6  # bytes that JSON may write one byte of text with


@dataclass(frozen=True)
class Settings:
    """What shapes samples.

    Args:
        template: key of ``TEMPLATES``, or ``base``.
        max_length: longest sample, tokens.
        history: ``data.history_reasoning``.
        truncate: cut longer samples instead of rejecting them.
    """

    template: str
    max_length: int
    history: str = "split"
    truncate: bool = False


@dataclass(frozen=True)
class Sample:
    """One training sample.

    Args:
        id: the record's id, with ``#<message>`` where a record gives several samples.
        input_ids: int32, begin-of-sentence first.
        labels: int32, equal to ``input_ids`` where trained and -100 elsewhere; not shifted.
        turns: number of trained turns.
        reasoning: tokens of reasoning of each trained turn; 0 where there is none.
        answers: tokens of the answer of each trained turn.
        truncated: whether its end was cut off.
    """

    id: str
    input_ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    turns: int
    reasoning: tuple[int, ...]
    answers: tuple[int, ...]
    truncated: bool


@dataclass(frozen=True)
class Turn:
    """An encoded message: in full (None where the template has no place for it), and as later turns see it.

    Of a user's message, ``full`` is what a trained answer sees before it.
    """

    full: list[Segment] | None
    history: list[Segment]
    trained: bool

    @property
    def uncut(self) -> bool:
        """Whether later turns see exactly what is trained here."""
        return self.full is self.history


@dataclass(frozen=True)
class View:
    """A sample to be: the last message it holds and the messages (all of them seen in full) it trains."""

    end: int
    trained: tuple[int, ...]


class TooLong(Rejection):
    """A sample longer than allowed."""

    def __init__(self, length: int, allowed: int, exact: bool = True):
        super().__init__("too_long", f"{'' if exact else 'at least '}{length} tokens, more than {allowed}")
        self.length = length


@dataclass(frozen=True)
class Made:
    """What one record gave.

    Args:
        rejects: (sample id, reason, message).
        untrained: turns marked for training whose loss the ``strip`` policy gave up.
        mentions: whether a text spells a control token.
        spelled: trained answers that spell a control token, or end in what looks like one of another model.
        spelling: the first of these spellings.
        tools: whether the record defines tools.
        too_long: lengths of the samples that were rejected for theirs.
        language: as ``similarity.language`` names it; empty if there is no conversation.
        signature: of the last sample, for finding near duplicates.
        weight: how often the record is to be used.
        copies: how often it is used: the weight, its fraction decided by chance.
        calls: whether it calls tools, or is given definitions of tools that are rendered.
        tools_lost: whether it is given definitions of tools that the base's chat template does not show.
    """

    samples: list[Sample]
    rejects: list[tuple[str, str, str]]
    untrained: int
    mentions: bool
    too_long: tuple[int, ...] = ()
    language: str = ""
    signature: Signature | None = None
    weight: float = 1.0
    copies: int = 1
    spelled: int = 0
    spelling: str = ""
    tools: bool = False
    calls: bool = False
    tools_lost: bool = False


class _Rendering:
    """Messages rendered for one batch; equal renderings are kept once and told by their number."""

    def __init__(self, template: Template, history: str):
        self.template = template
        shown_whole = history == "keep" or (history == "split" and not template.cuts_history)
        self.cut = not shown_whole
        self.pieces: list[list[Piece]] = []

    def add(self, pieces: list[Piece]) -> int:
        """Keep pieces; their number."""
        self.pieces.append(pieces)
        return len(self.pieces) - 1

    def conversation(
        self, messages: list[dict[str, Any]], opening: list[Piece] | None = None
    ) -> list[tuple[int | None, int, bool]]:
        """Numbers of each message in full and as history, and whether it is trained.

        Args:
            opening: what stands before the first question, if it is more than the system text.
        """
        turns: list[tuple[int | None, int, bool]] = []
        called = answered = False
        before = ""
        for number, message in enumerate(messages):
            role, place = message["role"], Place(before == "tool", called, answered)
            if role == "assistant":
                reply = to_reply(message)
                full, history = self.template.reply(reply, place), self.template.history(reply, place, self.cut)
                first = None if full is None else self.add(full)
                turns.append((first, first if full == history else self.add(history), message["loss"]))  # type: ignore[arg-type]
                called = called or bool(reply.calls)
            elif role == "tool":
                shown = self.add(self.template.output(message["content"], place))
                turns.append((shown, shown, False))
                answered = True
            else:
                pieces = (system_pieces if role == "system" else user_pieces)(message["content"])
                if opening is not None and number == 0:
                    pieces = opening if role == "system" else [*opening, *pieces]
                shown = history = self.add(pieces)
                following = messages[number + 1] if number + 1 < len(messages) else {}
                if called and self.template.call_line and following.get("tool_calls"):
                    history = self.add(user_pieces(message["content"] + self.template.call_line))
                turns.append((shown, history, False))
            before = role
        return turns


@dataclass(frozen=True)
class Record:
    """A line of ``train.jsonl`` taken apart; ``made`` holds its rejection, or what is known before it is rendered.

    ``opening`` is what a template shows of the tools before the conversation; None where it shows nothing.
    """

    id: str
    messages: list[dict[str, Any]]
    tools: list[Any]
    made: Made
    opening: Any = None


def parsed(record: Any, encoder: Encoder, opening: Callable[..., Any] | None = None) -> Record:
    """A record taken apart; ``opening`` is asked, by messages and tools, what a template shows of the tools."""
    record = record if isinstance(record, dict) else {}
    name = str(record.get("id", ""))
    try:
        weight = parse_weight(record.get("weight"))
        messages = check_canonical(record.get("messages"))
        tools = parse_tools(record.get("tools"))
        shown = opening(messages, tools) if opening else bool(tools) or None
    except Rejection as rejection:
        return Record(name, [], [], Made([], [(name, rejection.reason, rejection.message)], 0, False))
    typed = [_typed(message) for message in messages]
    made = Made(
        *([], [], 0, any(map(encoder.mentions_control, typed))),
        language=language(typed),
        weight=weight,
        tools=bool(tools),
        calls=shown is not None or any("tool_calls" in message for message in messages),
        tools_lost=bool(tools) and shown is None,
    )
    trained = [text for text, message in zip(typed, messages, strict=True) if message.get("loss")]
    if spellings := [found for text in trained if (found := spelled_token(text, encoder))]:
        made = dataclasses.replace(made, spelled=len(spellings), spelling=spellings[0])
    return Record(name, messages, tools, made, shown)


def make_samples(records: list[Any], encoder: Encoder, settings: Settings) -> list[Made]:
    """Samples of many records; texts are encoded in one batch."""
    if settings.template == BASE:
        from . import base_rendering  # which takes samples' forms from here

        return base_rendering.make_samples(records, encoder, settings)
    rendering = _Rendering(TEMPLATES[settings.template], settings.history)
    plans: list[tuple[list[tuple[int | None, int, bool]], Made]] = []
    for record in records:
        own = parsed(record, encoder, functools.partial(tools_opening, encoder=encoder))
        plans.append((rendering.conversation(own.messages, own.opening) if own.messages else [], own.made))
    encoded = encoder.encode(rendering.pieces, settings.max_length, cut=settings.truncate)
    results = []
    for record, (turns, base) in zip(records, plans, strict=True):
        if turns:
            whole = [Turn(None if f is None else encoded[f], encoded[h], t) for f, h, t in turns]
            base = _one_record(str(record.get("id", "")), whole, base, encoder, settings)
        results.append(base)
    return results


def oversized(name: str, line: Oversized, encoder: Encoder, settings: Settings) -> Made:
    """What a line gives that is too large to be read: it is too long if its bytes alone say so."""
    least = line.size // LONGEST_ESCAPE // encoder.longest
    reason, message = "too_large", line.message
    if least > settings.max_length:
        reason, message = "too_long", f"{line.message}: at least {least} tokens, more than {settings.max_length}"
    return Made([], [(name, reason, message)], 0, False, too_long=(least,) if reason == "too_long" else ())


def parse_weight(value: Any) -> float:
    """The weight of a line of ``train.jsonl``, 1 where it has none.

    Raises:
        Rejection: ``invalid_record``.
    """
    if value is None:
        return 1.0
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise Rejection("invalid_record", "the weight is not a positive number")
    return float(value)


def parse_tools(value: Any) -> list[dict[str, Any]]:
    """Definitions of tools of a line of ``train.jsonl``; none where it has none.

    Raises:
        Rejection: ``invalid_record``.
    """
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        raise Rejection("invalid_record", "tools is not a list of objects")
    return value


# At the end of an answer: <|im_end|>, <|eot_id|>, <|endoftext|>, </s>, <end_of_turn> of dumps that kept them.
FOREIGN_END = re.compile(r"(<[|｜][^<>|｜\n]{1,60}[|｜]>|</s>|<end_of_turn>|<eos>)\s*\Z")


def spelled_token(text: str, encoder: Encoder) -> str:
    """The control token that an answer spells, or the end token of another model that it ends in; empty if neither."""
    if "<" not in text:
        return ""
    if spelled := encoder.mentions_control(text):
        return spelled
    found = FOREIGN_END.search(text, max(0, len(text) - 100))
    return found[1] if found else ""


def tools_opening(messages: list[dict[str, Any]], tools: list[Any], encoder: Encoder) -> list[Piece] | None:
    """What the base's chat template writes before the first question where tools are given; None if it shows none.

    Raises:
        Rejection: ``tool_definitions``.
    """
    if not tools or encoder.chat_template is None:
        return None
    system = messages[0]["content"] if messages[0]["role"] == "system" else ""
    try:
        return encoder.chat_template.system_with_tools(system, tools, encoder.control)
    except TemplateError as error:
        raise Rejection("tool_definitions", str(error)) from None


def to_reply(message: dict[str, Any]) -> Reply:
    """An assistant message taken apart."""
    calls = (Call(c["type"], **c["function"]) for c in message.get("tool_calls", ()))
    return Reply(*split_reasoning(message["content"]), tuple(calls))


def choose_views(turns: list[Turn], policy: str, max_length: int) -> tuple[list[View], int]:
    """Samples that a record gives under a policy, and how many trained turns it gives up.

    ``split``: every trained turn in full, after the history that serving would show. A turn whose text later turns see
    unchanged needs no sample of its own: it is trained within the next one, in the same context, if that one fits.
    ``strip``, ``keep``: one sample up to the last trained turn. Earlier turns are trained where they are seen in full;
    ``strip`` gives up the others, since without its reasoning such a turn would teach to answer without thinking.
    """
    trained = [index for index, turn in enumerate(turns) if turn.trained]
    last = trained[-1]
    if policy != "split":
        kept = tuple(index for index in trained if index == last or turns[index].uncut)
        return [View(last, kept)], len(trained) - len(kept)
    views: list[View] = []
    host_fits = False
    for index in reversed(trained):
        if host_fits and turns[index].uncut:
            views[-1] = View(views[-1].end, (index, *views[-1].trained))
        else:
            views.append(View(index, (index,)))
            host_fits = _length(turns, index) <= max_length
    return views[::-1], 0


def _one_record(name: str, turns: list[Turn], base: Made, encoder: Encoder, settings: Settings) -> Made:
    views, untrained = choose_views(turns, settings.history, settings.max_length)
    samples, rejects, too_long = [], [], []
    for view in views:
        own = f"{name}#{view.end}" if len(views) > 1 else name
        try:
            samples.append(_assemble(own, turns, view, encoder, settings))
        except Rejection as rejection:
            rejects.append((own, rejection.reason, rejection.message))
            too_long += [rejection.length] if isinstance(rejection, TooLong) else []
    return dataclasses.replace(
        base,
        samples=samples,
        rejects=rejects,
        untrained=untrained,
        too_long=tuple(too_long),
        signature=signature(samples[-1].input_ids) if samples else None,
    )


def _assemble(name: str, turns: list[Turn], view: View, encoder: Encoder, settings: Settings) -> Sample:
    parts, trained = [np.array([encoder.bos_token_id], np.int32)], [False]
    reasoning, answers, whole = [], [], True
    for index, turn in enumerate(turns[: view.end + 1]):
        learned = index in view.trained
        segments = turn.full if learned or index + 1 in view.trained else turn.history
        if segments is None:
            raise Rejection("tool_reasoning", f"message {index + 1}: template {settings.template} has no place for it")
        parts += [segment.ids for segment in segments]
        whole = whole and all(segment.whole for segment in segments)
        trained += [learned and segment.generated for segment in segments]
        if learned:
            reasoning.append(sum(len(s.ids) for s in segments if s.part == "reasoning"))
            answers.append(sum(len(s.ids) for s in segments if s.part == "answer"))
    length = sum(map(len, parts))
    too_long = length > settings.max_length
    if too_long and not settings.truncate:
        raise TooLong(length, settings.max_length, whole)
    input_ids = np.concatenate(parts)
    labels = np.where(np.repeat(trained, [len(part) for part in parts]), input_ids, np.int32(NO_LOSS))
    # A cut answer keeps its loss but gets no end-of-sentence token: it must not teach to stop in mid-sentence.
    input_ids, labels = input_ids[: settings.max_length], labels[: settings.max_length]
    if not (labels != NO_LOSS).any():
        raise Rejection("nothing_left", f"the trained answer begins after {settings.max_length} tokens")
    return Sample(name, input_ids, labels, len(answers), tuple(reasoning), tuple(answers), too_long)


def _length(turns: list[Turn], end: int) -> int:
    before = sum(len(segment.ids) for turn in turns[:end] for segment in turn.history)
    return 1 + before + sum(len(segment.ids) for segment in turns[end].full or ())


def _typed(message: dict[str, Any]) -> str:
    """The text a person or model wrote, without the tags that prepare_data put there."""
    if message["role"] == "assistant":
        reply = to_reply(message)
        return "\n".join([reply.reasoning, reply.answer, *(f"{c.type}\n{c.name}\n{c.arguments}" for c in reply.calls)])
    return message["content"]
