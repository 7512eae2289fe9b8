"""Space that results need on the shared file system."""

from .counting import CHECKPOINT_BYTES, Model
from .settings import Cluster, Training
from .terms import Term

RANK_STATE = (
    31_000  # bytes of a rank's model_states file of a small model: names and shapes; more layers, a little more
)


def checkpoint_bytes(model: Model, training: Training, cluster: Cluster) -> float:
    """One checkpoint: every rank writes its partition's master weights and moments, padding included."""
    partition = model.partition(cluster.ranks, training.experts_per_shard, training.expert_parallel_size)
    return cluster.ranks * (CHECKPOINT_BYTES * partition + RANK_STATE)


def disk(model: Model, training: Training, cluster: Cluster, served_dtype: str) -> list[Term]:
    """Bytes by what is kept.

    Args:
        served_dtype: format of the converted model, ``bf16``, ``fp32`` or ``fp8``.
    """
    each = checkpoint_bytes(model, training, cluster)
    best = bool(training.validation and training.validation.keeps_best)
    count = training.keep_checkpoints + best + 1
    output = {"bf16": model.bf16_bytes, "fp32": model.fp32_bytes, "fp8": model.fp8_bytes}[served_dtype]
    terms = [
        Term(
            "checkpoints",
            count * each,
            f"({training.keep_checkpoints} kept{' + the best' if best else ''} + 1 being written) × "
            f"{cluster.ranks} ranks × {CHECKPOINT_BYTES} × "
            f"{model.partition(cluster.ranks, training.experts_per_shard, training.expert_parallel_size):,} elements",
        ),
        Term("converted model", output, f"{model.total:,} parameters in {served_dtype}"),
    ]
    if model.quantised:
        terms.append(
            Term(
                "base in BF16",
                model.bf16_bytes,
                f"{model.total:,} parameters, from FP8; without the prediction layer, some 2 %",
            )
        )
    return terms
