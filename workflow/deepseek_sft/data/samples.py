"""One record → samples: which turns each sample trains, and what its history shows."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .encoding import Encoder, Segment
from .messages import Rejection, check_canonical, split_reasoning
from .templates import TEMPLATES, Piece, system_pieces, user_pieces
from .tokens import NO_LOSS

POLICIES = ("split", "strip", "keep")


@dataclass(frozen=True)
class Settings:
    """What shapes samples.

    Args:
        template: key of ``TEMPLATES``.
        max_length: longest sample, tokens.
        history: one of ``POLICIES``.
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
    """An encoded message: in full, and as later turns see it."""

    full: list[Segment]
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


@dataclass(frozen=True)
class Made:
    """What one record gave.

    Args:
        rejects: (sample id, reason, message).
        untrained: turns marked for training whose loss the ``strip`` policy gave up.
        mentions: whether a text spells a control token.
    """

    samples: list[Sample]
    rejects: list[tuple[str, str, str]]
    untrained: int
    mentions: bool


def make_samples(records: list[Any], encoder: Encoder, settings: Settings) -> list[Made]:
    """Samples of many records; texts are encoded in one batch."""
    template = TEMPLATES[settings.template]
    shown_whole = settings.history == "keep" or (settings.history == "split" and not template.cuts_history)
    rendered: list[list[Piece]] = []
    plans: list[tuple[list[tuple[int, int, bool]], bool] | Rejection] = []
    for record in records:
        try:
            messages = check_canonical(record.get("messages") if isinstance(record, dict) else None)
        except Rejection as rejection:
            plans.append(rejection)
            continue
        turns = []
        for message in messages:
            full = history = len(rendered)
            if message["role"] == "assistant":
                reasoning, answer = split_reasoning(message["content"])
                rendered.append(template.answer(reasoning, answer))
                if reasoning and not shown_whole:
                    history = len(rendered)
                    rendered.append(template.history(reasoning, answer))
            else:
                pieces = system_pieces if message["role"] == "system" else user_pieces
                rendered.append(pieces(message["content"]))
            turns.append((full, history, message.get("loss", False)))
        plans.append((turns, any(encoder.mentions_control(_typed(message)) for message in messages)))
    encoded = encoder.encode(rendered)
    results = []
    for record, plan in zip(records, plans, strict=True):
        name = str(record.get("id", "")) if isinstance(record, dict) else ""
        if isinstance(plan, Rejection):
            results.append(Made([], [(name, plan.reason, plan.message)], 0, False))
            continue
        turns, mentions = plan
        results.append(
            _one_record(name, [Turn(encoded[f], encoded[h], t) for f, h, t in turns], mentions, encoder, settings)
        )
    return results


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


def _one_record(name: str, turns: list[Turn], mentions: bool, encoder: Encoder, settings: Settings) -> Made:
    views, untrained = choose_views(turns, settings.history, settings.max_length)
    samples, rejects = [], []
    for view in views:
        own = f"{name}#{view.end}" if len(views) > 1 else name
        try:
            samples.append(_assemble(own, turns, view, encoder, settings))
        except Rejection as rejection:
            rejects.append((own, rejection.reason, rejection.message))
    return Made(samples, rejects, untrained, mentions)


def _assemble(name: str, turns: list[Turn], view: View, encoder: Encoder, settings: Settings) -> Sample:
    ids, labels = [encoder.bos_token_id], [NO_LOSS]
    reasoning, answers = [], []
    for index, turn in enumerate(turns[: view.end + 1]):
        learned = index in view.trained
        segments = turn.full if learned else turn.history
        for segment in segments:
            ids += segment.ids
            labels += segment.ids if learned and segment.generated else [NO_LOSS] * len(segment.ids)
        if learned:
            reasoning.append(sum(len(s.ids) for s in segments if s.part == "reasoning"))
            answers.append(sum(len(s.ids) for s in segments if s.part == "answer"))
    too_long = len(ids) > settings.max_length
    if too_long and not settings.truncate:
        raise Rejection("too_long", f"{len(ids)} tokens, more than {settings.max_length}")
    # A cut answer keeps its loss but gets no end-of-sentence token: it must not teach to stop in mid-sentence.
    input_ids = np.array(ids[: settings.max_length], dtype=np.int32)
    kept_labels = np.array(labels[: settings.max_length], dtype=np.int32)
    if not (kept_labels != NO_LOSS).any():
        raise Rejection("nothing_left", f"the trained answer begins after {settings.max_length} tokens")
    return Sample(name, input_ids, kept_labels, len(answers), tuple(reasoning), tuple(answers), too_long)


def _length(turns: list[Turn], end: int) -> int:
    before = sum(len(segment.ids) for turn in turns[:end] for segment in turn.history)
    return 1 + before + sum(len(segment.ids) for segment in turns[end].full)


def _typed(message: dict[str, Any]) -> str:
    """The text a person or model wrote, without the tags that prepare_data put there."""
    if message["role"] == "assistant":
        return "\n".join(split_reasoning(message["content"]))
    return message["content"]
