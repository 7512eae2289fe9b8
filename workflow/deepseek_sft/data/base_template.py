"""The chat template that comes with a tokenizer, rendered as servers render it.

Where it lies and how it is chosen follows transformers (``PreTrainedTokenizerBase.from_pretrained``,
``get_chat_template``, ``chat_template_utils``): ``chat_template.jinja`` and ``additional_chat_templates/*.jinja``
before ``chat_template`` of tokenizer_config.json, which is text, or named templates of which requests with tools take
``tool_use``; Jinja in a sandbox (``template_process``).
"""

import functools
import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import json_files
from ..errors import BadInputError
from .chat_templates import USER, Piece
from .template_child import BEGIN, END
from .template_process import TemplateError, TemplateSyntaxError, compile_only, render

DEFAULT, WITH_TOOLS = "default", "tool_use"
FILE, FOLDER = "chat_template.jinja", "additional_chat_templates"
MARK = "where the first question stands"
HELD = "\U000f5e17"  # stands for the first character of a control token that a person typed


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template.

    Args:
        source: the file it was read from.
        named: Jinja text by name; one template alone is ``default``.
        tokens: special tokens by name, such as ``bos_token``.
    """

    source: Path
    named: tuple[tuple[str, str], ...]
    tokens: tuple[tuple[str, str], ...]

    def render(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: Any = None,
        prompt: bool = False,
        marks: bool = False,
        **options: Any,
    ) -> str:
        """The text of messages in OpenAI's form.

        Args:
            tools: definitions of tools; None without.
            prompt: whether the start of an answer follows.
            marks: whether what ``{% generation %}`` marks stands between ``BEGIN`` and ``END``.
            options: further variables of the template, such as ``thinking``.

        Raises:
            TemplateError: the template refuses them, or fails.
        """
        named = dict(self.named)
        text = named[WITH_TOOLS] if tools is not None and WITH_TOOLS in named else named.get(DEFAULT)
        if text is None:
            raise TemplateError(f"{self.source} names the templates {', '.join(named)}, and none is {DEFAULT}")
        given = {"messages": messages, "tools": tools, "documents": None, "add_generation_prompt": prompt}
        try:
            shown = render(text, dict(self.tokens) | options | given)
        except TemplateSyntaxError as error:
            raise TemplateError(str(error)) from None
        return shown if marks else shown.replace(BEGIN, "").replace(END, "")

    def system_with_tools(self, system: str, tools: list[Any], control: Collection[str]) -> list[Piece] | None:
        """What stands between the begin-of-sentence token and the first question where tools are given.

        Args:
            system: the system text; empty without.
            tools: definitions of tools in OpenAI's form.
            control: names of control tokens. Those that the template writes are such; those typed by people stay text.

        Returns:
            None where the template shows no definitions.

        Raises:
            TemplateError: the template refuses them, or shows them elsewhere.
        """
        held = [_hold(system, control), json.loads(_hold(json.dumps(tools, ensure_ascii=False), control))]
        opening, ending = self._around(*held)
        if (opening, ending) == self._around(held[0], None):
            return None
        if ending != self._around(held[0], None)[1]:
            raise TemplateError("it shows definitions of tools elsewhere than before the first question")
        return [
            Piece(piece.text.replace(HELD, "<"), control=piece.control) for piece in pieces_of_text(opening, control)
        ]

    def _around(self, system: str, tools: Any) -> tuple[str, str]:
        """What stands before and after the first question."""
        messages = [{"role": "system", "content": system}] if system else []
        text = self.render([*messages, {"role": "user", "content": MARK}], tools=tools)
        opening, found, ending = text.rpartition(f"{USER}{MARK}")
        begin = dict(self.tokens).get("bos_token", "")
        if not found or not opening.startswith(begin):
            raise TemplateError("it does not write a question as DeepSeek's templates do")
        return opening.removeprefix(begin), ending


def read_chat_template(folder: Path) -> ChatTemplate | None:
    """The chat template of a folder with a tokenizer; None where it has none.

    Raises:
        BadInputError: a file cannot be read, or is no Jinja.
    """
    path = folder / "tokenizer_config.json"
    try:
        config = json_files.load(path)
        files = {DEFAULT: folder / FILE} if (folder / FILE).is_file() else {}
        files |= {file.stem: file for file in sorted((folder / FOLDER).glob("*.jinja"))}
        named = {name: file.read_text(encoding="utf-8") for name, file in files.items()}
        if not isinstance(config, dict):
            raise ValueError("it is no JSON object")
    except (OSError, ValueError) as error:
        raise BadInputError(f"the chat template in {folder} cannot be read: {error}", "copy its files again") from None
    source = next(iter(files.values()), path)
    if not named:
        given = config.get("chat_template")
        if isinstance(given, list):
            given = {one.get("name"): one.get("template") for one in given if isinstance(one, dict)}
        named = given if isinstance(given, dict) else {DEFAULT: given} if given else {}
    try:
        for text in named.values():
            if not isinstance(text, str):
                raise TemplateSyntaxError("it is no text")
            compile_only(text)
    except (TemplateSyntaxError, TemplateError) as error:
        raise BadInputError(
            f"the chat template in {source} is no Jinja template: {error}", "copy the file again"
        ) from None
    tokens = {name: token_name(config, name) for name in config if name.endswith("_token") and config[name] is not None}
    return ChatTemplate(source, tuple(named.items()), tuple(tokens.items())) if named else None


def token_name(config: dict[str, Any], name: str) -> str:
    """A special token of tokenizer_config.json, which writes it as text or as an object."""
    value = config.get(name)
    return str(value.get("content") if isinstance(value, dict) else value)


def pieces_of_text(text: str, control: Collection[str]) -> list[Piece]:
    """Rendered text taken apart at its control tokens, as a server's tokenizer reads it."""
    parts = _any_of(frozenset(control)).split(text) if control else [text]
    return [Piece(part, control=number % 2 == 1) for number, part in enumerate(parts) if part]


@functools.lru_cache(maxsize=4)
def _any_of(control: frozenset[str]) -> re.Pattern[str]:
    names = "|".join(re.escape(name) for name in sorted(control, key=len, reverse=True))
    return re.compile(f"({names})")


def _hold(text: str, control: Collection[str]) -> str:
    if HELD in text:
        raise TemplateError(f"the text holds the character U+{ord(HELD):X}, which is needed to keep it apart")
    for name in control:
        text = text.replace(name, HELD + name[1:]) if name.startswith("<") else text
    return text
