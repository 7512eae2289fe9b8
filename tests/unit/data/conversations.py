"""Generated conversations, and renderings of them by others: the tokenizer's own template, V3.1's documented form."""

import functools
import json
import random
from typing import Any

import jinja2.sandbox
from hypothesis import strategies as st
from unit.data.helpers import ASSISTANT, BOS, EOS, TOKENIZER, USER, assistant, called, system, tool, user

from deepseek_sft.data.messages import normalise

CUT = "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
plain = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<>｜|"), max_size=40)
WORDS = [
    "The",
    " answer",
    " 3.14",
    "\n\n",
    "中文",
    " naïve",
    "\t",
    "x²",
    "🙂",
    "  ",
    "don't",
    "\r\n",
    "١٢٣",
    "。",
    "e\u0301",
]


def conversation(soup: str, seed: int, *, reasoning: bool = True, tools: bool = False) -> list[dict[str, Any]]:
    """A conversation as train.jsonl holds it, its texts made of ``soup`` and common words; the last turn is trained."""
    chance = random.Random(seed)

    def text() -> str:
        start = chance.randrange(len(soup) + 1)
        own = soup[start : start + chance.randrange(12)]
        made = "".join(chance.choices(WORDS, k=chance.randrange(4))) + own
        return made if made.strip() else f"{made}A"

    def replied(message: dict[str, Any]) -> dict[str, Any]:
        if reasoning and chance.random() < 0.6:
            message["reasoning_content"] = text()
        return message | {"loss": chance.random() < 0.6}

    messages = [system(text())] if chance.random() < 0.5 else []
    for _ in range(chance.randint(1, 3)):
        messages.append(user(text()))
        for _ in range(chance.randrange(3) if tools else 0):
            names = [f"f{chance.randrange(99)}" for _ in range(chance.randint(1, 3))]
            call = called(*names, content=text() if chance.random() < 0.5 else None)
            for one in call["tool_calls"]:
                one["function"]["arguments"] = json.dumps({"x": text()}, ensure_ascii=chance.random() < 0.5)
            messages += [replied(call), *(tool(text() if chance.random() < 0.9 else "") for _ in names)]
        messages.append(replied(assistant(text())))
    messages[-1]["loss"] = True
    return normalise(messages)


def conversations(**options: bool) -> st.SearchStrategy[list[dict[str, Any]]]:
    return st.builds(functools.partial(conversation, **options), plain, st.integers(0, 2**32 - 1))


@functools.cache
def _template(cut: bool) -> Any:
    text = json.loads((TOKENIZER / "tokenizer_config.json").read_text(encoding="utf-8"))["chat_template"]
    assert CUT in text
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(text if cut else text.replace(CUT, ""))


def rendered(messages: list[dict[str, Any]], *, cut: bool = True, prompt: bool = False) -> str:
    """What the tokenizer's own template (R1's) makes of messages; without its cut of reasoning it is V3's."""
    return _template(cut).render(messages=messages, add_generation_prompt=prompt, bos_token=BOS)


def documented_v31(messages: list[dict[str, Any]], *, thinking: bool | None = None) -> str:
    """V3.1's documented form of history; with ``thinking`` the prompt for the next answer follows."""
    text, after_user = BOS, False
    for message in messages:
        role, content = message["role"], message["content"].rpartition("</think>")[2]
        if role == "assistant" and "</think>" in message["content"]:
            content = content.removeprefix("\n\n")
        calls = "".join(
            f"<｜tool▁call▁begin｜>{c['function']['name']}<｜tool▁sep｜>{c['function']['arguments']}<｜tool▁call▁end｜>"
            for c in message.get("tool_calls", [])
        )
        if role == "assistant":
            text += f"{ASSISTANT}</think>" if after_user else ""
            text += content + (f"<｜tool▁calls▁begin｜>{calls}<｜tool▁calls▁end｜>" if calls else "") + EOS
        elif role == "tool":
            text += f"<｜tool▁output▁begin｜>{message['content']}<｜tool▁output▁end｜>"
        else:
            text += (USER if role == "user" else "") + message["content"]
        after_user = role == "user"
    if thinking is not None and after_user:
        text += ASSISTANT + ("<think>" if thinking else "</think>")
    return text
