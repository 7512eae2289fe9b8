"""Memory of one rank's device at the three moments that can be its peak. Reasons and sources: docs/planning.md."""

import math
from dataclasses import dataclass

from .. import families
from ..engines import ProcessMemory
from . import zero_thresholds
from .counting import Model
from .expert_exchange import Exchange
from .settings import GIB, Cluster, Samples, Training
from .terms import Term, total

SUB_GROUP = 1_000_000_000  # elements, DeepSpeed 0.19.8's default
MAX_LOGITS = {"cuda": 1 << 27, "cpu": 1 << 23}  # elements, as in model/loss.py
CONTEXT = 1.0 * GIB  # CUDA context, kernels, cuBLAS and flash-attention workspaces
NCCL = 2.0 * GIB  # buffers of the world, sequence-parallel and data-parallel communicators over several nodes
SLACK = 0.05  # of what PyTorch allocates: blocks rounded to 2 MiB and cut, not given back


@dataclass(frozen=True)
class Peak:
    """One moment at which memory can be highest, with everything that is held then."""

    moment: str
    terms: list[Term]

    @property
    def bytes(self) -> float:
        return total(self.terms)


def tokens_per_rank(training: Training, samples: Samples) -> int:
    """Tokens of the largest micro batch on one rank: rows padded to the longest, split over the sequence group."""
    return training.micro_batch_size * math.ceil(samples.longest_row / training.sequence_parallel_size)


def saved_per_token(model: Model, training: Training, moe: bool) -> list[Term]:
    """Bytes per token that autograd keeps of one layer from its (recomputed) forward pass to its backward pass."""
    width, hidden, heads = training.width, model["hidden_size"], model["num_attention_heads"]
    inside = 4 if training.stock_experts else 2  # ours computes SwiGLU again from its two inputs
    query, value = model["qk_nope_head_dim"] + model["qk_rope_head_dim"], model["v_head_dim"]
    q_rank, kv_rank = model.config.get("q_lora_rank") or 0, model["kv_lora_rank"]
    norm = (4 + 2 * width) * hidden
    ranks = q_rank + kv_rank
    terms = [
        Term("two norms", 2 * norm, f"2 × (fp32 copy 4 + 2 × {width}) × {hidden:,}"),
        Term("latent projections", (4 + 3 * width) * ranks, f"(4 + 3 × {width}) × ({q_rank:,} + {kv_rank:,})"),
        Term(
            "query, key, value, output of the kernel",
            4 * width * heads * query + 4 * heads,
            f"4 × {width} × {heads} heads × {query} (value padded) + 4 × {heads}",
        ),
        Term("attention output", width * heads * value, f"{width} × {heads} heads × {value}"),
    ]
    if not moe:
        size = model["intermediate_size"]
        return [*terms, Term("dense MLP", 4 * width * size, f"4 × {width} × {size:,}")]
    chosen, size = model["num_experts_per_tok"], model["moe_intermediate_size"]
    shared = model.shared_experts
    return [
        *terms,
        Term("router input", 4 * hidden, f"4 × {hidden:,} (fp32)"),
        Term("dispatched inputs", width * chosen * hidden, f"{width} × {chosen} experts × {hidden:,}"),
        Term("inside experts", inside * width * chosen * size, f"{inside} × {width} × {chosen} experts × {size:,}"),
        Term("expert outputs", width * chosen * hidden, f"{width} × {chosen} experts × {hidden:,}"),
        Term("shared experts", 4 * width * shared * size, f"4 × {width} × {shared} × {size:,}"),
    ]


def kept_attention_per_token(model: Model, training: Training) -> Term:
    """Bytes per token and layer of what attention's kernel gave, from the forward pass to the layer's backward pass."""
    width, heads = training.width, model["num_attention_heads"]
    size = model["qk_nope_head_dim"] + model["qk_rope_head_dim"]
    if not training.keeps_attention:
        return Term("attention outputs kept", 0, "none: recompute is full")
    return Term(
        "attention outputs kept", (width * size + 4) * heads, f"({width} × {size} (value padded) + 4) × {heads} heads"
    )


def backward_per_token(model: Model, training: Training, moe: bool) -> Term:
    """Bytes per token of the largest temporaries while a layer's backward pass begins."""
    width, hidden = training.width, model["hidden_size"]
    if not moe:
        return Term("gradients in the MLP", 3 * width * model["intermediate_size"], f"3 × {width} × intermediate size")
    chosen = model["num_experts_per_tok"]
    if not training.stock_experts:
        return Term("gradients of expert outputs", width * chosen * hidden, f"{width} × {chosen} experts × {hidden:,}")
    return Term(
        "fp32 gradients of weighted outputs",
        (3 * 4 * chosen + 4) * hidden,
        f"(3 × 4 × {chosen} experts + 4) × {hidden:,}: the gradient and its products with weights and outputs",
    )


def peaks(model: Model, training: Training, samples: Samples, cluster: Cluster) -> list[Peak]:
    """Memory of the fullest rank at each possible peak, largest first."""
    held = tokens_per_rank(training, samples)
    always = _always(model, training, cluster)
    moments = [
        ("backward pass of a layer", always + _layer(model, training, held, Exchange(model, training, cluster))),
        ("loss", always + _loss(model, training, cluster, held)),
    ]
    if not training.offloads_optimizer or cluster.cpu:
        partition = model.partition(cluster.ranks, training.experts_per_shard, training.expert_parallel_size)
        size = min(SUB_GROUP, partition)
        step = Term("fp32 gradients of a sub-group", 4 * size, f"4 × min({SUB_GROUP:,}, {partition:,}) elements")
        moments.append(("optimizer step", [*always, step]))
    outside = _outside(cluster, training.process)
    found = []
    for moment, terms in moments:
        slack = Term("allocator slack", SLACK * total(terms), f"{SLACK:.0%} of the above")
        found.append(Peak(moment, [*terms, slack, *outside]))
    return sorted(found, key=lambda peak: -peak.bytes)


def _always(model: Model, training: Training, cluster: Cluster) -> list[Term]:
    width = training.width
    partition = model.partition(cluster.ranks, training.experts_per_shard, training.expert_parallel_size)
    split = f"{partition:,} elements of {model.trained:,} on {cluster.ranks} ranks"
    states = []
    if cluster.cpu or not training.offloads_parameters:
        states += [Term("parameters, partitioned", width * partition, f"{width} × {split}")]
    if cluster.cpu or not training.offloads_optimizer:
        summed = training.gradient_width
        states += [
            Term("gradients, partitioned", summed * partition, f"{summed} × {split}"),
            Term("fp32 master weights", 4 * partition, f"4 × {split}"),
            Term("Adam moments", 8 * partition, f"8 × {split}"),
        ]
    # A layer that is kept gathered has a term of its own.
    limits = zero_thresholds.of_model(model.config, training.experts_per_shard, training.thresholds_by_shard, False)
    scattered = min(limits.reduced, model.trained)
    bucket = (scattered if cluster.cpu else limits.reduced) + scattered  # untouched pages take no memory on CPU
    live = min(limits.live + limits.prefetched, model.trained)
    buffers = [
        Term("live and prefetched parameters", width * live, f"{width} × {live:,} (stage3_max_live_parameters)"),
        Term(
            "gradient bucket and its scatter",
            width * bucket,
            f"{width} × {bucket:,} (twice reduce_bucket_size at most)",
        ),
    ]
    if training.communication_width > training.width:
        # DeepSpeed copies a bucket's gradients to the wider dtype, and reduce_scatter_coalesced lays them end to end.
        wider = 2 * training.communication_width - training.width
        buffers.append(Term("gradients widened to be summed", wider * scattered, f"{wider} × {scattered:,}"))
    if training.keep_layer_gathered:
        layer = families.of(model.config).largest_layer(model.config)
        buffers.append(Term("layer that is kept gathered", width * layer, f"{width} × {layer:,}"))
    return states + buffers


def _layer(model: Model, training: Training, held: int, exchange: Exchange) -> list[Term]:
    """Checkpointed inputs of all layers, and everything of the layer whose backward pass runs."""
    width, hidden, layers = training.width, model["hidden_size"], model.layers
    shard = training.experts_per_shard * model.expert_parameters
    moe = model.moe_layers > 0
    saved = saved_per_token(model, training, moe)
    backward = backward_per_token(model, training, moe)
    stacked = 2 if training.stock_experts else 1
    if training.activation_checkpointing:
        checkpoints = Term(
            "checkpointed layer inputs",
            width * hidden * layers * held,
            f"{width} × {hidden:,} × {layers} layers × {held:,} tokens",
        )
        kept_layers = 1
    else:
        checkpoints = Term("checkpointed layer inputs", 0, "none: activation_checkpointing is off")
        kept_layers = layers
    return [
        checkpoints,
        *_kept_attention(model, training, held),
        *_held_experts(model, training),
        *exchange.kept(held),
        *exchange.buffers(),
        Term(
            "gradients of one shard",
            width * (shard * 2 // 3 * stacked + shard // 3),
            f"{width} × ({stacked} × w1w3 + w2) of {training.experts_per_shard} experts × {model.expert_parameters:,}",
        ),
        *(
            Term(
                f"activations: {term.name}",
                term.value * kept_layers * held,
                f"({term.formula}) × {kept_layers} × {held:,} tokens",
            )
            for term in saved
        ),
        Term(f"temporaries: {backward.name}", backward.value * held, f"({backward.formula}) × {held:,} tokens"),
    ]


def _kept_attention(model: Model, training: Training, held: int) -> list[Term]:
    each = kept_attention_per_token(model, training)
    if not each.value:
        return []
    formula = f"({each.formula}) × {model.layers} layers × {held:,} tokens"
    return [Term(each.name, each.value * model.layers * held, formula)]


def _held_experts(model: Model, training: Training) -> list[Term]:
    """Gathered experts of every layer that autograd holds in stock xtuner: an expert's weights are a view of its
    shard's, and autograd keeps the view's memory from the forward to the backward pass although ZeRO-3 has released
    the shard. Ours keeps the parameters themselves (model/expert_products.py).
    """
    if not training.stock_experts:
        return []
    experts = model["n_routed_experts"] * model.expert_parameters
    layers = 1 if training.activation_checkpointing else model.moe_layers
    return [
        Term(
            "gathered experts that autograd holds",
            training.width * experts * layers,
            f"{training.width} × {model['n_routed_experts']} experts × {model.expert_parameters:,} × {layers} layers",
        )
    ]


def _loss(model: Model, training: Training, cluster: Cluster, held: int) -> list[Term]:
    """Checkpointed inputs, the output layer with its gradient in fp32, one chunk of logits."""
    width, hidden, vocabulary = training.width, model["hidden_size"], model["vocab_size"]
    weights = hidden * vocabulary
    rows = max(1, MAX_LOGITS["cpu" if cluster.cpu else "cuda"] // vocabulary)
    chunk = min(rows, held) * vocabulary
    layers, kept = model.layers, width * hidden
    if not training.activation_checkpointing:
        kept = int(total(saved_per_token(model, training, model.moe_layers > 0)))
    kept += int(kept_attention_per_token(model, training).value)
    return [
        Term("kept of the layers", kept * layers * held, f"{kept:,} × {layers} layers × {held:,} tokens"),
        *([] if training.activation_checkpointing else _held_experts(model, training)),
        Term("output layer, gathered", width * weights, f"{width} × {vocabulary:,} × {hidden:,}"),
        Term("its gradient", (4 + width) * weights, f"(4 fp32 sum + {width}) × {vocabulary:,} × {hidden:,}"),
        Term("chunk of logits", (2 * width + 4) * chunk, f"(2 × {width} + 4) × {chunk:,} elements"),
        Term("hidden states", (4 + 3 * width) * hidden * held, f"(4 + 3 × {width}) × {hidden:,} × {held:,} tokens"),
    ]


def _outside(cluster: Cluster, process: ProcessMemory) -> list[Term]:
    """Memory that PyTorch's allocator does not count."""
    if cluster.cpu:
        return [
            Term("process", process.cpu, "resident size of a rank before the model is built, measured"),
            Term("libraries while training", process.cpu_later, "kernels they compile and buffers, measured"),
            Term(
                "freed memory that glibc keeps",
                process.cpu_kept,
                "gaps of blocks below MALLOC_MMAP_THRESHOLD_, measured",
            ),
        ]
    several = cluster.ranks > 1
    return [
        Term("CUDA context", CONTEXT, "context, kernels and workspaces"),
        Term("NCCL buffers", NCCL if several else 0, "communicators of world, sequence and data parallel groups"),
    ]
