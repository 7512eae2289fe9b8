"""Whether a model folder can be served, found out in seconds on each node: vLLM says it late and in many words."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .. import families, json_files
from ..convert.base_model import QUANTISATION_FILE
from ..errors import BadInputError, looked_for
from ..tensors.safetensors_files import INDEX_NAME, read_header
from .settings import ServeSettings

THINK_TOKENS = ("<think>", "</think>")
PARSERS_OF_THINK_TOKENS = ("deepseek_r1", "deepseek_v3")


def check(model: Path, settings: ServeSettings) -> None:
    """Raises BadInputError that lists everything wrong with the folder ``model``."""
    if not model.is_dir():
        raise BadInputError(f"the model folder {model} does not exist on this node", looked_for(model))
    problems = list(_problems(model, settings))
    if problems:
        listed = "".join(f"\n  - {problem}" for problem in problems)
        raise BadInputError(
            f"the model folder {model} cannot be served:{listed}",
            "make it again: snakemake --profile <profile> --forcerun convert_checkpoint",
        )


def _problems(model: Path, settings: ServeSettings) -> Iterator[str]:
    config, problem = _json(model / "config.json")
    if problem:
        yield problem
        return
    if families.is_known(config):
        yield from _configuration(model, config)
    longest = config.get("max_position_embeddings")
    if isinstance(longest, int) and settings.max_model_len > longest:
        yield f"config.json: max_position_embeddings is {longest}, below serve.max_model_len {settings.max_model_len}"
    yield from _weights(model)
    yield from _tokenizer(model, config, settings)


def _configuration(model: Path, config: dict[str, Any]) -> Iterator[str]:
    """What vLLM would read otherwise than training did, or end with once it loads the weights."""
    try:
        config = families.checked(config)
    except BadInputError as error:
        yield error.problem
        return
    index, _ = _json(model / INDEX_NAME)
    try:
        held = families.of(config).mtp_layers(config, index.get("weight_map", {}))
    except ValueError as error:
        yield f"the multi-token-prediction layer is not whole: {error}"
        return
    named = config.get("num_nextn_predict_layers") or 0
    if held > named:
        yield f"config.json: num_nextn_predict_layers is {named}, but the weights hold {held} such layers"
    for path in sorted(model.iterdir()):
        if QUANTISATION_FILE.fullmatch(path.name):
            yield f"{path.name} describes another quantisation; vLLM reads it"


def _weights(model: Path) -> Iterator[str]:
    """Every file that the index names is there, whole, and holds the tensors that the index expects in it."""
    expected: dict[str, set[str]] = {}
    if (model / INDEX_NAME).exists():
        index, problem = _json(model / INDEX_NAME)
        if problem:
            yield problem
            return
        for tensor, file in index.get("weight_map", {}).items():
            expected.setdefault(file, set()).add(tensor)
    else:
        expected = {path.name: set() for path in model.glob("*.safetensors")}
    if not expected:
        yield "it has no weights (*.safetensors)"
    for file, tensors in sorted(expected.items()):
        if not (model / file).exists():
            yield f"{file} is missing"
            continue
        try:
            found = read_header(model / file)
        except BadInputError as error:
            yield error.problem.replace(f"{model}/", "")
            continue
        if absent := tensors - set(found):
            yield f"{file} lacks {len(absent)} tensors that {INDEX_NAME} promises, such as {min(absent)}"


def _tokenizer(model: Path, config: dict[str, Any], settings: ServeSettings) -> Iterator[str]:
    """The tokenizer belongs to this model: its ids fit, its special tokens are where the model expects them."""
    tokenizer, problem = _json(model / "tokenizer.json")
    if problem:
        yield problem
        return
    added = {entry.get("content"): entry.get("id") for entry in tokenizer.get("added_tokens", [])}
    vocabulary = tokenizer.get("model", {}).get("vocab", {})
    ids = added | (vocabulary if isinstance(vocabulary, dict) else {})
    largest, size = max(ids.values(), default=-1), config.get("vocab_size")
    if isinstance(size, int) and largest >= size:
        yield f"tokenizer.json has token ids up to {largest}, but the model knows {size} tokens: it is another model's"
    settings_file, problem = _json(model / "tokenizer_config.json")
    if problem:
        yield problem
        return
    ends = config.get("eos_token_id")
    end = settings_file.get("eos_token")
    end = end.get("content") if isinstance(end, dict) else end
    if ends is not None and end is not None and ids.get(end) not in (ends if isinstance(ends, list) else [ends]):
        yield f"the tokenizer's end of sentence {end} has id {ids.get(end)}, but config.json's eos_token_id is {ends}"
    if not settings_file.get("chat_template") and not (model / "chat_template.jinja").exists():
        yield "the tokenizer has no chat template"
    absent = [token for token in THINK_TOKENS if token not in ids]
    if absent and settings.reasoning_parser in PARSERS_OF_THINK_TOKENS:
        parser = settings.reasoning_parser
        yield f"the tokenizer lacks {' and '.join(absent)}, which serve.reasoning_parser {parser} needs"


def _json(path: Path) -> tuple[dict[str, Any], str]:
    """A JSON object, or what is wrong with its file."""
    try:
        value = json_files.load(path)
    except FileNotFoundError:
        return {}, f"{path.name} is missing"
    except (OSError, ValueError) as error:
        return {}, f"{path.name} cannot be read: {error}"
    return (value, "") if isinstance(value, dict) else ({}, f"{path.name} holds no JSON object")
