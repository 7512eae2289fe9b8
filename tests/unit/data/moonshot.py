"""A tokenizer folder as Moonlight and Kimi-K2 ship it, with a vocabulary made here."""

import base64
import functools
import json
import random
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from deepseek_sft.families import rows

ROW = rows.MOONLIGHT.tiktoken
NAMES = {0: "[BOS]", 1: "[EOS]", 2: "<|im_end|>", 3: "<|im_user|>", 4: "<|im_assistant|>", 7: "[EOT]"}
NAMES |= {10: "<|im_system|>", 17: "<|im_middle|>", 254: "[UNK]", 255: "[PAD]"}
# As Moonlight-16B-A3B-Instruct writes turns.
TEMPLATE = (
    "{%- for message in messages -%}{%- if loop.first and messages[0]['role'] != 'system' -%}"
    "<|im_system|>system<|im_middle|>You are a helpful assistant<|im_end|>{%- endif -%}"
    "<|im_{{ message['role'] }}|>{{ message['role'] }}<|im_middle|>{{ message['content'] }}<|im_end|>{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|im_assistant|>assistant<|im_middle|>{%- endif -%}"
)
# As Kimi-K2-Thinking: reasoning has a field, turns up to the last answer lose it, tools stand first, calls have ids.
KIMI_NAMES = NAMES | {
    11: "<|tool_calls_section_begin|>",
    12: "<|tool_calls_section_end|>",
    13: "<|tool_call_begin|>",
    14: "<|tool_call_argument_begin|>",
    15: "<|tool_call_end|>",
    22: "<think>",
    23: "</think>",
}
# Tools, the place of the last answer, and the beginning of each message.
KIMI_HEAD = (
    "{%- if tools -%}<|im_system|>tool_declare<|im_middle|>"
    "{{ tools | tojson(separators=(',', ':')) }}<|im_end|>{%- endif -%}"
    "{%- set ns = namespace(last=-1) -%}{%- for m in messages -%}"
    "{%- if m.role == 'assistant' and not m.get('tool_calls') -%}{%- set ns.last = loop.index0 -%}{%- endif -%}"
    "{%- endfor -%}"
    "{%- for m in messages -%}{{ '<|im_system|>' if m.role in ('system', 'tool') else '<|im_' ~ m.role ~ '|>' }}"
)
KIMI_TEMPLATE = (
    f"{KIMI_HEAD}"
    "{{ m.get('name') or m.role }}<|im_middle|>{%- if m.role == 'assistant' -%}"
    "<think>{{ m.get('reasoning_content') or '' if loop.index0 > ns.last else '' }}</think>{{ m.content }}"
    "{%- if m.get('tool_calls') -%}<|tool_calls_section_begin|>{%- for c in m.tool_calls -%}"
    "<|tool_call_begin|>{{ c['id'] }}<|tool_call_argument_begin|>{{ c.function.arguments }}<|tool_call_end|>"
    "{%- endfor -%}<|tool_calls_section_end|>{%- endif -%}"
    "{%- elif m.role == 'tool' -%}## Return of {{ m.tool_call_id }}\n{{ m.content }}"
    "{%- else -%}{{ m.content }}{%- endif -%}<|im_end|>{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|im_assistant|>assistant<|im_middle|>{%- endif -%}"
)
SCRIPTS = ((0x20, 0x7F), (0xA0, 0x250), (0x370, 0x530), (0x590, 0x700), (0x900, 0xE80), (0x1100, 0x1200))
SCRIPTS += (
    (0x2000, 0x2070),
    (0x3000, 0x3100),
    (0x4E00, 0x4F00),
    (0xAC00, 0xAD00),
    (0x1F300, 0x1F650),
    (0x20000, 0x20100),
)


def soup(seed: int, length: int) -> str:
    """Runs of characters of one script after another, with the spaces and line ends of writing."""
    chance, text = random.Random(seed), []
    while len(text) < length:
        low, high = chance.choice(SCRIPTS)
        low = chance.randrange(low, max(low + 1, high - 12))
        text += [chr(chance.randrange(low, min(high, low + 12))) for _ in range(chance.randrange(1, 9))]
        text.append(chance.choice([" ", " ", " ", "", "\n", "  ", "\r\n\n", "'s ", "'LL", ". ", "123456"]))
    return "".join(text)


@functools.cache
def ranks(*texts: str) -> dict[bytes, int]:
    """A vocabulary of the real kind: bytes, then what a training on many scripts (and ``texts``) merges first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("|".join(ROW.pattern)), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=4000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    english = "the answer of the question is that they're not, and it's what we'll see in these things 2024 "
    tokenizer.train_from_iterator(
        [soup(seed, 4000) for seed in range(40)] + [english * 20, english.title() * 9, *texts], trainer
    )
    from deepseek_sft.data.words import BYTE_CHARACTERS

    of = {character: byte for byte, character in enumerate(BYTE_CHARACTERS)}
    return {bytes(of[c] for c in token): number for token, number in tokenizer.get_vocab().items()}


def folder(
    path: Path, template: str = TEMPLATE, texts: tuple[str, ...] = (), names: dict[int, str] = NAMES, **config: Any
) -> Path:
    """A folder with ``tiktoken.model`` and ``tokenizer_config.json``."""
    path.mkdir(parents=True, exist_ok=True)
    held = ranks(*texts)
    first = len(held)
    lines = (f"{base64.b64encode(token).decode()} {rank}" for token, rank in sorted(held.items(), key=lambda p: p[1]))
    (path / "tiktoken.model").write_text("\n".join(lines) + "\n")
    content = {
        "added_tokens_decoder": {str(first + at): {"content": name, "special": True} for at, name in names.items()},
        "auto_map": {"AutoTokenizer": ["tokenization_moonshot.TikTokenTokenizer", None]},
        "bos_token": "[BOS]",
        "eos_token": "[EOS]",
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "tokenizer_class": "TikTokenTokenizer",
        "chat_template": template,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(content | config, ensure_ascii=False))
    return path
