"""The base model before tuning: its loss on the held-out references, and its answers.

A small one is computed by transformers within the smoke test. Of a large one, a deployment is measured once
(``measure_served``); its file serves every experiment with this base, these samples and this template.
"""

from pathlib import Path

import httpx
from tokenizers import Tokenizer

from ..data.messages import THINK_CLOSE, THINK_OPEN
from ..data.tokenizer_files import tokenizer_text
from ..errors import BadInputError, CrashError
from ..settings.smoke_settings import SmokeSettings
from . import held_out_answers, held_out_losses, server_checks
from .api import Api, CheckFailed
from .held_out import read_prompts
from .held_out_losses import Measurement
from .held_out_tokens import Sequence, sequences, settled
from .server_checks import Context
from .transformers_comparison import Job, ModelFolder

ANSWERS = 4  # prompts that a small base answers, for people to read
ANSWER_TOKENS = 64


def base_job(context: Context, base: Path, dtype: str, samples: list[Sequence]) -> Job:
    """What transformers computes of the base."""
    prompts = [sample.ids[: sample.prompt_length] for sample in samples[:ANSWERS]]
    tokens = min(ANSWER_TOKENS, context.max_tokens)
    ends = context.model.eos_token_ids() or [0]
    return Job(str(base), dtype, [sample.ids for sample in samples], prompts, tokens, ends)


def base_measurement(samples: list[Sequence], logprobs: list[list[float]], base: Path, dtype: str) -> Measurement:
    """The base's losses from what transformers computed."""
    return held_out_losses.measurement(samples, logprobs, f"transformers in {dtype}, {base}")


def base_answers(context: Context, measured: Measurement, samples: list[Sequence], generated: list[list[int]]) -> None:
    """Add the base's answers to its measurement, split as the server's parser splits them."""
    tokenizer = Tokenizer.from_str(tokenizer_text(context.model.path))
    ends = context.model.eos_token_ids()
    for sample, ids in zip(samples, generated, strict=False):
        written = ids[:-1] if ids and ids[-1] in ends else ids
        text = tokenizer.decode(written, skip_special_tokens=False)
        # Without a closing tag everything is reasoning, as for vLLM's parser.
        reasoning, _, answer = text.removeprefix(THINK_OPEN).partition(THINK_CLOSE)
        if not context.reasoning_parser:
            reasoning, answer = "", text
        measured.samples[sample.id] |= {"reasoning": reasoning, "answer": answer}


def measure_served(
    url: str,
    model: str,
    tokenizer: Path,
    settings: SmokeSettings,
    *,
    reasoning_parser: str | None,
    answers: bool = True,
    api_key: str = "",
) -> Measurement:
    """Measure a served model on ``settings.prompts``, rendered in ``settings.template``.

    Args:
        tokenizer: folder with the model's tokenizer.
        answers: whether it also answers the prompts, for the report's comparison.

    Raises:
        BadInputError: no sample has a reference, the server offers another model, or it refuses a request.
        CrashError: the server went away.
    """
    settings = settled(settings, tokenizer)
    prompts = read_prompts(Path(settings.prompts))
    api = Api(url, model, settings.request_timeout_s, api_key)
    model = ModelFolder(tokenizer)
    context = Context(api, settings, reasoning_parser, prompts, held_out=True, model=model)
    try:
        server_checks.model_name(context)
        samples = sequences(prompts, tokenizer, settings.template, context.max_model_len - 1)
        if not samples:
            raise BadInputError(
                f"{settings.prompts}: no sample has a reference that fits the context",
                "end `messages` with the assistant's answer, as in training data",
            )
        logprobs = held_out_losses.served_logprobs(api, [sample.ids for sample in samples], settings.concurrency)
        measured = held_out_losses.measurement(samples, logprobs, f"{model} served at {url}")
        asked = held_out_answers.ask_all(context) if answers else None
        if asked and asked.problems:
            name, why = next(iter(asked.problems.items()))
            raise CheckFailed(f"{len(asked.problems)} requests got no answer, first {name}: {why}")
    except CheckFailed as failure:
        raise BadInputError(f"{model} at {url} cannot be measured: {failure}") from None
    except httpx.HTTPError as error:
        raise CrashError(f"{url} does not answer: {error!r}") from None
    finally:
        api.close()
    for prompt, reply in zip(asked.prompts, asked.replies, strict=True) if asked else ():
        if prompt.id in measured.samples:
            measured.samples[prompt.id] |= {"reasoning": reply.reasoning, "answer": reply.answer}
    return measured
