"""The small base model before tuning, computed by transformers: its loss on the references, and some of its answers."""

from pathlib import Path

from tokenizers import Tokenizer

from ..data.messages import THINK_CLOSE, THINK_OPEN
from ..data.templates import END
from . import losses
from .checks import Context
from .comparison import Job
from .held_out_tokens import Sequence
from .losses import Measurement

ANSWERS = 4  # prompts the base answers, for people to read
ANSWER_TOKENS = 64


def base_job(context: Context, base: Path, dtype: str, samples: list[Sequence]) -> Job:
    """What transformers computes of the base."""
    prompts = [sample.ids[: sample.prompt_length] for sample in samples[:ANSWERS]]
    tokens = min(ANSWER_TOKENS, context.max_tokens)
    ends = context.model.eos_token_ids() or [0]
    return Job(str(base), dtype, [sample.ids for sample in samples], prompts, tokens, ends)


def base_measurement(samples: list[Sequence], logprobs: list[list[float]], base: Path, dtype: str) -> Measurement:
    """The base's losses from what transformers computed."""
    return losses.measurement(samples, logprobs, f"transformers in {dtype}, {base}")


def base_answers(context: Context, measured: Measurement, samples: list[Sequence], generated: list[list[int]]) -> None:
    """Add the base's answers to its measurement, split as the server's parser splits them."""
    tokenizer = Tokenizer.from_file(str(context.model.path / "tokenizer.json"))
    for sample, ids in zip(samples, generated, strict=False):
        text = tokenizer.decode(ids, skip_special_tokens=False).removesuffix(END)
        # Without a closing tag everything is reasoning, as for vLLM's parser.
        reasoning, _, answer = text.removeprefix(THINK_OPEN).partition(THINK_CLOSE)
        if not context.reasoning_parser:
            reasoning, answer = "", text
        measured.samples[sample.id] |= {"reasoning": reasoning, "answer": answer}
