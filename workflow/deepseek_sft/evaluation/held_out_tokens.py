"""Held-out samples as the token sequences that training would see: what losses are measured on."""

import dataclasses
from pathlib import Path

from .. import files
from ..data import template_check
from ..data.chat_templates import AUTO, NO_LOSS, TEMPLATES
from ..data.encoding import load_encoder
from ..data.samples import Settings, make_samples
from ..errors import BadInputError
from ..settings.smoke_settings import SmokeSettings
from .held_out import PLACEHOLDER, Prompt

GENERATION_PROMPT = 2  # tokens that a chat template may add to the prompt as the start of the answer: `<think>\n`


@dataclasses.dataclass(frozen=True)
class Sequence:
    """One sample.

    Attributes:
        id: the prompt's.
        ids: all token ids, those of the prompt first.
        prompt_length: number of them that the server is given.
        trained: for each token, whether training would learn to predict it.
    """

    id: str
    ids: list[int]
    prompt_length: int
    trained: list[bool]

    @property
    def trained_tokens(self) -> int:
        """Tokens that the loss is the mean over."""
        return sum(self.trained)


def settled(settings: SmokeSettings, folder: Path | str | None) -> SmokeSettings:
    """Settings whose template has a name: ``auto`` is the one that fits the chat template of the model's folder.

    Raises:
        BadInputError: none fits, or no folder is at hand.
    """
    if settings.template != AUTO:
        return settings
    if folder is None:
        raise BadInputError(
            "template auto needs the model's folder to choose by", f"name one of {', '.join(TEMPLATES)}"
        )
    return dataclasses.replace(settings, template=template_check.settle(AUTO, Path(folder)))


def sequences(prompts: list[Prompt], tokenizer: Path, template: str, max_length: int) -> list[Sequence]:
    """Sequences of the prompts that have a reference, rendered as ``tokenize_data`` renders training data.

    History shows what the serving template shows (the policy ``split``), whatever training's policy was. Samples longer
    than ``max_length`` tokens are left out.

    Raises:
        BadInputError: a sample that training would reject, or a tokenizer that does not fit the template.
    """
    referenced = [prompt for prompt in prompts if prompt.reference is not None]
    return [made for made in _render(referenced, tokenizer, template) if len(made.ids) <= max_length]


def expected_prompt(prompt: Prompt, tokenizer: Path, template: str) -> list[tuple[list[int], int]]:
    """What a server may render of a prompt: a start of the token ids given here, of at least the length beside them.

    Where the sample has no reference, templates that render thinking and plain answers differently allow both.
    """
    if prompt.reference is not None:
        variants = [prompt]
    else:
        texts = (PLACEHOLDER["content"], f"<think>\n.\n</think>\n\n{PLACEHOLDER['content']}")
        variants = [dataclasses.replace(prompt, reference=text) for text in texts]
    made = _render(variants, tokenizer, template)
    return [(one.ids[: one.prompt_length + GENERATION_PROMPT], one.prompt_length) for one in made]


def digest(made: list[Sequence]) -> str:
    """Name of exactly these token sequences: only losses that share it are comparable."""
    return files.digest([[one.id, one.ids, one.trained] for one in made])


def _render(prompts: list[Prompt], tokenizer: Path, template: str) -> list[Sequence]:
    encoder = load_encoder(tokenizer, template)
    records = [
        {"id": prompt.id, "messages": [*_history(prompt), _answer(prompt.reference or "")]} for prompt in prompts
    ]
    rendered = []
    for prompt, made in zip(prompts, make_samples(records, encoder, Settings(template, 1 << 30)), strict=True):
        if len(made.samples) != 1:
            reason = "; ".join(f"{reason}: {message}" for _, reason, message in made.rejects)
            raise BadInputError(f"held-out sample {prompt.id} cannot be rendered: {reason}")
        sample = made.samples[0]
        trained = (sample.labels != NO_LOSS).tolist()
        rendered.append(Sequence(prompt.id, sample.input_ids.tolist(), trained.index(True), trained))
    return rendered


def _history(prompt: Prompt) -> list[dict]:
    """The messages before the reference: none of them carries loss."""
    return [message | {"loss": False} if message["role"] == "assistant" else message for message in prompt.messages]


def _answer(reference: str) -> dict:
    return {"role": "assistant", "content": reference, "loss": True}
