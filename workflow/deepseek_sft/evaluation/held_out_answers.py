"""The held-out samples answered by the served model: rates, gates, and a record of every sample.

Record (``serve/evaluation.jsonl``, one sample a line)::

    {"id", "question", "expected", "reference": {"reasoning", "answer"} or null,
     "reasoning", "answer", "finish_reason", "tokens", "well_formed", "matches" (null without an expected answer),
     "loss" (null where not measured), "base": {"loss"[, "reasoning", "answer"]} or null[, "problem"]}
"""

import dataclasses
import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from .. import files
from ..cli import say
from ..data.messages import split_reasoning
from . import template_tokens
from .api import CheckFailed, CheckSkipped, Reply
from .held_out import Prompt, final_answer, matches, well_formed
from .held_out_losses import Measurement, check_sane
from .server_checks import Context

PROGRESS_EVERY_S = 10
NAMED = 10  # samples that a failed check names
IN_RECEIPT = 8
RECEIPT_CHARACTERS = 2000  # of one text in the receipt; the record has all


@dataclasses.dataclass
class Evaluation:
    """Answers to the held-out samples.

    Attributes:
        prompts, replies: asked and answered, in the file's order; a refused request is an empty reply.
        problems: sample → why its request failed.
        tokens: finds tokens of the chat template in an answer's text.
        tuned, base: losses of the served model and of the base, once measured.
    """

    prompts: list[Prompt]
    replies: list[Reply]
    problems: dict[str, str]
    reasoning_parser: str | None
    tokens: re.Pattern[str] = template_tokens.IN_BARS
    tuned: Measurement | None = None
    base: Measurement | None = None

    @property
    def formed(self) -> list[bool]:
        """For each sample, whether its answer is well formed."""
        return [well_formed(reply, self.reasoning_parser, self.tokens) for reply in self.replies]

    @property
    def matched(self) -> list[bool | None]:
        """For each sample, whether its answer is the expected one; None where none is expected."""
        pairs = zip(self.prompts, self.replies, strict=True)
        return [
            None if prompt.answer is None else matches(final_answer(reply, self.reasoning_parser), prompt.answer)
            for prompt, reply in pairs
        ]

    def figures(self) -> dict[str, Any]:
        """Rates for the receipt."""
        judged = [match for match in self.matched if match is not None]
        return {
            "prompts": len(self.prompts),
            "format_rate": _rate(self.formed),
            "exact_match_rate": _rate(judged) if judged else None,
        }

    def records(self) -> list[dict[str, Any]]:
        """One record for each sample; see the module."""
        rows = zip(self.prompts, self.replies, self.formed, self.matched, strict=True)
        return [self._record(*row) for row in rows]

    def _record(self, prompt: Prompt, reply: Reply, formed: bool, matched: bool | None) -> dict[str, Any]:
        tuned = self.tuned.samples.get(prompt.id) if self.tuned else None
        base = self.base.samples.get(prompt.id) if self.base else None
        reference = (
            dict(zip(("reasoning", "answer"), split_reasoning(prompt.reference), strict=True))
            if (prompt.reference is not None)
            else None
        )
        record = {
            "id": prompt.id,
            "question": prompt.question,
            "expected": prompt.answer,
            "reference": reference,
            "reasoning": reply.reasoning,
            "answer": reply.answer,
            "finish_reason": reply.finish_reason,
            "tokens": reply.completion_tokens,
            "well_formed": formed,
            "matches": matched,
            "loss": tuned["loss"] if tuned else None,
            "base": {name: base[name] for name in ("loss", "reasoning", "answer") if name in base} if base else None,
        }
        return record | ({"problem": self.problems[prompt.id]} if prompt.id in self.problems else {})

    def write(self, path: Path) -> None:
        """Keep the records of all samples, atomically."""
        files.write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in self.records()))

    def shown(self) -> list[dict[str, Any]]:
        """The first records, their texts cut, for the receipt."""
        return [_cut(record) for record in self.records()[:IN_RECEIPT]]


def ask_all(context: Context) -> Evaluation:
    """Have all samples answered, ``concurrency`` at a time.

    Raises:
        httpx.HTTPError: no sample was answered at all, the last error.
    """

    def ask(prompt: Prompt) -> Reply | Exception:
        try:
            return context.ask(prompt)
        except (CheckFailed, httpx.HTTPError) as error:
            return error

    results, said = [], time.monotonic()
    with ThreadPoolExecutor(context.settings.concurrency) as pool:
        for result in pool.map(ask, context.prompts):
            results.append(result)
            if time.monotonic() - said > PROGRESS_EVERY_S:
                said = time.monotonic()
                say(f"  … {len(results)} of {len(context.prompts)} held-out prompts answered")
    errors = {p.id: result for p, result in zip(context.prompts, results, strict=True) if isinstance(result, Exception)}
    broken = [error for error in errors.values() if isinstance(error, httpx.HTTPError)]
    if len(broken) == len(results):
        raise broken[-1]
    replies = [Reply() if isinstance(result, Exception) else result for result in results]
    problems = {name: str(error) or repr(error) for name, error in errors.items()}
    return Evaluation(context.prompts, replies, problems, context.reasoning_parser, context.template_tokens)


def held_out_format(context: Context, evaluation: Evaluation) -> str:
    """Enough held-out prompts get closed reasoning, then an answer, then the end."""
    formed, bound = evaluation.formed, context.settings.min_format_rate
    if bound is not None and sum(formed) / len(formed) < bound:
        bad = [prompt.id for prompt, good in zip(evaluation.prompts, formed, strict=True) if not good]
        first = next(iter(evaluation.problems.items()), None)
        problem = f"; {len(evaluation.problems)} requests failed, first {first[0]}: {first[1]}" if first else ""
        raise CheckFailed(
            f"{sum(formed)} of {len(formed)} well formed = {sum(formed) / len(formed):.3f}, expected at least "
            f"{bound}; not: {', '.join(bad[:NAMED])}{problem}"
        )
    return f"{sum(formed)} of {len(formed)} well formed"


def held_out_exact_match(context: Context, evaluation: Evaluation) -> str:
    """Enough answers are the expected ones."""
    judged = [
        (prompt.id, match)
        for prompt, match in zip(evaluation.prompts, evaluation.matched, strict=True)
        if match is not None
    ]
    if not judged:
        raise CheckSkipped("no held-out sample has an expected answer")
    right, bound = sum(match for _, match in judged), context.settings.min_exact_match_rate
    if bound is None:
        return f"{right} of {len(judged)} as expected; no bound is set"
    if right / len(judged) < bound:
        wrong = [name for name, match in judged if not match]
        raise CheckFailed(
            f"{right} of {len(judged)} as expected = {right / len(judged):.3f}, expected at least {bound}; "
            f"not: {', '.join(wrong[:NAMED])}"
        )
    return f"{right} of {len(judged)} as expected"


def held_out_loss(context: Context, evaluation: Evaluation) -> str:
    """The served model's loss on the references is one that a trained model can have, and below its bound."""
    tuned, bound = evaluation.tuned, context.settings.max_loss
    check_sane(tuned.loss, context.model.vocabulary() if context.model else None)
    text = f"{tuned.loss:.4f} over {tuned.tokens} tokens of {len(tuned.samples)} samples"
    if bound is not None and not tuned.loss <= bound:
        raise CheckFailed(f"{text}, expected at most {bound}")
    return text


def loss_drop(context: Context, evaluation: Evaluation) -> str:
    """Tuning made the references more likely than the base finds them."""
    tuned, base, bound = evaluation.tuned, evaluation.base, context.settings.min_loss_drop
    if tuned.digest != base.digest:
        raise CheckFailed(
            "the base was measured on other token sequences (samples, template or context differ); measure it again"
        )
    better = sum(sample["loss"] < base.samples[name]["loss"] for name, sample in tuned.samples.items())
    text = (
        f"{base.loss:.4f} → {tuned.loss:.4f}, lower for {better} of {len(tuned.samples)} samples; base measured by "
        f"{base.measured_by}"
    )
    if bound is not None and not base.loss - tuned.loss > bound:
        raise CheckFailed(f"{text}; expected a drop of more than {bound}")
    return text


def _rate(verdicts: list[bool]) -> float:
    return round(sum(verdicts) / len(verdicts), 4)


def _cut(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _cut(entry) for name, entry in value.items()}
    if isinstance(value, str) and len(value) > RECEIPT_CHARACTERS:
        return value[:RECEIPT_CHARACTERS] + "…"
    return value
