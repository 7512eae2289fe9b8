"""Gates of the smoke test that cannot be judged with the inputs it is given: known in a second, before anything runs.

Only what is certain is told. Of a large file of prompts the first ``READ_BYTES`` are read, which may prove that a gate
can be judged and never that it cannot.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..data.tokenizer_files import vocabulary_file
from ..settings import field_types
from ..settings.smoke_test import SmokeTest
from .held_out import Prompt, parse_prompts, read_lines
from .held_out_losses import Measurement
from .held_out_tokens import sequences

READ_BYTES = 8 << 20
LONG_CHARACTERS = 2  # for each token of the context: only references longer than this are tokenised to see if they fit
NEEDS = {  # gate → what it is judged on
    "min_format_rate": "prompts",
    "min_exact_match_rate": "expected answers",
    "max_loss": "references",
    "min_loss_drop": "references",
    "base_measured": "references",
}
GIVE = {
    "prompts": "name a file of held-out samples in smoke_test.prompts",
    "expected answers": "give prompts an `answer` or a reference",
    "references": "end `messages` of the prompts with the assistant's answer, as in training data",
    "base's loss": "measure the base with workflow/scripts/measure_held_out.py and name its file in base_measured",
}


@dataclasses.dataclass(frozen=True)
class Problem:
    """A gate that is set and cannot be judged: why, and what to change."""

    text: str
    fix: str


def gates_set(smoke: dict[str, Any]) -> list[str]:
    """Gates that somebody has set: those that are wanted and not at their default."""
    known = field_types.keys(SmokeTest)
    return [key for key in NEEDS if smoke[key] is not None and smoke[key] != known[key].default]


def problems(
    config: dict[str, Any], tokenizer: Path | None = None, parameters: Callable[[], int] | None = None
) -> list[Problem]:
    """Every gate of the smoke test that is set and could not be judged after the training.

    Args:
        config: the resolved configuration.
        tokenizer: folder with the tokenizer, where there is one already: tells whether long references fit the context.
        parameters: counts the model's parameters; None where that is not known.

    Raises:
        BadInputError: the prompts or the base's measurement cannot be read; names file and line.
    """
    smoke = config["smoke_test"]
    wanted = gates_set(smoke)
    if not smoke["prompts"]:
        return [_problem(wanted, smoke, "smoke_test.prompts is null", "prompts")] if wanted else []
    prompts, whole = _read(Path(smoke["prompts"]))
    found = []
    for need in GIVE if whole else ():
        keys = [key for key in wanted if NEEDS[key] == need]
        if keys and (lack := _lack(need, prompts, config, tokenizer)):
            found.append(_problem(keys, smoke, lack, need))
    if smoke["base_measured"]:
        found += _other_samples(smoke, prompts) if whole and not found else []
    elif "min_loss_drop" in wanted and parameters and parameters() > smoke["logprobs_max_parameters"]:
        why = "the model is larger than logprobs_max_parameters and smoke_test.base_measured is null"
        found.append(_problem(["min_loss_drop"], smoke, f"the base's loss will not be known: {why}", "base's loss"))
    return found


def _read(path: Path) -> tuple[list[Prompt], bool]:
    """The prompts of a file, and whether these are all."""
    lines, whole = read_lines(path, READ_BYTES)
    return parse_prompts(lines, path), whole


def _lack(need: str, prompts: list[Prompt], config: dict[str, Any], tokenizer: Path | None) -> str:
    """What the prompts have none of; empty if they have it."""
    path = config["smoke_test"]["prompts"]
    if need == "expected answers" and all(prompt.answer is None for prompt in prompts):
        return f"no sample of {path} has an expected answer"
    if need != "references":
        return ""
    referenced = [prompt for prompt in prompts if prompt.reference is not None]
    if not referenced:
        return f"no sample of {path} has a reference (a last message of the assistant)"
    context = config["serve"]["max_model_len"]
    shortest = min(referenced, key=_characters)
    if _characters(shortest) <= LONG_CHARACTERS * context or not tokenizer or not vocabulary_file(tokenizer).exists():
        return ""
    if any(sequences([prompt], tokenizer, config["data"]["template"], context - 1) for prompt in referenced):
        return ""
    return f"no reference of {path} fits serve.max_model_len: {context} with its prompt"


def _characters(prompt: Prompt) -> int:
    return sum(len(message["content"] or "") for message in prompt.messages) + len(prompt.reference or "")


def _other_samples(smoke: dict[str, Any], prompts: list[Prompt]) -> list[Problem]:
    """The base's measurement speaks of samples that these prompts do not have."""
    measured = Measurement.read(Path(smoke["base_measured"]))
    others = sorted(set(measured.samples) - {prompt.id for prompt in prompts if prompt.reference is not None})
    if not others:
        return []
    return [
        Problem(
            f"smoke_test.base_measured: {smoke['base_measured']} was measured on other samples than "
            f"{smoke['prompts']}: {', '.join(others[:5])}{' …' if len(others) > 5 else ''}",
            GIVE["base's loss"] + f"; or switch off: {_off('base_measured')}",
        )
    ]


def _problem(keys: list[str], smoke: dict[str, Any], why: str, need: str) -> Problem:
    said = " and ".join(f"smoke_test.{key}: {smoke[key]}" for key in keys)
    return Problem(f"{said} cannot be judged: {why}", f"{GIVE[need]}; or switch off: {_off(*keys)}")


def _off(*keys: str) -> str:
    return f"smoke_test: {{{', '.join(f'{key}: null' for key in keys)}}}"
