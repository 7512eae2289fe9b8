"""Tiny bases of each family: its shape, its kind of tokenizer and files, random weights."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import family_shapes
from unit.data import gigachat, moonshot

from deepseek_sft.convert import tiny_model
from deepseek_sft.families import deepseek_v3, rows
from deepseek_sft.tensors import safetensors_files
from deepseek_sft.tensors.tensor_spec import TensorSpec

SHAPE = tiny_model.TinyShape()
EMBEDDED = 256  # ids after a tiktoken vocabulary that the model knows; the tokenizer's code numbers two more
MTP = {"num_nextn_predict_layers": 1}
# vLLM 0.32 on CPU: without YaRN its kernel turns the first head alone (smoke test: weights_as_trained, logprobs).
WITHOUT_YARN = {"engine_args": {"compilation-config": {"custom_ops": ["all", "-rotary_embedding"]}}}


@dataclass(frozen=True)
class Kind:
    """A family's kind of base.

    Args:
        row: its row.
        changes: to the configuration of a tiny DeepSeek-R1.
        tokenizer: writes the tokenizer's files into a folder, with a vocabulary of the texts given.
        end: the token that ends a turn; that of config.json is the tokenizer's, as in the releases.
        serve: settings of serving besides ``reasoning_parser: auto``.
        reasons: whether its template writes reasoning; otherwise tags of thinking would be text.
    """

    row: rows.Family
    changes: Mapping[str, Any]
    tokenizer: Callable[[Path, tuple[str, ...]], Path]
    end: str
    serve: Mapping[str, Any] = field(default_factory=dict)
    reasons: bool = False


def _moonlight(folder: Path, texts: tuple[str, ...]) -> Path:
    return moonshot.folder(folder, texts=texts)


def _kimi(folder: Path, texts: tuple[str, ...]) -> Path:
    named = {"auto_map": {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]}}
    (folder / "modeling_deepseek.py").write_text("raise SystemExit('code of a model folder was run')\n")
    return moonshot.folder(folder, moonshot.KIMI_TEMPLATE, texts, moonshot.KIMI_NAMES, **named)


KINDS = {
    "moonlight": Kind(rows.MOONLIGHT, family_shapes.MOONLIGHT, _moonlight, "<|im_end|>", WITHOUT_YARN),
    "kimi": Kind(rows.KIMI, family_shapes.KIMI, _kimi, "<|im_end|>", {"tool_call_parser": "auto"}, reasons=True),
    "gigachat": Kind(
        rows.GIGACHAT,
        family_shapes.GIGACHAT | MTP,
        gigachat.folder,
        "<|message_sep|>",
        {"tool_call_parser": "auto", **WITHOUT_YARN},
    ),
}


def write(folder: Path, kind: Kind, texts: tuple[str, ...] = (), seed: int = 0) -> Path:
    """A base in BF16 as the family publishes it."""
    folder.mkdir(parents=True)
    kind.tokenizer(folder, texts)
    ids, size = _vocabulary(folder)
    ends = {"eos_token_id": ids["</s>" if "</s>" in ids else "[EOS]"], "vocab_size": size}
    config = tiny_model.config_of(SHAPE) | dict(kind.changes) | ends
    if kind.row.tiktoken:
        config["auto_map"] = {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids[kind.end]}))
    specs = deepseek_v3.tensor_specs(config)
    for layer in range(config["num_nextn_predict_layers"]):
        specs |= deepseek_v3.mtp_specs(config, config["num_hidden_layers"] + layer)
    _write_weights(folder, specs, seed)
    return folder


def _vocabulary(folder: Path) -> tuple[dict[str, int], int]:
    """Ids of special tokens, and how many tokens the model knows."""
    whole = folder / "tokenizer.json"
    if whole.exists():
        description = json.loads(whole.read_text(encoding="utf-8"))
        ids = {one["content"]: one["id"] for one in description["added_tokens"]}
        return ids, max(description["model"]["vocab"].values()) + 1
    named = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))["added_tokens_decoder"]
    ids = {one["content"]: int(number) for number, one in named.items()}
    return ids, ids["[BOS]"] + EMBEDDED


def _write_weights(folder: Path, specs: dict[str, TensorSpec], seed: int) -> None:
    (shard,) = safetensors_files.lay_out(specs.items(), 1 << 40)
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(shard.header)
        for name, spec in specs.items():
            stream.write(tiny_model.values_of(name, spec, SHAPE, seed))
