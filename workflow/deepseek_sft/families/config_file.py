"""The one reader of ``config.json``: old and new names of every key, and what the model computes by them.

What is returned has the names of DeepSeek's releases, which transformers 4.57 reads: ``rope_theta``, ``rope_scaling``,
``torch_dtype``, ``n_routed_experts``, ``num_nextn_predict_layers``. transformers 5 (5.0 to 5.24 were compared) writes
``rope_parameters`` with the base period inside, ``dtype``, ``num_local_experts``, ``num_mtp_layers`` for the same.

A key that is missing is never taken for its default where that decides what is computed: the defaults of transformers,
of vLLM and of the releases' own code are not the same (``routed_scaling_factor``: 2.5, 1.0, none).
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import files, json_files
from ..errors import BadInputError

# New name → the releases'.
ALIASES = {
    "dtype": "torch_dtype",
    "num_local_experts": "n_routed_experts",
    "num_mtp_layers": "num_nextn_predict_layers",
}
DTYPES = ("bfloat16", "float16", "float32")
FULL_ATTENTION = "full_attention"

# Sizes are asked for by the family's ``check_config``; without these the readers take defaults that differ.
COMPUTED = (
    "first_k_dense_replace",
    "hidden_act",
    "max_position_embeddings",
    "n_shared_experts",
    "norm_topk_prob",
    "q_lora_rank",
    "rms_norm_eps",
    "rope_theta",
    "routed_scaling_factor",
)
POSITIVE = ("max_position_embeddings", "rms_norm_eps", "rope_theta", "routed_scaling_factor")
# Keys that may be there and have one value only: with another one training, transformers and vLLM would not agree.
FIXED: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False, None),
    "attention_dropout": (0, None),
    "hidden_act": ("silu",),
    "mlp_bias": (False, None),
    "moe_layer_freq": (1,),
    "norm_topk_prob": (True, False),
    "partial_rotary_factor": (1, None),
    "rope_interleave": (True, None),
    "tie_word_embeddings": (False, True),
}
CHECKED_ELSEWHERE = {  # by the family's check_config, by what reads the weights, or below
    *("architectures", "model_type", "scoring_func", "topk_method", "topk_group", "n_group"),
    *("hidden_size", "intermediate_size", "moe_intermediate_size", "kv_lora_rank", "v_head_dim", "vocab_size"),
    *("num_attention_heads", "num_experts_per_tok", "num_hidden_layers", "qk_nope_head_dim", "qk_rope_head_dim"),
    *("n_routed_experts", "num_nextn_predict_layers", "quantization_config"),
    *("rope_scaling", "rope_parameters", "torch_dtype", "original_max_position_embeddings"),
    *("head_dim", "qk_head_dim", "num_key_value_heads", "layer_types", "mlp_layer_types"),
}
# Keys that no forward pass of this architecture reads: training aids, token ids, generation, bookkeeping.
HARMLESS = {
    *("auto_map", "aux_loss_alpha", "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "ep_size"),
    *("initializer_range", "output_router_logits", "router_aux_loss_coef", "pretraining_tp", "seq_aux"),
    *("transformers_version", "use_cache", "tokenizer_class", "model_name", "license"),
    *("add_cross_attention", "bad_words_ids", "begin_suppress_tokens", "chunk_size_feed_forward", "prefix"),
    *("cross_attention_hidden_size", "decoder_start_token_id", "diversity_penalty", "do_sample", "early_stopping"),
    *("encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "finetuning_task", "forced_bos_token_id"),
    *("forced_eos_token_id", "id2label", "is_decoder", "is_encoder_decoder", "label2id", "length_penalty"),
    *("max_length", "min_length", "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences"),
    *("output_attentions", "output_hidden_states", "output_scores", "problem_type", "pruned_heads", "return_dict"),
    *("remove_invalid_values", "repetition_penalty", "return_dict_in_generate", "suppress_tokens", "temperature"),
    *("task_specific_params", "tf_legacy_loss", "tie_encoder_decoder", "top_k", "top_p", "torchscript", "typical_p"),
    *("use_bfloat16", "unsloth_fixed", "unsloth_version"),
}
ROPE_KEYS = {
    *("type", "rope_type", "rope_theta", "factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
    *("original_max_position_embeddings", "attention_factor", "truncate", "partial_rotary_factor"),
}
SAME_FACTOR = 1e-9  # relative


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a model folder.

    Raises:
        BadInputError: missing, unreadable, a git-lfs pointer, or no object.
    """
    files.refuse_pointer(path)
    try:
        value = json_files.load(path)
    except (OSError, ValueError) as error:
        raise BadInputError(f"{path} cannot be read: {error}", "fetch this file again") from None
    if not isinstance(value, dict):
        raise BadInputError(f"{path} is not a JSON object", "fetch this file again")
    return value


def _refuse(path: Path, problem: str, fix: str = "take config.json from the release") -> BadInputError:
    return BadInputError(f"{path}: {problem}", fix)


def is_off(value: Any) -> bool:
    """Whether a value switches off what its key is for: null, false, zero, empty."""
    return value is None or value in (False, 0, "", [], {})


def _is_note(key: str, value: Any) -> bool:
    """Whether an unknown key is a remark for people: private, or a text under the name of one."""
    remarks = ("version", "comment", "note", "notes", "description", "date", "url", "author", "name")
    return key.startswith("_") or (isinstance(value, str) and key.rsplit("_", 1)[-1] in remarks)


def unknown_keys(published: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Keys that this reader does not know: those that may change what is computed, and those that do not."""
    known = {*COMPUTED, *FIXED, *CHECKED_ELSEWHERE, *HARMLESS, *ALIASES}
    unknown = [key for key in published if key not in known]
    idle = [key for key in unknown if is_off(published[key]) or _is_note(key, published[key])]
    return [key for key in unknown if key not in idle], idle


def in_release_names(published: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """A ``config.json`` with the releases' names; one that has them already comes back as it is.

    Raises:
        BadInputError: a value under two names that differ, a key that is not known and may change what is computed,
            one whose absence would be filled with differing defaults, or a rotary embedding that training,
            transformers and vLLM would not compute alike.
    """
    config = {key: value for key, value in published.items() if key not in ALIASES and key != "rope_parameters"}
    for new, old in ALIASES.items():
        if new not in published:
            continue
        values = [_plain(published[name]) for name in (new, old) if published.get(name) is not None]
        if any(value != values[0] for value in values):
            both = f"{new} is {published[new]!r} and {old} is {published[old]!r}"
            raise _refuse(path, f"{both}: two names of one thing", "keep the one that is right")
        config[old] = values[0] if values else None
    dtype = config.get("torch_dtype")
    if dtype is not None and _plain(dtype) not in DTYPES:
        raise _refuse(path, f"torch_dtype (or dtype) is {dtype!r}; known are {', '.join(DTYPES)}")
    theta, scaling = _rope(published, path)
    if theta is not None:
        config["rope_theta"] = theta
    if _is_other_form(published, scaling):
        config["rope_scaling"] = scaling
    _check_known(config, published, path)
    return config


def _is_other_form(published: Mapping[str, Any], scaling: dict[str, Any] | None) -> bool:
    """Whether the rotary embedding is not written as the releases and transformers 4.57 write it."""
    legacy = published.get("rope_scaling")
    return "rope_parameters" in published or (
        not is_off(legacy) and (scaling is None or FULL_ATTENTION in legacy or not {"type", "rope_type"} & set(legacy))
    )


def _plain(value: Any) -> Any:
    """A dtype without the prefix that torch prints; anything else as it is."""
    return value.removeprefix("torch.") if isinstance(value, str) else value


def _check_known(config: dict[str, Any], published: Mapping[str, Any], path: Path) -> None:
    changing, _ = unknown_keys(published)
    if changing:
        found = ", ".join(f"{key}: {json.dumps(published[key])[:60]}" for key in changing[:5])
        raise _refuse(
            path,
            f"unknown keys, which may change what the model computes: {found}",
            "if they change nothing remove them from config.json; if they do, this workflow does not train that model",
        )
    absent = [key for key in COMPUTED if key not in config]
    if absent:
        raise _refuse(
            path,
            f"{', '.join(absent)} missing: training, transformers and vLLM would fill in different defaults",
            "take config.json from the release, or write the values that the model was trained with",
        )
    for key, allowed in FIXED.items():
        if key in config and not any(config[key] == value and _kind(config[key]) == _kind(value) for value in allowed):
            raise _refuse(path, f"{key} must be {' or '.join(map(repr, allowed))}, found {config[key]!r}")
    shared = config["n_shared_experts"]
    if not (shared is None or (isinstance(shared, int) and not isinstance(shared, bool) and shared >= 0)):
        raise _refuse(path, f"n_shared_experts must be a number of experts, found {shared!r}")
    for key in POSITIVE:
        if not (_is_number(config[key]) and 0 < config[key] < math.inf):
            raise _refuse(path, f"{key} must be a positive number, found {config[key]!r}")
    _check_derived(config, path)


def _check_derived(config: dict[str, Any], path: Path) -> None:
    """Keys that repeat what others say must say the same."""
    rope, nope = config.get("qk_rope_head_dim"), config.get("qk_nope_head_dim")
    expected = {"head_dim": rope, "num_key_value_heads": config.get("num_attention_heads")}
    if isinstance(rope, int) and isinstance(nope, int):
        expected["qk_head_dim"] = rope + nope
    for key, value in expected.items():
        if config.get(key) is not None and value is not None and config[key] != value:
            raise _refuse(path, f"{key} is {config[key]!r}, the other sizes give {value}")
    if any(kind != FULL_ATTENTION for kind in config.get("layer_types") or ()):
        raise _refuse(path, f"layer_types is {config['layer_types']!r}; known is {FULL_ATTENTION} alone")
    layers, dense = config.get("num_hidden_layers"), config.get("first_k_dense_replace")
    kinds = config.get("mlp_layer_types")
    sizes = isinstance(layers, int) and isinstance(dense, int)
    if kinds and sizes and kinds != ["dense" if layer < dense else "sparse" for layer in range(layers)]:
        raise _refuse(path, f"mlp_layer_types contradicts first_k_dense_replace {dense}")
    scaling, outside = config.get("rope_scaling"), config.get("original_max_position_embeddings")
    if outside is not None and outside != (scaling or {}).get("original_max_position_embeddings"):
        raise _refuse(path, f"original_max_position_embeddings is {outside}, the rotary scaling says otherwise")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _kind(value: Any) -> type:
    return bool if isinstance(value, bool) else float if isinstance(value, int | float) else type(value)


# ---- rotary embedding


def _rope(published: Mapping[str, Any], path: Path) -> tuple[Any, dict[str, Any] | None]:
    """Base period and scaling (None: none), from either form or from both if they agree."""
    forms = []
    for key in ("rope_scaling", "rope_parameters"):
        values = published.get(key)
        if is_off(values):
            continue
        if not isinstance(values, dict):
            raise _refuse(path, f"{key} is {values!r}, which is no mapping")
        forms.append((key, _flat(key, values, path)))
    thetas = [(key, values["rope_theta"]) for key, values in forms if values.get("rope_theta") is not None]
    if published.get("rope_theta") is not None:
        thetas.insert(0, ("rope_theta", published["rope_theta"]))
    if any(theta != thetas[0][1] for _, theta in thetas):
        said = ", ".join(f"{theta!r} by {key}" for key, theta in thetas)
        raise _refuse(path, f"the rotary base period (rope_theta) has two values: {said}", "keep the one that is right")
    read = [_scaling(key, values, path) for key, values in forms]
    if any(scaling != read[0] for scaling in read):
        said = f"rope_scaling is {published['rope_scaling']!r}, rope_parameters {published['rope_parameters']!r}"
        raise _refuse(path, f"two rotary scalings that differ: {said}", "keep the one that is right")
    kept = None
    if read and read[0]:
        first = forms[0][1]
        others = {key: value for key, value in first.items() if value is not None}
        kept = {"type": "yarn"} | {k: v for k, v in others.items() if k not in ("type", "rope_type", "rope_theta")}
    return thetas[0][1] if thetas else None, kept


def _flat(key: str, values: dict[str, Any], path: Path) -> dict[str, Any]:
    """Without the nesting by kind of layer, of which this architecture has one."""
    if not any(isinstance(value, dict) for value in values.values()):
        return values
    if set(values) != {FULL_ATTENTION}:
        raise _refuse(path, f"{key} differs by kind of layer ({', '.join(values)}); known is {FULL_ATTENTION} alone")
    return values[FULL_ATTENTION]


def _scaling(key: str, values: dict[str, Any], path: Path) -> dict[str, float] | None:
    """What YaRN computes with, defaults filled in; None without scaling.

    Raises:
        BadInputError: another scaling, a key that is not known, or values that the programs read differently.
    """
    kinds = {values[name] for name in ("type", "rope_type") if values.get(name) is not None}
    kinds = kinds or {"default"}
    if len(kinds) > 1 or not kinds <= {"default", "yarn"}:
        raise _refuse(path, f"{key} is of type {' and '.join(sorted(map(str, kinds)))}; known are yarn and default")
    unknown = [name for name in values if name not in ROPE_KEYS and not is_off(values[name])]
    if unknown:
        raise _refuse(path, f"{key} has unknown keys: {', '.join(unknown)}")
    for name, allowed in (("attention_factor", None), ("truncate", True), ("partial_rotary_factor", 1)):
        if values.get(name) is not None and values[name] != allowed:
            raise _refuse(path, f"{key}: {name} is {values[name]!r}, which transformers and vLLM read differently")
    scaling = {name: values.get(name) for name in ("factor", "original_max_position_embeddings")}
    if kinds == {"default"}:
        if any(value is not None for value in scaling.values()):
            raise _refuse(path, f"{key} names a factor or an original length, but no type: yarn or default?")
        return None
    scaling |= {"beta_fast": values.get("beta_fast"), "beta_slow": values.get("beta_slow")}
    for name, default in (("beta_fast", 32), ("beta_slow", 1)):  # the same in all programs
        scaling[name] = default if scaling[name] is None else scaling[name]
    scaling |= {"mscale": values.get("mscale"), "mscale_all_dim": values.get("mscale_all_dim")}
    for name, default in (("mscale", 1), ("mscale_all_dim", 0)):
        scaling[name] = default if scaling[name] is None else scaling[name]
    for name, value in scaling.items():
        smallest = 0 if name.startswith("mscale") else math.ulp(0)
        if not (_is_number(value) and smallest <= value < math.inf):
            raise _refuse(path, f"{key}: {name} must be a positive number, found {value!r}")
    both = values.get("mscale") and values.get("mscale_all_dim")
    native = attention_factor(scaling) if both else mscale(scaling["factor"], 1)  # transformers' reading
    if not abs(native - attention_factor(scaling)) <= SAME_FACTOR * native:
        raise _refuse(
            path,
            f"{key}: with mscale {values.get('mscale')!r} and mscale_all_dim {values.get('mscale_all_dim')!r} "
            f"transformers scales angles by {native:.6g}, vLLM and the release by {attention_factor(scaling):.6g}",
        )
    return {name: float(value) for name, value in scaling.items()}


def mscale(factor: float, weight: float) -> float:
    """YaRN's magnitude scale (``yarn_get_mscale`` of the releases' modeling_deepseek.py)."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def attention_factor(scaling: Mapping[str, float]) -> float:
    """By which cosines and sines are multiplied."""
    return mscale(scaling["factor"], scaling["mscale"]) / mscale(scaling["factor"], scaling["mscale_all_dim"])


def yarn(config: Mapping[str, Any]) -> dict[str, float] | None:
    """Parameters of YaRN in a configuration with the releases' names, defaults filled in; None without scaling."""
    values = config.get("rope_scaling")
    return None if is_off(values) else _scaling("rope_scaling", values, Path("config.json"))


# ---- what is written


def to_serve(published: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The configuration with the keys that vLLM, transformers 4.57 and transformers 5 read.

    A configuration with the releases' names is read by all of them and stays as it is. One in transformers 5's form
    keeps its keys and gets the releases' beside them.
    """
    config, named = dict(published), in_release_names(published, path)
    for new, old in ALIASES.items():
        if new in published:
            config[old] = named[old]
    if "rope_parameters" not in published:
        return config | {key: named[key] for key in ("rope_theta", "rope_scaling") if key in named}
    config |= {"rope_theta": named["rope_theta"], "rope_scaling": named["rope_scaling"]}
    parameters = {key: value for key, value in (named["rope_scaling"] or {}).items() if key != "type"}
    kind = "yarn" if named["rope_scaling"] else "default"
    config["rope_parameters"] = parameters | {"rope_theta": named["rope_theta"], "rope_type": kind}
    return config
