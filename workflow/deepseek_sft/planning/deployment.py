"""What a deployment of the trained model needs of each GPU, and what its nodes read at a start (docs/serving.md).

Weights are counted; what vLLM works with is an allowance that was not measured. So a deployment is refused for its
weights and one full context alone, and what is left beside the allowance is told as an estimate.
"""

import math
from dataclasses import dataclass
from typing import Any, Protocol

from .counting import Model
from .settings import GIB
from .terms import Term, show, total

UTILISATION = 0.92  # of a GPU's memory, vLLM 0.32's default
CONTEXT = 1.0 * GIB  # CUDA context and libraries
WORKING = 3.0 * GIB  # NCCL, captured graphs
BATCHED_TOKENS = 8192  # of one step, vLLM's default for servers on large GPUs
MOST_GATHERED = 32768  # tokens whose experts are computed at once
WIDTH = {"bf16": 2, "fp32": 4, "fp8": 1}
OF_BASE = "bf16"  # as prepare_model leaves it
DTYPES = {"float32": 4, "float": 4, "bfloat16": 2, "float16": 2, "half": 2}
BLOCK = 32  # smallest into which vLLM 0.32 refines the blocks of 128 of the FP8 format


class Served(Protocol):
    """The settings of section ``serve``, as far as a plan goes; ``settings/serve.py`` has them."""

    tensor_parallel_size: int
    pipeline_parallel_size: int
    max_model_len: int
    dtype: str

    @property
    def replicas(self) -> int: ...

    @property
    def whole_experts(self) -> bool: ...

    @property
    def ranks(self) -> int: ...

    @property
    def sizes(self) -> str: ...

    @property
    def flags(self) -> dict[str, Any]: ...

    @property
    def deployment_flags(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Deployment:
    """A deployment as planned.

    Attributes:
        serve: its settings.
        weights: of the fullest GPU.
        working: an allowance for everything else but the KV cache.
        token_bytes: of the KV cache, for one token on one GPU; MLA's latent is whole on each tensor-parallel rank.
        gpu_bytes: memory of a GPU that vLLM may use.
        node_reads: what a node with ``gpus_per_node`` GPUs reads of the model at least.
        nodes: number of such nodes.
        wrong: why sizes of the model and of the deployment do not go together; empty where they do.
    """

    serve: Served
    weights: list[Term]
    working: list[Term]
    token_bytes: float
    gpu_bytes: float
    node_reads: float
    nodes: int
    wrong: tuple[str, ...]

    @property
    def least(self) -> float:
        """Bytes without which vLLM cannot start: weights, the CUDA context, the KV cache of one longest request."""
        return total(self.weights) + CONTEXT + self.token_bytes * self.serve.max_model_len

    @property
    def cached_tokens(self) -> int:
        """Tokens in the KV cache of one replica, by the allowance; 0 where it leaves none."""
        left = self.gpu_bytes - total(self.weights) - total(self.working)
        return max(0, int(left / self.token_bytes))

    @property
    def problems(self) -> list[str]:
        """What vLLM would refuse, or fail of."""
        found = list(self.wrong)
        if not self.least <= self.gpu_bytes:
            found.append(
                f"serve: {self.serve.sizes}: a GPU needs {show(self.least, 'B')} (weights "
                f"{show(total(self.weights), 'B')}, one context of {self.serve.max_model_len:,} tokens), and vLLM may "
                f"use {show(self.gpu_bytes, 'B')}"
            )
        return found


def plan(model: Model, serve: Served, served_dtype: str, gpu_memory_bytes: float, gpus_per_node: int) -> Deployment:
    """Plan a deployment on GPUs.

    Args:
        served_dtype: ``convert.dtype``.
        gpu_memory_bytes: memory of a GPU that PyTorch sees.
    """
    utilisation = serve.flags.get("gpu-memory-utilization", UTILISATION)
    weights = _weights(model, serve, served_dtype)
    nodes = max(1, -(-serve.ranks // gpus_per_node))
    return Deployment(
        serve,
        weights,
        _working(model, serve),
        _layers(model, serve) * 2 * (model["kv_lora_rank"] + model["qk_rope_head_dim"]),
        gpu_memory_bytes * (utilisation if isinstance(utilisation, int | float) else UTILISATION),
        _node_reads(model, serve, served_dtype, min(gpus_per_node, serve.ranks)),
        nodes,
        tuple(_wrong(model, serve, served_dtype)),
    )


def _layers(model: Model, serve: Served) -> int:
    """Layers of the longest pipeline stage."""
    return math.ceil(model.layers / serve.pipeline_parallel_size)


def _width(serve: Served, served_dtype: str) -> int:
    """Bytes of an element of the linear layers in a GPU's memory."""
    return WIDTH["fp8"] if served_dtype == "fp8" else DTYPES.get(serve.dtype, WIDTH[served_dtype])


def _weights(model: Model, serve: Served, served_dtype: str) -> list[Term]:
    """Of the GPU with the longest stage and the output layer."""
    width, tensor, layers = _width(serve, served_dtype), serve.tensor_parallel_size, _layers(model, serve)
    outer = max(2, width)  # embedding and output layer are in no FP8 format
    parts, ranks = model.parameters, serve.replicas * tensor
    moe = min(layers, model.moe_layers)
    experts = width * parts["routed experts"] / max(1, model.moe_layers) * moe / ranks
    shared = width * parts["shared experts"] / max(1, model.moe_layers) * moe / tensor
    dense = width * parts["dense MLP"] / max(1, model.layers - model.moe_layers) * (layers - moe) / tensor
    heads = model["num_attention_heads"] * (model["qk_nope_head_dim"] + model["v_head_dim"])
    stages = 1 if serve.pipeline_parallel_size == 1 else 0
    return [
        Term("routed experts", experts, f"{width} B × {moe} layers, over {ranks} GPUs"),
        Term(
            "attention", width * parts["attention"] * layers / model.layers / tensor, f"{layers} layers, over {tensor}"
        ),
        Term(
            "absorbed projections",
            2 * layers * model["kv_lora_rank"] * heads / tensor,
            f"2 B × {layers} layers × {model['kv_lora_rank']} × {heads:,}, over {tensor}: vLLM's MLA keeps them beside",
        ),
        Term("shared experts and dense layers", shared + dense, f"over {tensor}"),
        Term("router and norms", 4 * (parts["router"] + parts["norms"]) * layers / model.layers, "on each"),
        Term(
            "embedding and output layer",
            outer * (parts["output layer"] + stages * parts["embedding"]) / tensor,
            f"over {tensor}" + ("" if stages else ", on the first and the last stage"),
        ),
    ]


def _working(model: Model, serve: Served) -> list[Term]:
    batched = serve.deployment_flags.get("max-num-batched-tokens") or BATCHED_TOKENS
    batched = batched if isinstance(batched, int) else BATCHED_TOKENS
    gathered = min(batched * serve.replicas, MOST_GATHERED)  # replicas compute each other's tokens' experts
    chosen, hidden, size = model["num_experts_per_tok"], model["hidden_size"], model["moe_intermediate_size"]
    each = 2 * chosen * (max(2 * size, hidden) + size)
    return [
        Term("context", CONTEXT, "an allowance"),
        Term("NCCL, captured graphs", WORKING, "an allowance"),
        Term("experts' inputs and outputs", gathered * each, f"{gathered:,} tokens × {each:,} B"),
    ]


def _node_reads(model: Model, serve: Served, served_dtype: str, gpus: int) -> float:
    """Bytes of the model's files that hold a part of a node's GPUs: its experts, and all that is not experts."""
    sizes = {"bf16": model.bf16_bytes, "fp32": model.fp32_bytes, "fp8": model.fp8_bytes}
    experts = WIDTH[served_dtype] * model.parameters["routed experts"]
    across = serve.replicas * serve.tensor_parallel_size  # GPUs that share the experts of a stage
    held = min(1.0, gpus / across) if serve.whole_experts else 1.0  # else slices of each, read in whole pages
    stages = min(serve.pipeline_parallel_size, max(1, gpus // across))
    return (experts * held + sizes[served_dtype] - experts) * stages / serve.pipeline_parallel_size


def _wrong(model: Model, serve: Served, served_dtype: str) -> list[str]:
    """Sizes that vLLM 0.32 cannot divide."""
    found, tensor = [], serve.tensor_parallel_size
    if model["num_attention_heads"] % tensor:
        found.append(f"serve.tensor_parallel_size: {tensor} does not divide the {model['num_attention_heads']} heads")
    if serve.pipeline_parallel_size > model.layers:
        found.append(
            f"serve.pipeline_parallel_size: {serve.pipeline_parallel_size} is more than the {model.layers} layers"
        )
    size, ranks = model["moe_intermediate_size"], serve.replicas * tensor
    block = BLOCK if served_dtype == "fp8" else 1
    if serve.whole_experts:
        if ranks > model["n_routed_experts"]:
            found.append(
                f"serve: {ranks} GPUs of a stage share {model['n_routed_experts']} whole experts: some get none"
            )
    elif size % (ranks * block):
        blocks = f" of whole blocks of {block}" if block > 1 else ""
        found.append(
            f"serve: an expert of {size:,} is not cut into {ranks} slices{blocks} "
            "(data_parallel_size × tensor_parallel_size); expert_parallel: true keeps experts whole"
        )
    return found


def lines(found: Deployment, storage_gb_per_second: float) -> list[str]:
    """For the plan's text."""
    serve, tokens = found.serve, found.cached_tokens
    whole = ", whole experts" if serve.whole_experts else ""
    contexts = tokens * serve.replicas // serve.max_model_len
    cache = (
        f"KV cache of about {tokens:,} tokens a replica, {contexts:,} full contexts of {serve.max_model_len:,} in all"
    )
    weights, memory = show(total(found.weights), "B"), show(found.gpu_bytes, "B")
    read = found.node_reads * found.nodes
    seconds = show(read / storage_gb_per_second / 1e9, "s")
    return [
        f"serving   {serve.sizes} GPUs{whole}: weights {weights} of {memory} a GPU; "
        f"{cache if tokens else 'little is left for the KV cache'}",
        f"          a start reads at least {show(found.node_reads, 'B')} on each of {found.nodes} nodes, "
        f"{show(read, 'B')} in all: {seconds} at {storage_gb_per_second:g} GB/s",
    ]


def figures(found: Deployment) -> dict[str, Any]:
    """For the receipt and ``--json``."""
    return {
        "ranks": found.serve.ranks,
        "weights_bytes": round(total(found.weights)),
        "gpu_bytes": round(found.gpu_bytes),
        "cached_tokens": found.cached_tokens,
        "node_reads_bytes": round(found.node_reads),
        "problems": found.problems,
    }
