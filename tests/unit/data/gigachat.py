"""A tokenizer folder as GigaChat3 ships it (``tokenizer.json``), with a vocabulary made here."""

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from unit.data import moonshot

PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
NAMES = ("<unk>", "<s>", "</s>", "<|role_sep|>", "<|message_sep|>")
# As GigaChat3-10B-A1.8B writes turns: a role's name is text, white space follows the token that ends a turn, one call.
TEMPLATE = (
    "{%- macro turn(role, content) -%}{{- role + '<|role_sep|>\\n' + content + '<|message_sep|>\\n\\n' -}}"
    "{%- endmacro -%}"
    "{{- bos_token -}}{{- turn('developer system', 'Roles are named.') -}}"
    "{%- if messages and messages[0]['role'] == 'system' -%}{{- turn('system', messages[0]['content']) -}}"
    "{%- set messages = messages[1:] -%}{%- endif -%}"
    "{%- if tools -%}{{- turn('function descriptions', tools | tojson) -}}{%- endif -%}"
    "{%- for m in messages -%}{%- if m.role == 'tool' -%}{{- turn('function result', m.content) -}}"
    "{%- else -%}{{- turn(m.role, m.content or '') -}}{%- endif -%}"
    "{%- if m.role == 'assistant' and m.tool_calls -%}{%- set call = m.tool_calls[0].function -%}"
    "{{- turn('function call', '{\"name\": \"' ~ call.name ~ '\", \"arguments\": ' ~ call.arguments ~ '}') -}}"
    "{%- endif -%}"
    "{%- if loop.last and add_generation_prompt and m.role != 'assistant' -%}{{- 'assistant<|role_sep|>\\n' -}}"
    "{%- endif -%}{%- endfor -%}"
)


def folder(path: Path, texts: tuple[str, ...] = ()) -> Path:
    """A folder with ``tokenizer.json`` and ``tokenizer_config.json``."""
    path.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4000,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken(name, special=True, normalized=False) for name in NAMES],
        show_progress=False,
    )
    tokenizer.train_from_iterator([moonshot.soup(seed, 4000) for seed in range(20)] + list(texts), trainer)
    tokenizer.save(str(path / "tokenizer.json"))
    config = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": TEMPLATE,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config, ensure_ascii=False))
    return path
