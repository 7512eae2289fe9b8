"""DeepSeek-V3 for training, on transformers' own classes: what differs is routing, expert layout and output layer.

Attention projections, norms, MLPs and rotary embedding are transformers' unchanged. Parameter names are the release's
but for ``mlp.experts.*``, which are fused shards.
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import DeepseekV3Config
from transformers.integrations.deepspeed import deepspeed_config, is_deepspeed_zero3_enabled
from transformers.modeling_utils import no_init_weights
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as native

from ..errors import BadInputError
from . import expert_products
from .experts import MixtureOfExperts
from .loading import load_release
from .loss import OutputLayer
from .router import KeepsFloat32Buffers, Router


class RotaryEmbedding(KeepsFloat32Buffers, native.DeepseekV3RotaryEmbedding):
    """transformers' rotary embedding (angles in fp32), whose frequencies stay fp32 in a bf16 model."""


class TrainingModel(native.DeepseekV3ForCausalLM):
    """The causal language model that is trained."""

    bytes_read = 0  # by this rank when the model was filled

    def __init__(self, config: DeepseekV3Config):
        with _classes(DeepseekV3MoE=MixtureOfExperts, DeepseekV3RotaryEmbedding=RotaryEmbedding):
            super().__init__(config)
        self.lm_head.__class__ = OutputLayer  # same parameter, another forward

    def routers(self) -> list[Router]:
        return [module for module in self.modules() if isinstance(module, Router)]


def build(
    folder: Path,
    *,
    experts_per_shard: int,
    attention: str,
    dtype: torch.dtype,
    products: str = "auto",
    device: str = "cpu",
    read_weights: bool = True,
) -> TrainingModel:
    """Build the model of ``folder`` and fill it, split across all ranks where ZeRO-3 is configured.

    Args:
        folder: model in the release's format, BF16 or FP8.
        experts_per_shard: routed experts per fused parameter.
        attention: name of an attention function of ``attention.py``.
        dtype: of the parameters.
        products: ``auto``, ``grouped`` or ``loop``: how a shard's experts are multiplied.
        device: on which the model will train.
        read_weights: False leaves weights and router biases undefined, for a start from a checkpoint that has them.

    Raises:
        BadInputError: grouped products are impossible here, the weights are incomplete, or the built model would not
            compute what ``config.json`` says.
    """
    published = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = DeepseekV3Config.from_dict({k: v for k, v in published.items() if k != "quantization_config"})
    config.experts_per_shard = experts_per_shard
    config.grouped_products = _grouped(products, torch.device(device), dtype, config)
    config._attn_implementation = attention
    config.use_cache = False
    with _default_dtype(dtype), no_init_weights(), _zero3():
        model = TrainingModel(config)
    rotary = model.model.rotary_emb
    # Computed again: inside zero.Init every new tensor takes the model's dtype, and YaRN's ramp is wrong in bf16.
    frequencies, rotary.attention_scaling = rotary.rope_init_fn(config, torch.device("cpu"))
    rotary.inv_freq = frequencies.to(rotary.inv_freq.device)
    rotary.original_inv_freq = rotary.inv_freq
    for router in model.routers():
        router.e_score_correction_bias = router.e_score_correction_bias.float()
    model.bytes_read = load_release(model, folder) if read_weights else 0
    check_unchanged(model, published)
    return model


def check_unchanged(model: TrainingModel, published: dict) -> None:
    """Check that the model computes with the release's rotary scaling, softmax scale and routing.

    Raises:
        BadInputError: naming the first key that the built model would not honour.
    """
    wanted, got = published.get("rope_scaling"), model.config.rope_scaling
    got = got and {key: value for key, value in got.items() if key != "rope_type"}
    wanted = wanted and {key: value for key, value in wanted.items() if key != "rope_type"}
    _same("rope_scaling", wanted, got)
    _same("rope_theta", published.get("rope_theta", 10000), model.config.rope_theta)
    _same("max_position_embeddings", published["max_position_embeddings"], model.config.max_position_embeddings)
    scale = (published["qk_nope_head_dim"] + published["qk_rope_head_dim"]) ** -0.5
    if wanted and wanted.get("mscale_all_dim"):
        scale *= native.yarn_get_mscale(wanted["factor"], wanted["mscale_all_dim"]) ** 2
    for layer in model.model.layers:
        if abs(layer.self_attn.scaling - scale) > 1e-6 * scale:
            raise BadInputError(f"softmax scale would be {layer.self_attn.scaling}, the base's config gives {scale}")
    if model.model.rotary_emb.inv_freq.dtype != torch.float32:
        raise BadInputError("rotary frequencies would not be fp32")
    for router in model.routers():
        _same("routed_scaling_factor", published["routed_scaling_factor"], router.routed_scaling_factor)
        _same("norm_topk_prob", published["norm_topk_prob"], router.norm_topk_prob)
        if router.e_score_correction_bias.dtype != torch.float32:
            raise BadInputError("the router's correction bias would not be fp32")


def _grouped(products: str, device: torch.device, dtype: torch.dtype, config: DeepseekV3Config) -> bool:
    try:
        return expert_products.choose(products, device, dtype, config.hidden_size, config.moe_intermediate_size)
    except ValueError as error:
        raise BadInputError(f"train.expert_products grouped: {error}", "set it to auto or loop") from None


def _same(key: str, wanted: object, got: object) -> None:
    if wanted != got:
        raise BadInputError(
            f"{key} would be {got} in training, the base's config.json says {wanted}",
            "the model must be trained as it will be served; check config.json against the release",
        )


@contextlib.contextmanager
def _classes(**replacements: type) -> Iterator[None]:
    """Have transformers' model build other classes: it looks them up by name in its module."""
    before = {name: getattr(native, name) for name in replacements}
    try:
        for name, replacement in replacements.items():
            setattr(native, name, replacement)
        yield
    finally:
        for name, original in before.items():
            setattr(native, name, original)


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _zero3() -> contextlib.AbstractContextManager:
    """DeepSpeed's context that splits each parameter as soon as it is made, where ZeRO-3 is configured."""
    if not is_deepspeed_zero3_enabled():
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.Init(config_dict_or_path=deepspeed_config())
