"""DeepSeek-V3 for training, on transformers' own classes: what differs is routing, expert layout and output layer.

Attention projections, norms, MLPs and rotary embedding are transformers' unchanged. Parameter names are the release's
but for ``mlp.experts.*``, which are fused shards.
"""

import contextlib
import functools
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import DeepseekV3Config
from transformers.integrations.deepspeed import deepspeed_config, is_deepspeed_zero3_enabled
from transformers.modeling_utils import no_init_weights
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as native

from .. import families
from ..errors import BadInputError
from ..families import implied_numbers
from . import expert_products
from .expert_parallel import ExpertParallel
from .experts import KeptExperts, MixtureOfExperts
from .kept_attention import KeptAttention
from .loading import load_release
from .loss import OutputLayer
from .router import KeepsFloat32Buffers, Router


class RotaryEmbedding(KeepsFloat32Buffers, native.DeepseekV3RotaryEmbedding):
    """transformers' rotary embedding (angles in fp32), whose frequencies stay fp32 in a bf16 model."""


class TrainingModel(native.DeepseekV3ForCausalLM):
    """The causal language model that is trained."""

    bytes_read = 0  # by this rank when the model was filled

    def __init__(self, config: DeepseekV3Config, parallel: ExpertParallel | None = None):
        experts = functools.partial(MixtureOfExperts, parallel=parallel)
        with _classes(DeepseekV3MoE=experts, DeepseekV3RotaryEmbedding=RotaryEmbedding):
            super().__init__(config)
        self.parallel = parallel
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
    keep_attention: bool = False,
    expert_parallel_size: int = 1,
    exchange_rows: int | None = None,
    ranks_per_node: int = 1 << 30,
    keep_experts: bool = False,
    freeze: Collection[str] = (),
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
        keep_attention: activation checkpointing does not compute attention's kernel again.
        expert_parallel_size: ranks over which a layer's routed experts are spread; divides all ranks and the shards.
        exchange_rows: rows that a rank receives at once of others; None for ``expert_shards.CHUNK_ROWS``.
        ranks_per_node: neighbouring ranks on one node: expert parallelism of more of them sends a token once to each
            node.
        keep_experts: with it, activation checkpointing takes over what a layer's experts gave, and exchanges no rows
            to compute it again.
        freeze: ``router``: the routers' weights get gradients of zero.

    Raises:
        BadInputError: grouped products are impossible here, the weights are incomplete, or the built model would not
            compute what ``config.json`` says.
    """
    published = families.read_trainable(folder)
    config = DeepseekV3Config.from_dict({k: v for k, v in published.items() if k != "quantization_config"})
    config.experts_per_shard = experts_per_shard
    config.grouped_products = _grouped(products, torch.device(device), dtype, config)
    config._attn_implementation = attention
    config.use_cache = False
    parallel = ExpertParallel.of_size(expert_parallel_size, ranks_per_node, exchange_rows)
    with _default_dtype(dtype), no_init_weights(), _zero3():
        model = TrainingModel(config, parallel)
    rotary = model.model.rotary_emb
    # Computed again: inside zero.Init every new tensor takes the model's dtype, and YaRN's ramp is wrong in bf16.
    frequencies, rotary.attention_scaling = rotary.rope_init_fn(config, torch.device("cpu"))
    rotary.inv_freq = frequencies.to(rotary.inv_freq.device)
    rotary.original_inv_freq = rotary.inv_freq
    for router in model.routers():
        router.e_score_correction_bias = router.e_score_correction_bias.float()
        router.frozen = "router" in freeze
    if keep_attention:
        for layer in model.model.layers:
            layer.self_attn.kept_attention = KeptAttention()
    if keep_experts and parallel is not None and parallel.nodes is not None:
        for module in model.modules():
            if isinstance(module, MixtureOfExperts):
                module.kept = KeptExperts()
    model.bytes_read = load_release(model, folder) if read_weights else 0
    check_unchanged(model, published)
    return model


def check_unchanged(model: TrainingModel, published: dict[str, Any]) -> None:
    """Check that the model computes with the release's rotary embedding, softmax scale and routing.

    Raises:
        BadInputError: naming everything that the built model would not honour.
    """
    different = differences(model, published)
    if different:
        raise BadInputError(
            "; ".join(different[:5]),
            "the model must be trained as it will be served; check config.json against the release",
        )


def differences(model: TrainingModel, published: dict[str, Any]) -> list[str]:
    """Where the model in memory would not compute with the numbers that ``config.json`` implies.

    Args:
        published: in the releases' names (``families.read_config``).
    """
    wanted, found = implied_numbers.numbers(published), []

    def compare(what: str, got: Any, want: Any) -> None:
        if implied_numbers.differ(got, want):
            found.append(f"{what} would be {got} in training, the base's config.json says {want}")

    rotary = model.model.rotary_emb
    frequencies = rotary.inv_freq.detach().cpu()
    if frequencies.dtype != torch.float32:
        found.append(f"rotary frequencies would be {frequencies.dtype}, not fp32")
    values = frequencies.double().numpy()
    if values.shape != wanted.frequencies.shape:
        found.append(f"rotary frequencies would be {len(values)}, config.json asks for {len(wanted.frequencies)}")
    else:
        for index in np.flatnonzero(
            [implied_numbers.differ(*pair) for pair in zip(values, wanted.frequencies, strict=True)]
        )[:1]:
            compare(f"rotary frequency {index}", values[index], wanted.frequencies[index])
    compare("the factor of the rotary angles' cosines", rotary.attention_scaling, wanted.attention_factor)
    for index, layer in enumerate(model.model.layers):
        compare(f"layer {index}: the softmax scale", layer.self_attn.scaling, wanted.softmax_scale)
    for index, router in enumerate(model.routers()):
        compare(f"router {index}: routed_scaling_factor", router.routed_scaling_factor, wanted.routed_scaling_factor)
        compare(f"router {index}: norm_topk_prob", router.norm_topk_prob, wanted.normalised)
        if router.e_score_correction_bias.dtype != torch.float32:
            found.append(f"router {index}: the correction bias is {router.e_score_correction_bias.dtype}")
    return found


def _grouped(products: str, device: torch.device, dtype: torch.dtype, config: DeepseekV3Config) -> bool:
    try:
        return expert_products.choose(products, device, dtype, config.hidden_size, config.moe_intermediate_size)
    except ValueError as error:
        raise BadInputError(f"train.expert_products grouped: {error}", "set it to auto or loop") from None


@contextlib.contextmanager
def _classes(**replacements: Callable[..., torch.nn.Module]) -> Iterator[None]:
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
