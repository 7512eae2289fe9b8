"""vLLM's parsers of a model, by the row of its family: what ``auto`` in the settings stands for.

A served folder says of its family only what its tokenizer and chat template say (config.json is DeepSeek-V3's for all):
which control tokens there are, and how the template writes reasoning.
"""

import dataclasses
from pathlib import Path

from ..data.base_template import read_chat_template
from ..data.messages import THINK_CLOSE
from ..data.tokenizer_files import control_tokens, vocabulary_file
from ..errors import BadInputError
from ..families import rows
from ..settings.serve import AUTO
from .settings import ServeSettings


def settled(settings: ServeSettings, model: Path) -> ServeSettings:
    """Settings whose parsers have names, or are none.

    Raises:
        BadInputError: ``auto``, and no row has the folder's tokens, or its family writes calls in no form that vLLM
            reads.
    """
    if AUTO not in (settings.reasoning_parser, settings.tool_call_parser):
        return settings
    found = of_folder(model)
    reasoning, tools = settings.reasoning_parser, settings.tool_call_parser
    if tools == AUTO and not found.tools:
        raise BadInputError(
            f"serve.tool_call_parser: auto: no row of families/rows.py names a parser for the tokens of {model}",
            "name vLLM's parser of this model, or null",
        )
    return dataclasses.replace(
        settings,
        reasoning_parser=(found.reasoning or None) if reasoning == AUTO else reasoning,
        tool_call_parser=found.tools if tools == AUTO else tools,
    )


def of_folder(model: Path) -> rows.Parsers:
    """The parsers of a model's family; for reasoning none where its template writes no tags of thinking.

    Raises:
        BadInputError: the folder has no tokenizer, or it cannot be read.
    """
    if not vocabulary_file(model).exists():
        raise BadInputError(f"{model} has no tokenizer to know its family by", "name vLLM's parsers, or null")
    tokens = control_tokens(model)
    chat = read_chat_template(model)
    template = "".join(text for _, text in chat.named) if chat else ""
    found = rows.parsers_of(tokens, template)
    thinks = THINK_CLOSE in tokens and THINK_CLOSE in template
    return found if thinks else dataclasses.replace(found, reasoning="")
