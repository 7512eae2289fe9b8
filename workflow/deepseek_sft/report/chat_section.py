"""Chats with the served model: the smoke test's transcript, and the held-out samples before and after tuning."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from .. import formatting
from . import collect, drawing
from .collect import Stage, mapping

TEXT_LIMIT = 4000  # characters of one text
HELD_OUT = "held_out_format"  # the smoke test's check that asks all held-out prompts


@dataclasses.dataclass(frozen=True)
class Sample:
    """One chat with the served model; ``title`` is the check that asked, ``absent`` stands where there is no answer."""

    title: str
    question: str
    reasoning: str
    answer: str
    absent: str = "(none)"


def transcript_path(results: Path, smoke_test: Stage) -> Path | None:
    """The transcript, also of a smoke test that failed and so left no receipt."""
    kept = results / "serve" / "transcript.jsonl"
    if smoke_test.rule == "smoke_test" and smoke_test.state == "failed" and not smoke_test.receipt and kept.exists():
        return kept
    return collect.result_path(results, smoke_test, "transcript")


def transcript(path: Path | None, example: Any, limit: int) -> list[Sample]:
    """Chats of the smoke test's transcript, held-out prompts first, each question once; else the receipt's example."""
    found: dict[str, Sample] = {}
    for entry in collect.json_lines(path):
        sample = _chat(entry)
        if sample and (sample.question not in found or sample.title == HELD_OUT):
            found[sample.question] = sample
    samples = sorted(found.values(), key=lambda sample: sample.title != HELD_OUT)
    if not samples and isinstance(example, dict):
        samples = [_made_sample("", example.get("prompt"), example.get("reasoning"), example.get("answer"))]
    return [sample for sample in samples if sample.question][:limit]


def _chat(entry: dict[str, Any]) -> Sample | None:
    """The chat in one line of the transcript; None for other requests, streams, refusals and what was cut."""
    messages = mapping(entry.get("request")).get("messages")
    try:
        choice = json.loads(entry["response"])["choices"][0]
        message = choice["message"]
        reasoning = message.get("reasoning") or message.get("reasoning_content")
        absent = _no_answer(reasoning, choice.get("finish_reason"), None)
        return _made_sample(entry.get("check"), messages[-1]["content"], reasoning, message.get("content"), absent)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RecursionError):
        return None


def _made_sample(*texts: Any) -> Sample:
    return Sample(*map(_text, texts))


def _no_answer(reasoning: Any, finish_reason: Any, tokens: Any) -> str:
    """What stands where there is no answer: whether the model was cut, and what it had written by then."""
    after = f" after {tokens:,} tokens" if drawing.is_number(tokens) else ""
    if finish_reason == "length":
        return f"(no answer: cut{after}{', still reasoning' if reasoning else ''})"
    return "(no answer: the reasoning never closed)" if reasoning else "(none)"


@dataclasses.dataclass(frozen=True)
class Answered:
    """One held-out sample: what was expected, the base's answer where it was asked, the tuned model's, both losses."""

    question: str
    expected: str
    base_reasoning: str
    base_answer: str
    base_loss: float | None
    reasoning: str
    answer: str
    loss: float | None
    absent: str = "(none)"

    @property
    def base_absent(self) -> str:
        """What stands where the base has no answer."""
        asked = self.base_reasoning or self.base_answer
        return _no_answer(self.base_reasoning, None, None) if asked else "(not asked)"

    @property
    def before(self) -> str:
        """Title of the base's answer."""
        return "before tuning" + (
            f" (loss of the reference {self.base_loss:.3f})" if self.base_loss is not None else ""
        )

    @property
    def after(self) -> str:
        """Title of the tuned model's answer."""
        return "after tuning" + (f" (loss of the reference {self.loss:.3f})" if self.loss is not None else "")


def answered(results: Path, smoke_test: Stage) -> list[Answered]:
    """The held-out samples that the smoke test recorded, from its record or else from its receipt."""
    kept = collect.result_path(results, smoke_test, "evaluation")
    if kept is None and smoke_test.state == "failed" and not smoke_test.receipt:
        kept = collect.locate(results, str(results / "serve" / "evaluation.jsonl"))
    entries = list(collect.json_lines(kept))
    shown = smoke_test.figures.get("samples")
    if not entries and isinstance(shown, list):
        entries = [mapping(entry) for entry in shown]
    found = [_answered(entry) for entry in entries]
    return [sample for sample in found if sample.question]


def _answered(entry: dict[str, Any]) -> Answered:
    base, reference = mapping(entry.get("base")), mapping(entry.get("reference"))
    expected = entry.get("expected")
    return Answered(
        question=_text(entry.get("question")),
        expected=_text(reference.get("answer") if expected is None else str(expected)).strip(),
        base_reasoning=_text(base.get("reasoning")).strip(),
        base_answer=_text(base.get("answer")).strip(),
        base_loss=_loss(base.get("loss")),
        reasoning=_text(entry.get("reasoning")).strip(),
        answer=_text(entry.get("answer")).strip(),
        loss=_loss(entry.get("loss")),
        absent=_text(entry.get("problem"))
        or _no_answer(_text(entry.get("reasoning")).strip(), entry.get("finish_reason"), entry.get("tokens")),
    )


def _loss(item: Any) -> float | None:
    return float(item) if drawing.is_number(item) else None


def _text(item: Any) -> str:
    return formatting.clean(item if isinstance(item, str) else "", TEXT_LIMIT)
