"""Chat templates of the releases, and folders of a base with one of them.

They are written from R1's own, which comes with the tests' tokenizer, by what sets them apart; V3.1's by its own form.
"""

import functools
import json
import shutil
from pathlib import Path
from typing import Any

from unit.data.conversations import CUT
from unit.data.helpers import TOKENIZER

from deepseek_sft.data.base_template import ChatTemplate, read_chat_template

CONFIG = json.loads((TOKENIZER / "tokenizer_config.json").read_text(encoding="utf-8"))
R1 = CONFIG["chat_template"]


def _changed(text: str, *changes: tuple[str, str]) -> str:
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new)
    return text


# A round of calls is opened anew, after the outputs before it are closed; the question brings the assistant's token.
_ROUNDS = (
    ("{{'<｜User｜>' + message['content']}}", "{{'<｜User｜>' + message['content'] + '<｜Assistant｜>'}}"),
    (
        "'<｜Assistant｜>' + message['content'] + '<｜tool▁calls▁begin｜>",
        "message['content'] + '<｜tool▁calls▁begin｜>",
    ),
    ("'<｜Assistant｜><｜tool▁calls▁begin｜>", "'<｜tool▁calls▁begin｜>"),
    (
        "'tool_calls' in message %}{%- set ns.is_tool = false -%}",
        "'tool_calls' in message %}{%- if ns.is_tool %}{{'<｜tool▁outputs▁end｜>'}}{%- endif %}"
        "{%- set ns.is_tool = false -%}{%- set ns.is_first = false %}{%- set ns.is_output_first = true %}",
    ),
    ("{{'<｜Assistant｜>' + content + ", "{{content + "),
    ("{{'<｜tool▁output▁begin｜>' + ", "{{'\\n<｜tool▁output▁begin｜>' + "),
    ("add_generation_prompt and not ns.is_tool %}", "add_generation_prompt and false %}"),
)
_CUT_EARLY = (
    "{%- for message in messages %}{%- if message['role'] == 'user' %}",
    "{%- for given in messages %}{%- set message = dict(given) %}{%- if message['role'] == 'assistant' %}"
    "{%- set message = dict(given, content=given['content'].split('</think>')[-1]) %}{%- endif %}"
    "{%- if message['role'] == 'user' %}",
)
V31 = "".join(
    [
        "{%- for m in messages if m.role == 'system' %}{{ bos_token if loop.first }}{{ m.content }}",
        "{%- else %}{{ bos_token }}{%- endfor %}{%- set ns = namespace(asked=false, out=false) %}",
        "{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.asked = true %}{%- set ns.out = false %}",
        "{{ '<｜User｜>' + m.content }}{%- elif m.role == 'assistant' %}",
        "{%- if ns.asked %}{{ '<｜Assistant｜></think>' }}{%- endif %}",
        "{%- if ns.out or m.tool_calls is defined %}{{ m.content }}{%- else %}",
        "{{ m.content.split('</think>', 1)[-1] }}{%- endif %}",
        "{%- for c in m.tool_calls or [] %}{{ '<｜tool▁calls▁begin｜>' if loop.first }}",
        "{{ '<｜tool▁call▁begin｜>' + c.function.name + '<｜tool▁sep｜>' + c.function.arguments }}",
        "{{ '<｜tool▁call▁end｜>' }}{{ '<｜tool▁calls▁end｜>' if loop.last }}{%- endfor %}",
        "{{ '<｜end▁of▁sentence｜>' }}",
        "{%- set ns.asked = false %}{%- set ns.out = false %}{%- elif m.role == 'tool' %}{%- set ns.asked = false %}",
        "{%- set ns.out = true %}{{ '<｜tool▁output▁begin｜>' + m.content + '<｜tool▁output▁end｜>' }}{%- endif %}",
        "{%- endfor %}{%- if add_generation_prompt and ns.asked %}",
        "{{ '<｜Assistant｜>' + ('<think>' if thinking else '</think>') }}{%- endif %}",
    ]
)
RELEASES = {
    "deepseek-r1": R1,
    "deepseek-v3": _changed(R1, (CUT, "")),
    "deepseek-v3.1": V31,
    "deepseek-r1-0528": _changed(R1, *_ROUNDS, (CUT, ""), _CUT_EARLY),
    "deepseek-v3-0324": _changed(R1, *_ROUNDS, (CUT, "")),
}
OPENS_REASONING = _changed(
    R1, ("not ns.is_tool %}{{'<｜Assistant｜>'}}", "not ns.is_tool %}{{'<｜Assistant｜><think>\\n'}}")
)
TOOLS_IN_SYSTEM = (
    "{{ bos_token }}{{ ns.system_prompt }}",
    "{{ bos_token }}{{ ns.system_prompt }}{%- if tools %}{{ '\\n\\n## Tools: write <｜tool▁calls▁begin｜>\\n' }}"
    "{%- for tool in tools %}{{ (tool | tojson) + '\\n' }}{%- endfor %}{%- endif %}",
)


def with_tools(template: str) -> str:
    """A release's template that shows definitions of tools in the system text."""
    return _changed(RELEASES[template], TOOLS_IN_SYSTEM)


def base(folder: Path, template: Any, **more: Any) -> Path:
    """A base's tokenizer with a chat template; None leaves it without."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(TOKENIZER / "tokenizer.json", folder)
    config = {name: value for name, value in CONFIG.items() if name != "chat_template"} | more
    config |= {} if template is None else {"chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@functools.cache
def release(name: str) -> ChatTemplate:
    """The chat template of a release, as servers render it."""
    return ChatTemplate(Path(name), (("default", RELEASES[name]),), (("bos_token", "<｜begin▁of▁sentence｜>"),))


def read(folder: Path) -> ChatTemplate:
    found = read_chat_template(folder)
    assert found is not None
    return found
