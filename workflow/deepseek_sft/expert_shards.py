"""How many experts share a shard, the parameters that ZeRO-3 gathers at once: as stated, or by size.

Fewer and larger shards are fewer gathers: what the host does in a step falls with their number, and their memory rises.
"""

from pathlib import Path
from typing import Any, Literal

from . import json_files

PRODUCTS = 3  # matrices of an expert
LARGEST = 1.5e9  # bytes of a shard in bf16: 16 experts of the 671B model have 1.41 GB
FEWEST = 4  # shards of a layer: one is gathered while another is computed
AUTO: Literal["auto"] = "auto"


def experts_per_shard(config: dict[str, Any], stated: int | Literal["auto"]) -> int:
    """What is stated; for ``auto`` the largest divisor of a layer's experts within ``LARGEST`` and ``FEWEST``.

    Args:
        config: the model's ``config.json``.
    """
    if stated != AUTO:
        return stated
    experts = config["n_routed_experts"]
    each = 2 * PRODUCTS * config["hidden_size"] * config["moe_intermediate_size"]
    most = max(1, min(int(LARGEST / each), experts // FEWEST))
    return max(size for size in range(1, most + 1) if experts % size == 0)


def begun_with(runs: Path) -> int | None:
    """What the newest run of an experiment states, where it does not say ``auto``; None where there is no such run.

    Args:
        runs: folder of an experiment's runs.
    """
    found = sorted(runs.glob("*/settings.json"), key=lambda path: (path.stat().st_mtime, path))
    for path in reversed(found):
        try:
            kept = json_files.load(path)
            stated = kept.get("stated", {}).get("experts_per_shard", kept["settings"]["experts_per_shard"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # the start that goes on with this run says what is wrong with its file
        return None if stated == AUTO else stated
    return None
