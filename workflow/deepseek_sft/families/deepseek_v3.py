"""The DeepSeek-V3 release format: config keys, and every tensor's name, shape and dtype.

Source: ``config.json`` and ``model.safetensors.index.json`` of deepseek-ai/DeepSeek-V3 and DeepSeek-R1 (45,395 tensors
for 61 layers without the multi-token-prediction layer), ``README_WEIGHTS.md`` for that layer.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import BadInputError
from ..tensors.tensor_spec import TensorSpec
from . import config_file

ROUTER_WEIGHT = "mlp.gate.weight"  # BF16 in the releases; transformers from 5.20 on saves it in FP32
CORRECTION_BIAS = "mlp.gate.e_score_correction_bias"

POSITIVE_INTEGERS = (
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "n_routed_experts",
    "num_experts_per_tok",
    "n_group",
    "topk_group",
    "kv_lora_rank",
    "qk_rope_head_dim",
    "qk_nope_head_dim",
    "v_head_dim",
    "vocab_size",
)


def checked(published: dict[str, Any], path: Path) -> dict[str, Any]:
    """A configuration in the releases' names, checked.

    Raises:
        BadInputError: a size missing or impossible, or what ``config_file`` refuses.
    """
    _check_routing(published, path)
    config = config_file.in_release_names(published, path)
    check_config(config, path)
    return config


def require_trainable(config: dict[str, Any], path: Path) -> None:
    """
    Raises:
        BadInputError: the model is one that can be converted, but not trained.
    """
    if config.get("tie_word_embeddings"):
        raise BadInputError(
            f"{path}: tie_word_embeddings is true; models with one matrix for embedding and output are not trained",
            "DeepSeek-V3 releases have two: take config.json and lm_head.weight from the release",
        )
    if not config.get("n_shared_experts"):
        raise BadInputError(
            f"{path}: n_shared_experts is {config.get('n_shared_experts')!r}; training asks for one or more"
        )


def _check_routing(config: dict[str, Any], path: Path) -> None:
    for key, allowed in (("topk_method", "noaux_tc"), ("scoring_func", "sigmoid")):
        if config.get(key) != allowed:
            raise BadInputError(
                f"{path}: {key} must be {allowed!r}, found {config.get(key)!r}",
                "take config.json from the release: a config written by transformers alone drops these keys",
            )


def check_config(config: dict[str, Any], path: Path) -> None:
    """Check the keys that the tensor names and shapes depend on.

    Args:
        config: in the releases' names.

    Raises:
        BadInputError: naming the first key that is wrong.
    """
    for key in POSITIVE_INTEGERS:
        value = config.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise BadInputError(f"{path}: {key} must be a positive integer, found {value!r}")
    _check_routing(config, path)
    rank = config.get("q_lora_rank")
    if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
        raise BadInputError(f"{path}: q_lora_rank must be a positive integer or null, found {rank!r}")
    for key in ("first_k_dense_replace", "num_nextn_predict_layers"):
        value = config.get(key)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
            raise BadInputError(f"{path}: {key} must be a number of layers, found {value!r}")
    if config.get("attention_bias"):
        raise BadInputError(f"{path}: attention_bias true is not part of the DeepSeek-V3 architecture")
    if config["n_routed_experts"] % config["n_group"]:
        groups = f"n_routed_experts {config['n_routed_experts']}, n_group {config['n_group']}"
        raise BadInputError(f"{path}: n_group must divide n_routed_experts, found {groups}")


def is_moe_layer(config: dict[str, Any], layer: int) -> bool:
    """Whether a layer holds routed experts (the first ``first_k_dense_replace`` layers are dense)."""
    return layer >= config.get("first_k_dense_replace", 0) and layer % config.get("moe_layer_freq", 1) == 0


def mlp_specs(prefix: str, hidden: int, intermediate: int) -> dict[str, TensorSpec]:
    """Tensors of one feed-forward block: dense, shared or a routed expert."""
    return {
        f"{prefix}.gate_proj.weight": TensorSpec((intermediate, hidden), "BF16"),
        f"{prefix}.up_proj.weight": TensorSpec((intermediate, hidden), "BF16"),
        f"{prefix}.down_proj.weight": TensorSpec((hidden, intermediate), "BF16"),
    }


def layer_specs(config: dict[str, Any], layer: int) -> dict[str, TensorSpec]:
    """Tensors of one decoder layer of the BF16 release, in the release's order."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    q_rank, kv_rank, rope = config.get("q_lora_rank"), config["kv_lora_rank"], config["qk_rope_head_dim"]
    nope, value = config["qk_nope_head_dim"], config["v_head_dim"]
    prefix = f"model.layers.{layer}"
    attention: dict[str, tuple[int, ...]] = {}
    if q_rank is None:
        attention["q_proj"] = (heads * (nope + rope), hidden)
    else:
        attention["q_a_proj"] = (q_rank, hidden)
        attention["q_a_layernorm"] = (q_rank,)
        attention["q_b_proj"] = (heads * (nope + rope), q_rank)
    attention["kv_a_proj_with_mqa"] = (kv_rank + rope, hidden)
    attention["kv_a_layernorm"] = (kv_rank,)
    attention["kv_b_proj"] = (heads * (nope + value), kv_rank)
    attention["o_proj"] = (hidden, heads * value)
    specs = {f"{prefix}.self_attn.{name}.weight": TensorSpec(shape, "BF16") for name, shape in attention.items()}
    if is_moe_layer(config, layer):
        experts, width = config["n_routed_experts"], config["moe_intermediate_size"]
        specs[f"{prefix}.mlp.gate.weight"] = TensorSpec((experts, hidden), "BF16")
        specs[f"{prefix}.{CORRECTION_BIAS}"] = TensorSpec((experts,), "F32")
        if config.get("n_shared_experts"):
            specs |= mlp_specs(f"{prefix}.mlp.shared_experts", hidden, width * config["n_shared_experts"])
        for expert in range(experts):
            specs |= mlp_specs(f"{prefix}.mlp.experts.{expert}", hidden, width)
    else:
        specs |= mlp_specs(f"{prefix}.mlp", hidden, config["intermediate_size"])
    specs[f"{prefix}.input_layernorm.weight"] = TensorSpec((hidden,), "BF16")
    specs[f"{prefix}.post_attention_layernorm.weight"] = TensorSpec((hidden,), "BF16")
    return specs


def largest_layer(config: dict[str, Any]) -> int:
    """Elements of the largest layer."""
    layers = range(config["num_hidden_layers"])
    return max(sum(spec.elements for spec in layer_specs(config, layer).values()) for layer in layers)


def tensor_specs(config: dict[str, Any]) -> dict[str, TensorSpec]:
    """Every tensor of the BF16 release without the multi-token-prediction layer, in the release's order."""
    vocabulary, hidden = config["vocab_size"], config["hidden_size"]
    specs = {"model.embed_tokens.weight": TensorSpec((vocabulary, hidden), "BF16")}
    for layer in range(config["num_hidden_layers"]):
        specs |= layer_specs(config, layer)
    specs["model.norm.weight"] = TensorSpec((hidden,), "BF16")
    if not config.get("tie_word_embeddings"):
        specs["lm_head.weight"] = TensorSpec((vocabulary, hidden), "BF16")
    return specs


def mtp_specs(config: dict[str, Any], layer: int) -> dict[str, TensorSpec]:
    """Tensors that a multi-token-prediction layer has besides embedding and head, which it shares with the model.

    Source: README_WEIGHTS.md of DeepSeek-V3; what vLLM's deepseek_mtp.py creates.
    """
    hidden, prefix = config["hidden_size"], f"model.layers.{layer}"
    own = {"enorm": (hidden,), "hnorm": (hidden,), "eh_proj": (hidden, 2 * hidden), "shared_head.norm": (hidden,)}
    specs = {f"{prefix}.{name}.weight": TensorSpec(shape, "BF16") for name, shape in own.items()}
    return layer_specs(config, layer) | specs


def mtp_layers(config: dict[str, Any], names: Iterable[str]) -> int:
    """Number of multi-token-prediction layers among the tensors of a folder.

    Raises:
        ValueError: naming the layer that is skipped or a tensor that one lacks; no server could load it.
    """
    held, first = set(names), config["num_hidden_layers"]
    found = sorted({int(name.split(".")[2]) for name in held if is_mtp(config, name)})
    for number, layer in enumerate(found, first):
        if layer != number:
            raise ValueError(f"there is a layer {layer}, but no layer {number}")
        lacking = [name for name in mtp_specs(config, layer) if name not in held]
        if lacking:
            raise ValueError(
                f"layer {layer} lacks {lacking[0]}" + (f" and {len(lacking) - 1} more" if lacking[1:] else "")
            )
    return len(found)


def is_mtp(config: dict[str, Any], name: str) -> bool:
    """Whether a tensor belongs to a multi-token-prediction layer (layer index ``num_hidden_layers`` or above)."""
    match = re.match(r"model\.layers\.(\d+)\.", name)
    return match is not None and int(match[1]) >= config["num_hidden_layers"]


def is_quantised(config: dict[str, Any], name: str) -> bool:
    """Whether the FP8 release stores this tensor in FP8 with one scale per block.

    The linear layers of attention and feed-forward blocks are; embeddings, head, norms, the router, its bias and the
    projection ``eh_proj`` that joins the multi-token-prediction layer to the model are not.
    """
    linear = name.endswith(("_proj.weight", "kv_a_proj_with_mqa.weight"))
    return linear and not name.endswith(".eh_proj.weight")
