"""Exact counts of a DeepSeek-V3 model from its ``config.json`` alone: parameters, tensors, bytes, FLOPs."""

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

from .. import families
from ..tensors.tensor_spec import scale_shape
from .terms import Term

COMPONENTS = (
    "embedding",
    "attention",
    "dense MLP",
    "routed experts",
    "shared experts",
    "router",
    "norms",
    "output layer",
)
CHECKPOINT_BYTES = 12  # fp32 master weight and Adam's two moments


def component(name: str) -> str:
    """Part of the model that a tensor of the release belongs to."""
    for part, found in (
        ("model.embed_tokens", "embedding"),
        ("lm_head", "output layer"),
        (".mlp.gate.", "router"),
        (".mlp.shared_experts.", "shared experts"),
        (".mlp.experts.", "routed experts"),
        (".mlp.", "dense MLP"),
        ("norm.weight", "norms"),
    ):
        if part in name:
            return found
    return "attention"


@dataclass(frozen=True)
class Model:
    """What a ``config.json`` says about a model, without the multi-token-prediction layer.

    Attributes:
        config: the configuration.
        parameters: elements of all tensors, by component.
        tensors: number of tensors of the release.
        buffers: elements that are not trained (the router's fp32 correction biases).
        fp8_bytes: size in the release's FP8 format.
        shapes: elements of a trained parameter → how many there are, experts not yet fused (see ``partition``).
        quantised: whether the base is in FP8 and will be dequantised.
    """

    config: dict[str, Any]
    parameters: dict[str, int]
    tensors: int
    buffers: int
    fp8_bytes: int
    shapes: Counter[int]
    quantised: bool

    def __getitem__(self, key: str) -> Any:
        return self.config[key]

    @property
    def total(self) -> int:
        """All parameters, correction biases included."""
        return sum(self.parameters.values())

    @property
    def trained(self) -> int:
        """Parameters that the optimizer holds: all but the correction biases."""
        return self.total - self.buffers

    @property
    def layers(self) -> int:
        return self.config["num_hidden_layers"]

    @property
    def moe_layers(self) -> int:
        return sum(families.of(self.config).is_moe_layer(self.config, layer) for layer in range(self.layers))

    @property
    def expert_parameters(self) -> int:
        """Parameters of one routed expert: gate, up and down projections."""
        return 3 * self["hidden_size"] * self["moe_intermediate_size"]

    @property
    def shared_experts(self) -> int:
        return self.config.get("n_shared_experts") or 0

    @property
    def bf16_bytes(self) -> int:
        """Size of the BF16 folder's tensors (correction biases in fp32)."""
        return 2 * self.trained + 4 * self.buffers

    @property
    def fp32_bytes(self) -> int:
        return 4 * self.total

    @property
    def checkpoint_bytes(self) -> int:
        """Size of one ZeRO checkpoint, before the padding of partitions."""
        return CHECKPOINT_BYTES * self.trained

    @property
    def activated(self) -> int:
        """Parameters that one token passes through: of the routed experts only those chosen for it."""
        chosen = self.moe_layers * self["num_experts_per_tok"] * self.expert_parameters
        return self.total - self.parameters["routed experts"] + chosen

    def partition(self, ranks: int, experts_per_shard: int, expert_parallel_size: int = 1) -> int:
        """Elements in each rank's flat partition: the sum over parameters of ceil(elements / ranks that share it)."""
        whole = sum(count * math.ceil(size / ranks) for size, count in self.shapes.items())
        shards = self.moe_layers * self["n_routed_experts"] // experts_per_shard // expert_parallel_size
        sharing = max(1, ranks // expert_parallel_size)
        matrix = experts_per_shard * self["hidden_size"] * self["moe_intermediate_size"]
        return whole + shards * (math.ceil(2 * matrix / sharing) + math.ceil(matrix / sharing))

    def forward_flops(self, length: float) -> list[Term]:
        """FLOPs of one token's forward pass in a sequence of ``length`` tokens, mean over its positions.

        Two per parameter of every matrix product the token passes through; the embedding is a look-up.
        """
        heads, query = self["num_attention_heads"], self["qk_nope_head_dim"] + self["qk_rope_head_dim"]
        products = self.activated - self.parameters["embedding"] - self.parameters["norms"] - self.buffers
        if self.config.get("tie_word_embeddings"):
            products += self.parameters["embedding"]
        mean_keys = (length + 1) / 2
        attention = 2 * self.layers * heads * (query + self["v_head_dim"]) * mean_keys
        return [
            Term("matrix products", 2 * products, f"2 × {products:,} activated matrix parameters", "FLOP"),
            Term(
                "causal attention",
                attention,
                f"2 × {self.layers} layers × {heads} heads × ({query} query-key + {self['v_head_dim']} value) "
                f"× {mean_keys:,.1f} keys on average",
                "FLOP",
            ),
        ]

    def figures(self) -> dict[str, Any]:
        """Counts for receipts and ``--json``."""
        return {
            "parameters": self.total,
            "activated_parameters": self.activated,
            "trained_parameters": self.trained,
            "tensors": self.tensors,
            "parameters_by_component": {name: self.parameters[name] for name in COMPONENTS if self.parameters[name]},
            "bf16_bytes": self.bf16_bytes,
            "fp32_bytes": self.fp32_bytes,
            "fp8_bytes": self.fp8_bytes,
        }


def count(config: dict[str, Any]) -> Model:
    """Count a model.

    Args:
        config: a checked ``config.json`` (``families.read_config``).
    """
    parameters: dict[str, int] = dict.fromkeys(COMPONENTS, 0)
    tensors = buffers = fp8 = 0
    shapes: Counter[int] = Counter()
    family = families.of(config)
    for name, spec in family.tensor_specs(config).items():
        part = component(name)
        parameters[part] += spec.elements
        tensors += 1
        if family.is_quantised(config, name):
            fp8 += spec.elements + 4 * math.prod(scale_shape(spec.shape))
        else:
            fp8 += spec.elements * (4 if spec.dtype == "F32" else 2)
        if name.endswith(family.CORRECTION_BIAS):
            buffers += spec.elements
        elif part != "routed experts":
            shapes[spec.elements] += 1
    return Model(config, parameters, tensors, buffers, fp8, shapes, config.get("quantization_config") is not None)
