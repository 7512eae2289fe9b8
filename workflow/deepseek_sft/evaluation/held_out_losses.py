"""The loss on held-out references, of the served model and of the base, in training's own definition.

The mean negative log-probability, in nats, over all tokens that training would learn to predict, given everything
before them. A measurement is kept in a file, so that a base model needs to be measured only once (JSON)::

    {"schema": 1, "digest": name of the token sequences, "measured_by": …, "loss": …, "tokens": …,
     "samples": [{"id", "loss", "tokens"[, "reasoning", "answer", "finish_reason"]}, …]}
"""

import dataclasses
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from .. import files, json_files
from ..errors import BadInputError
from . import answer_fields
from .api import Api, CheckFailed, parsed
from .held_out_tokens import Sequence, digest

SCHEMA = 1
UNUSABLE = "no usable log-probabilities"
ROUNDING = 1e-3  # nats by which rounding may lift a probability above 1
CLAMPED = -1000.0  # nats: vLLM writes -9999 for a probability of 0; logits of a working model differ by some 100
# Tokens from which on equal log-probabilities are no chance (a model that knows a short text by heart has 0 for all).
ALIKE = 64
REQUESTS_AT_ONCE = 4  # each is a prefill that writes out logits of its tokens; more would wait for each other


@dataclasses.dataclass(frozen=True)
class Measurement:
    """Losses of one model on held-out samples, and its answers to them where it was asked.

    Attributes:
        digest: which token sequences were measured.
        measured_by: program and model, in words.
        loss: mean over all tokens.
        tokens: their number.
        samples: id → {"loss", "tokens"[, "reasoning", "answer", "finish_reason"]}.
    """

    digest: str
    measured_by: str
    loss: float
    tokens: int
    samples: dict[str, dict[str, Any]]

    def write(self, path: Path) -> None:
        """Keep it, atomically."""
        value = dataclasses.asdict(self) | {"schema": SCHEMA}
        value["samples"] = [{"id": name} | sample for name, sample in self.samples.items()]
        files.write_json(path, value)

    @classmethod
    def read(cls, path: Path) -> "Measurement":
        """Read what ``write`` wrote; raises BadInputError where the file is no measurement."""
        again = "make it again with workflow/scripts/measure_held_out.py"
        try:
            value = json_files.load(path)
            if value["schema"] != SCHEMA:
                raise ValueError(f"its schema is {value['schema']}, expected {SCHEMA}")
            samples = {sample.pop("id"): sample for sample in value["samples"]}
            if not math.isfinite(float(value["loss"])) or not all(
                isinstance(s["loss"], float) for s in samples.values()
            ):
                raise ValueError("a loss is no finite number")
            return cls(value["digest"], str(value["measured_by"]), float(value["loss"]), int(value["tokens"]), samples)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadInputError(f"{path} is no measurement of held-out samples: {error!r}", again) from None


def measurement(sequences: list[Sequence], logprobs: list[list[float]], measured_by: str) -> Measurement:
    """Losses from the log-probability of every token but the first of each sequence.

    Raises:
        CheckFailed: a log-probability is no finite number.
    """
    samples, total, count = {}, 0.0, 0
    for sequence, row in zip(sequences, logprobs, strict=True):
        learned = [value for value, trained in zip(row, sequence.trained[1:], strict=True) if trained]
        if not all(map(math.isfinite, learned)):
            raise CheckFailed(f"a log-probability of the sample {sequence.id} is not finite")
        samples[sequence.id] = {"loss": round(-sum(learned) / len(learned), 6), "tokens": len(learned)}
        total, count = total - sum(learned), count + len(learned)
    return Measurement(digest(sequences), measured_by, round(total / count, 6), count, samples)


def served_logprobs(api: Api, sequences: list[list[int]], concurrency: int) -> list[list[float]]:
    """Log-probability that the server gives to every token but the first, sent as prompts.

    Raises:
        CheckFailed: a request is refused, or the answer does not fit the prompt.
    """

    def ask(sequence: list[int]) -> list[float]:
        # One token must be asked for; with the sequence as prompt, the template's tokens get their probability too.
        body = {"model": api.model, "prompt": sequence, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
        return _prompt_logprobs(parsed(api.post("/v1/completions", body)), sequence)

    with ThreadPoolExecutor(min(concurrency, REQUESTS_AT_ONCE)) as pool:
        return list(pool.map(ask, sequences))


def _prompt_logprobs(completion: dict[str, Any], sequence: list[int]) -> list[float]:
    """Log-probability of every token of ``sequence`` but the first, which has nothing before it."""
    choice = answer_fields.objects(completion, "choices")[0]
    entries = choice.get("prompt_logprobs")
    if not isinstance(entries, list) or len(entries) != len(sequence):
        found = f"{len(entries)} entries" if isinstance(entries, list) else answer_fields.shown(entries)
        raise CheckFailed(f"{UNUSABLE}: they do not fit the prompt of {len(sequence)} tokens: {found}")
    found = []
    for token, entry in zip(sequence[1:], entries[1:], strict=True):
        try:
            found.append(answer_fields.number(answer_fields.mapping(entry, str(token)), "logprob"))
        except CheckFailed as failure:
            raise CheckFailed(f"{UNUSABLE}: they do not fit the prompt: {failure}") from None
    _check_possible(found)
    return found


def _check_possible(values: list[float]) -> None:
    """Refuse what no softmax gives, and what stands in for it."""
    for value in values:
        if not math.isfinite(value):
            raise CheckFailed(f"{UNUSABLE}: {value} is not finite")
        if value > ROUNDING:
            raise CheckFailed(f"{UNUSABLE}: {value:g} is above 0, which no probability has")
        if value <= CLAMPED:
            raise CheckFailed(f"{UNUSABLE}: {value:g} stands for the probability 0, which a softmax never gives")
    if len(values) >= ALIKE and len(set(values)) == 1:
        raise CheckFailed(f"{UNUSABLE}: all {len(values)} tokens of a sequence have {values[0]:g}")


def check_sane(loss: float, vocabulary: int | None) -> None:
    """Refuse a loss that only a broken model has: one that guesses evenly over its vocabulary knows more.

    Raises:
        CheckFailed: says so.
    """
    if not loss >= -ROUNDING:
        raise CheckFailed(f"the loss is {loss:.4f}, and none is below 0")
    if vocabulary and not loss < math.log(vocabulary):
        raise CheckFailed(
            f"the loss is {loss:.4f}, and guessing evenly over {vocabulary:,} tokens has {math.log(vocabulary):.4f}: "
            "the served weights are not a trained model"
        )
