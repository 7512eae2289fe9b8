"""Memory of one node's host: what ZeRO-3 offload keeps there, and the processes themselves."""

import math

from .counting import Model
from .device_memory import SUB_GROUP, Peak
from .settings import GIB, Cluster, Training
from .terms import Term

CPU_NODE = 0.3 * GIB  # torchrun 0.22, train.py 0.06; measured
NODE = 4.0 * GIB  # torchrun, train.py, kernel memory charged to the job
ESTIMATOR_BYTES, ESTIMATOR_FACTOR = 18, 1.5  # of DeepSpeed's own estimator


PIECE = 64 << 20  # of pinned memory, as in training/xtuner_engine/deferred_files.py
START_BLOCKS = 1.11  # 671B's parts of 256 ranks, each rounded up to a power of two, over their sum
ROUNDED_MB = 64  # pinned blocks up to this size are rounded up to a power of two, larger ones are not


def pinned(size: float) -> int:
    """Bytes that pinning ``size`` bytes takes, with the allocator's settings of ``training/launch.py``."""
    return 1 << math.ceil(math.log2(size)) if 1 < size <= ROUNDED_MB << 20 else int(size)


def sub_groups(partition: int) -> list[int]:
    """Elements of each optimizer sub-group of a rank's partition: closed at the first parameter past the size."""
    whole, rest = divmod(partition, SUB_GROUP)
    return [SUB_GROUP] * whole + ([rest] if rest else [])


def host_memory(model: Model, training: Training, cluster: Cluster, device: Peak) -> list[Term]:
    """Bytes per node by component.

    Args:
        device: the device peak; on CPU ranks live in host memory.
    """
    ranks = cluster.ranks_per_node
    if cluster.cpu:
        return [
            Term("ranks", ranks * device.bytes, f"{ranks} ranks × {device.bytes / GIB:,.2f} GiB"),
            Term("node", CPU_NODE, "torchrun and train.py, measured"),
        ]
    process = training.process.cuda_host
    base = [
        Term("processes", ranks * process, f"{ranks} ranks × {process / GIB:.0f} GiB"),
        Term("node", NODE, "launchers and kernel memory"),
    ]
    partition = model.partition(cluster.ranks, training.experts_per_shard, training.expert_parallel_size)
    groups = sub_groups(partition)
    each = f"{ranks} ranks × {{}} × {partition:,} elements"
    cut = f"{each}, {len(groups)} sub-groups"
    width, summed = training.width, training.gradient_width
    optimizer = [
        Term("fp32 master weights", ranks * 4 * partition, each.format(4)),
        Term("Adam moments", ranks * 8 * partition, each.format(8)),
        Term("fp32 gradients, pinned", ranks * sum(pinned(4 * size) for size in groups), cut.format(4)),
        Term(
            "gradients, pinned",
            ranks * pinned(summed * partition),
            f"{each.format(summed)}, one buffer",
        ),
    ]
    parameters = Term("parameters, pinned", ranks * sum(pinned(width * n) for n in groups), cut.format(width))
    # DeepSpeed pins each parameter's part by itself before it lays them end to end; torch keeps those blocks.
    first = Term(
        "parameters, pinned one by one at the start",
        ranks * START_BLOCKS * width * partition,
        f"{each.format(width)} × {START_BLOCKS}, kept by the allocator",
    )
    landing = Term(
        "checkpoint from the GPUs",
        ranks * (4 * max(groups, default=0) + 2 * PIECE),
        f"{ranks} ranks × (4 × {max(groups, default=0):,} elements + 2 × {PIECE >> 20} MiB pinned)",
    )
    states = optimizer if training.offloads_optimizer else [landing] if training.saves_beside_steps else []
    return [
        *states,
        *([parameters, first] if training.offloads_parameters else []),
        *base,
    ]


def estimator_host_bytes(model: Model, training: Training, cluster: Cluster) -> float:
    """Host bytes per node that DeepSpeed's estimate_zero3_model_states_mem_needs gives (stage3.py, zero_init)."""
    if training.offloads_optimizer:
        return model.trained * ESTIMATOR_BYTES / cluster.nodes * ESTIMATOR_FACTOR
    return _largest_layer(model) * 4 * cluster.ranks_per_node * ESTIMATOR_FACTOR


def estimator_device_bytes(model: Model, training: Training, cluster: Cluster) -> float:
    """Device bytes per rank that the estimator gives: model states and the largest layer, no activations."""
    largest = 4 * _largest_layer(model)
    return largest if training.offloads_optimizer else largest + int(ESTIMATOR_BYTES * model.trained / cluster.ranks)


def _largest_layer(model: Model) -> int:
    """The estimator counts the parameters that one module holds itself: here the embedding."""
    return model["vocab_size"] * model["hidden_size"]
