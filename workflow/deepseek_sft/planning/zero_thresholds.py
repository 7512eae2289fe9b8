"""DeepSpeed's thresholds of ZeRO-3, in elements: its own, or as large as the experts' shards ask for.

A layer's experts come shard by shard. DeepSpeed's defaults prefetch less than one shard, so that 28 % of 671B's weights
are gathered only when they are needed; one whole shard ahead leaves none (benchmarks/train.py scale).
"""

from dataclasses import dataclass
from typing import Any

from .. import families

AHEAD = 1.15  # shards to gather in advance: the next one, and what stands between two
LIVE = 4.25  # shards at once: the one that is computed, what is gathered ahead, and what overshoots
PRODUCTS = 3  # matrices of an expert


@dataclass(frozen=True)
class Thresholds:
    """Elements; the defaults are DeepSpeed 0.19.8's (runtime/zero/config.py).

    Attributes:
        live: gathered at once at most (`stage3_max_live_parameters`).
        prefetched: gathered ahead of need (`stage3_prefetch_bucket_size`).
        reuse: distance of two uses below which a parameter stays (`stage3_max_reuse_distance`).
        reduced: gradients that are scattered together (`reduce_bucket_size`).
    """

    live: int = 1_000_000_000
    prefetched: int = 50_000_000
    reuse: int = 1_000_000_000
    reduced: int = 500_000_000

    def keys(self) -> dict[str, int]:
        """DeepSpeed's keys, those at its defaults left out."""
        names = {
            "live": "stage3_max_live_parameters",
            "prefetched": "stage3_prefetch_bucket_size",
            "reuse": "stage3_max_reuse_distance",
            "reduced": "reduce_bucket_size",
        }
        usual = Thresholds()
        return {key: getattr(self, name) for name, key in names.items() if getattr(self, name) != getattr(usual, name)}


def of_model(config: dict[str, Any], experts_per_shard: int, by_shard: bool, keep_layer_gathered: bool) -> Thresholds:
    """Thresholds for a model.

    Args:
        config: its ``config.json``.
        by_shard: as large as its shards ask for; else DeepSpeed's.
        keep_layer_gathered: a layer stays from its recomputation to its backward pass: it is used twice within this
            many elements.
    """
    usual = Thresholds()
    shard = experts_per_shard * PRODUCTS * config["hidden_size"] * config["moe_intermediate_size"] if by_shard else 0
    kept = 2 * families.of(config).largest_layer(config) if keep_layer_gathered else 0
    return Thresholds(
        live=kept or max(usual.live, round(LIVE * shard)),
        prefetched=max(usual.prefetched, round(AHEAD * shard)),
        reuse=kept or usual.reuse,
    )
