"""``data.template: base``: samples rendered with the base's own chat template, their loss mask shown to be right.

A trained turn is what serving gives the model, the prompt (``add_generation_prompt``), and what the model then writes.
What it writes is taken from the template's own rendering of the turn: what stands between ``{% generation %}`` marks,
otherwise what follows the prompt. Templates cut the reasoning of earlier turns, and with it that of the turn to be
trained: so that turn is rendered without reasoning, and its reasoning is put back as the model writes it
(``Reasoning``).

Of every sample it is checked that its written part is, character by character, reasoning, answer, calls and one
control token that ends it, that its ids decode to that text, and that an earlier turn is trained only where the ids of
prompt and turn stand unchanged before the later ones. Control tokens that people typed are held apart while the
template works.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import BadInputError
from .base_template import ChatTemplate, pieces_of_text
from .chat_templates import NO_LOSS, Piece, Reply
from .encoding import Encoder, Segment
from .held_text import Hold
from .messages import THINK_CLOSE, THINK_OPEN, Rejection
from .samples import Made, Record, Sample, Settings, TooLong, parsed, to_reply
from .similarity import signature
from .template_child import BEGIN, END
from .template_process import TemplateError
from .tools import call_ids

OPENED = re.compile(rf"{THINK_OPEN}\n?\Z")
FIELD = "reasoning_content"
PROBE = "reasoning of an earlier turn"
ASK = {"role": "user", "content": "Q"}


@dataclass(frozen=True)
class Reasoning:
    """How a template's model writes reasoning.

    Args:
        opening, closing: around it.
        empty: what the template puts where a turn has none.
        asked: whether the prompt opens it as the request asks (``thinking``); then calls and what follows their
            outputs have none.
        as_field: whether history is given reasoning in a field; otherwise it is a part of the content.
        possible: whether the template, where it shows a field of reasoning, writes tags around it. Without tokens for
            the tags, and a template that shows content as it is, they are text.
    """

    opening: str
    closing: str
    empty: str
    asked: bool
    as_field: bool
    possible: bool


class BaseTemplate:
    """A base's chat template and what probing it tells."""

    def __init__(self, chat: ChatTemplate, control: frozenset[str]):
        self.chat, self.control, self.hold = chat, control, Hold(control)
        source = "".join(text for _, text in chat.named)
        self.marks = re.search(r"{%[-+]?\s*generation\b", source) is not None
        plain, thinking = (chat.render([ASK], prompt=True, thinking=t, enable_thinking=t) for t in (False, True))
        empty = f"{THINK_OPEN}{THINK_CLOSE}"
        shown = chat.render([ASK, {"role": "assistant", "content": "A"}])
        compact = plain != thinking or f"{empty}A" in shown
        self.reasoning = Reasoning(
            *((THINK_OPEN, THINK_CLOSE) if compact else (f"{THINK_OPEN}\n", f"\n{THINK_CLOSE}\n\n")),
            empty=empty if f"{empty}A" in shown else "",
            asked=plain != thinking,
            as_field=FIELD in source,
            possible=FIELD not in source or THINK_CLOSE in source,
        )
        told = {"role": "user", "content": "T"}, {"role": "assistant", "content": "A", "loss": False}
        told[1]["content"] = f"{THINK_OPEN}\n{PROBE}\n{THINK_CLOSE}\n\nA"
        history = [self.served(message, False, False) for message in told]
        self.keeps_history = PROBE in chat.render([*history, ASK], prompt=True)

    def prompt(self, messages: list[dict[str, Any]], tools: Any, thinking: bool) -> str:
        """What serving gives the model after these messages."""
        return self.chat.render(messages, tools=tools, prompt=True, thinking=thinking, enable_thinking=thinking)

    def served(self, message: dict[str, Any], after_tool: bool, strip: bool, ids: Sequence[str] = ()) -> dict[str, Any]:
        """A message of the history as a request holds it; ``ids`` are its ``call_ids``."""
        shown = {"role": message["role"], "content": self.hold(message["content"])}
        if message["role"] == "tool" and ids:
            shown["tool_call_id"] = self.hold(ids[0])
        if message["role"] != "assistant":
            return shown
        reply, form = self._held(message), self.reasoning
        shown["content"] = reply.answer
        if reply.reasoning and not (form.asked and (reply.calls or after_tool)):
            if strip and self.keeps_history:
                shown["content"] = form.closing.partition(THINK_CLOSE)[2] + reply.answer
            elif form.as_field:
                shown[FIELD] = reply.reasoning
            else:
                opening = "" if form.asked else form.opening
                shown["content"] = f"{opening}{reply.reasoning}{form.closing}{reply.answer}"
        return shown | self._calls(reply, ids)

    def turn(self, message: dict[str, Any], ids: Sequence[str] = ()) -> dict[str, Any]:
        """The trained message without its reasoning."""
        reply = self._held(message)
        return {"role": "assistant", "content": reply.answer} | self._calls(reply, ids)

    def _held(self, message: dict[str, Any]) -> Reply:
        reply = to_reply(message)
        calls = tuple(
            dataclasses.replace(c, name=self.hold(c.name), arguments=self.hold(c.arguments)) for c in reply.calls
        )
        return Reply(self.hold(reply.reasoning), self.hold(reply.answer), calls)

    def _calls(self, reply: Reply, ids: Sequence[str]) -> dict[str, Any]:
        made = [
            {"id": self.hold(own), "type": c.type, "function": {"name": c.name, "arguments": c.arguments}}
            for own, c in zip(ids, reply.calls, strict=True)
        ]
        return {"tool_calls": made} if made else {}

    def written(
        self, history: list[dict[str, Any]], message: dict[str, Any], tools: Any, ids: Sequence[str] = ()
    ) -> tuple[str, str]:
        """Prompt of a trained turn, and what the model writes.

        Raises:
            TemplateError: the template refuses it.
            Rejection: ``template_reasoning``, ``template_mask``.
        """
        reply, form, turn = self._held(message), self.reasoning, self.turn(message, ids)
        plain = self.prompt(history, tools, False)
        prompt = self.prompt(history, tools, True) if reply.reasoning else plain
        body = self._body(history, turn, tools, plain)
        if body is None:  # history shows it otherwise than serving has it written: as the first answer
            body = self._body([ASK], turn, tools, self.prompt([ASK], tools, False))
        if body is None:
            raise Rejection("template_mask", "the base's template shows this answer otherwise than after its prompt")
        opened = OPENED.search(prompt)
        if not reply.reasoning:
            if opened:
                raise Rejection("template_reasoning", "the base's template opens reasoning that this answer has not")
            return prompt, self._checked(body, reply, form.empty)
        if not form.possible:
            raise Rejection("template_reasoning", "the base's template writes reasoning without tags of thinking")
        if form.asked and not opened:
            raise Rejection("tool_reasoning", "the base's template has no place for reasoning here")
        if form.asked and reply.calls:
            raise Rejection("tool_reasoning", "the base's template calls tools without reasoning")
        rest = self._checked(body, reply, form.empty).removeprefix(form.empty)
        opening = form.opening
        if opened:
            if not opening.startswith(opened[0]):
                opening = opened[0]
            opening = opening.removeprefix(opened[0])
        return prompt, f"{opening}{reply.reasoning}{form.closing}{rest}"

    def _body(self, history: list[dict[str, Any]], turn: dict[str, Any], tools: Any, prompt: str) -> str | None:
        """What the template writes after a prompt, and its end; None where it shows another prompt."""
        whole = self.chat.render([*history, turn], tools=tools, marks=True)
        prompt = OPENED.sub("", prompt)
        if self.marks:
            before, _, marked = whole.rpartition(BEGIN)
            inner, _, after = marked.partition(END)
            plain = before.replace(BEGIN, "").replace(END, "")
            if not plain.startswith(prompt):
                return None
            first = next(iter(pieces_of_text(after, self.control)), None)
            closing = first.text if first and first.control and not _ends(inner, self.control) else ""
            return plain[len(prompt) :] + inner + closing
        return whole[len(prompt) :] if whole.startswith(prompt) else None

    def _checked(self, body: str, reply: Reply, empty: str) -> str:
        """
        Raises:
            Rejection: ``template_mask``.
        """
        end = _ends(body, self.control)
        if not end:
            raise Rejection("template_mask", "no control token ends what the base's template shows of this answer")
        body = body.rstrip()
        inner = body.removeprefix(empty)
        answer = reply.answer if inner.startswith(reply.answer) else reply.answer.strip()
        rest = inner.removeprefix(answer).removesuffix(end)
        if not inner.startswith(answer) or (rest and not reply.calls):
            raise Rejection("template_mask", "the base's template shows more, or less, than this answer and its end")
        for call in reply.calls:
            _, found, rest = rest.partition(call.name)
            _, also, rest = rest.partition(call.arguments)
            if not found or not also:
                raise Rejection("template_mask", f"the base's template does not show the call of {call.name} as given")
        return body


def _ends(text: str, control: Collection[str]) -> str:
    """The control token that a text ends with, white space aside; empty if there is none."""
    text = text.rstrip()
    return max((name for name in control if name and text.endswith(name)), key=len, default="")


@functools.lru_cache(maxsize=4)
def _probed(chat: ChatTemplate, control: frozenset[str]) -> BaseTemplate:
    return BaseTemplate(chat, control)


def base_template(encoder: Encoder) -> BaseTemplate:
    """
    Raises:
        TemplateError: the folder has no chat template, or it cannot show a question.
    """
    if encoder.chat_template is None:
        raise TemplateError(f"{encoder.folder} has no chat template")
    return _probed(encoder.chat_template, frozenset(encoder.control))


@dataclass(frozen=True)
class _Turn:
    """A trained turn: its message's number, ids of its prompt and of what the model writes."""

    number: int
    prompt: list[Segment]
    written: list[Segment]

    @property
    def ids(self) -> np.ndarray:
        return np.concatenate([segment.ids for segment in (*self.prompt, *self.written)])


def make_samples(records: list[Any], encoder: Encoder, settings: Settings) -> list[Made]:
    """Samples of many records; texts are encoded in one batch.

    Raises:
        TemplateError: the folder has no chat template that shows a question.
        BadInputError: reasoning is to be kept in the history, and the template cuts it.
    """
    template = base_template(encoder)
    if settings.history == "keep" and not template.keeps_history:
        raise BadInputError(
            "data.history_reasoning: keep: the base's template cuts the reasoning of earlier turns, as serving does",
            "take split or strip, or one of our templates",
        )
    found = [parsed(record, encoder) for record in records]
    texts: list[list[Piece]] = []
    plans = [_plan(record, template, texts, settings) for record in found]
    encoded = encoder.encode(texts, settings.max_length, cut=settings.truncate)
    made = []
    for record, (turns, rejects) in zip(found, plans, strict=True):
        kept = []
        for number, prompt, written in turns:
            if _decodes(encoder, texts[written], encoded[written]):
                kept.append(_Turn(number, encoded[prompt], encoded[written]))
            else:
                rejects.append((record.id, "template_mask", f"message {number + 1}: its ids do not decode to its text"))
        made.append(_one_record(record, kept, rejects, encoder, settings))
    return made


def _decodes(encoder: Encoder, pieces: list[Piece], segments: list[Segment]) -> bool:
    """Whether ids that are trained decode to the text that is."""
    return all(
        segment.ids.tolist() == [encoder.control[piece.text]]
        if piece.control
        else not segment.whole
        or piece.text.startswith(encoder.text.decode(segment.ids.tolist(), skip_special_tokens=False))
        for piece, segment in zip(encoder.join(pieces), segments, strict=True)
    )


def _plan(
    record: Record, template: BaseTemplate, texts: list[list[Piece]], settings: Settings
) -> tuple[list[tuple[int, int, int]], list[tuple[str, str, str]]]:
    """Trained turns as numbers of their texts, and rejections."""
    turns, rejects = [], []
    strip = settings.history == "strip"
    trained = [number for number, message in enumerate(record.messages) if message.get("loss")]
    ids = call_ids(record.messages)
    for number in trained:
        own = f"{record.id}#{number}" if len(trained) > 1 else record.id
        try:
            before = ["", *(message["role"] for message in record.messages)]
            history = [
                template.served(message, before[at] == "tool", strip, ids[at])
                for at, message in enumerate(record.messages[:number])
            ]
            tools = json.loads(template.hold(json.dumps(record.tools, ensure_ascii=False))) if record.tools else None
            prompt, written = template.written(history, record.messages[number], tools, ids[number])
        except TemplateError as error:
            rejects.append((own, "template_refused", f"the base's template: {error}"))
        except Rejection as rejection:
            rejects.append((own, rejection.reason, f"message {number + 1}: {rejection.message}"))
        else:
            turns.append((number, len(texts), len(texts) + 1))
            texts += [_pieces(prompt, template), _pieces(written, template, generated=True)]
    return turns, rejects


def _pieces(text: str, template: BaseTemplate, *, generated: bool = False) -> list[Piece]:
    """Rendered text as pieces; of what is written, the text before the end of the reasoning counts as reasoning."""
    pieces = pieces_of_text(text, template.control)
    closes = [at for at, piece in enumerate(pieces) if piece.control and piece.text == THINK_CLOSE]
    close = closes[0] if closes and generated else -1
    return [
        Piece(
            template.hold.back(piece.text),
            control=piece.control,
            generated=generated,
            part="" if piece.control or not generated else "reasoning" if at < close else "answer",
        )
        for at, piece in enumerate(pieces)
    ]


def _one_record(
    record: Record, turns: list[_Turn], rejects: list[tuple[str, str, str]], encoder: Encoder, settings: Settings
) -> Made:
    if record.made.rejects:
        return record.made
    samples: list[Sample] = []
    too_long: list[int] = []
    views, untrained = _views(turns, settings)
    for last, others in views:
        own = f"{record.id}#{last.number}" if len(views) > 1 else record.id
        try:
            samples.append(_assemble(own, last, others, encoder, settings))
        except Rejection as rejection:
            rejects = [*rejects, (own, rejection.reason, rejection.message)]
            too_long += [rejection.length] if isinstance(rejection, TooLong) else []
    return dataclasses.replace(
        record.made,
        samples=samples,
        rejects=rejects,
        untrained=untrained,
        too_long=tuple(too_long),
        signature=signature(samples[-1].input_ids) if samples else None,
    )


def _views(turns: list[_Turn], settings: Settings) -> tuple[list[tuple[_Turn, list[_Turn]]], int]:
    """Samples to be: the turn that each ends with, and earlier ones that it shows as they are trained."""
    if not turns:
        return [], 0
    if settings.history != "split":
        *earlier, last = turns
        kept = [turn for turn in earlier if _stands_in(turn, last)]
        return [(last, kept)], len(earlier) - len(kept)
    views: list[tuple[_Turn, list[_Turn]]] = []
    for turn in reversed(turns):
        if views and len(views[-1][0].ids) <= settings.max_length and _stands_in(turn, views[-1][0]):
            views[-1][1].insert(0, turn)
        else:
            views.append((turn, []))
    return views[::-1], 0


def _stands_in(turn: _Turn, later: _Turn) -> bool:
    """Whether a later turn's prompt begins with a turn as it is trained, id by id."""
    ids = turn.ids
    prompt = np.concatenate([segment.ids for segment in later.prompt])
    return len(ids) <= len(prompt) and bool((prompt[: len(ids)] == ids).all())


def _assemble(name: str, last: _Turn, others: list[_Turn], encoder: Encoder, settings: Settings) -> Sample:
    input_ids = last.ids.astype(np.int32)
    segments = [*last.prompt, *last.written]
    whole = all(segment.whole for segment in segments)
    too_long = len(input_ids) > settings.max_length
    if too_long and not settings.truncate:
        raise TooLong(len(input_ids), settings.max_length, whole)
    labels = np.full(len(input_ids), NO_LOSS, np.int32)
    reasoning, answers = [], []
    for turn in (*others, last):
        start = sum(len(segment.ids) for segment in turn.prompt)
        end = start + sum(len(segment.ids) for segment in turn.written)
        labels[start:end] = input_ids[start:end]
        reasoning.append(sum(len(s.ids) for s in turn.written if s.part == "reasoning"))
        answers.append(sum(len(s.ids) for s in turn.written if s.part == "answer"))
    input_ids, labels = input_ids[: settings.max_length], labels[: settings.max_length]
    if not (labels != NO_LOSS).any():
        raise Rejection("nothing_left", f"the trained answer begins after {settings.max_length} tokens")
    return Sample(name, input_ids, labels, len(answers), tuple(reasoning), tuple(answers), too_long)
