"""How many experts share a shard, the parameters that ZeRO-3 gathers at once: as stated, or by size.

Fewer and larger shards are fewer gathers: what the host does in a step falls with their number, and their memory rises.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from . import json_files

PRODUCTS = 3  # matrices of an expert
LARGEST = 1.5e9  # bytes of a shard in bf16: 16 experts of the 671B model have 1.41 GB
FEWEST = 4  # shards of a layer: one is gathered while another is computed
CHUNK_ROWS = 32_768  # rows that a rank receives at once where nothing is said: 2.7 GB of the 671B model, both ways
ONE_SHARD = 16  # ranks: more than nodes have
AUTO: Literal["auto"] = "auto"


def experts_per_shard(config: dict[str, Any], stated: int | Literal["auto"], expert_parallel_size: int = 1) -> int:
    """What is stated; for ``auto`` the largest divisor of a rank's experts within ``LARGEST`` and ``FEWEST``.

    Args:
        config: the model's ``config.json``.
        expert_parallel_size: ranks over which a layer's experts are spread; of ``ONE_SHARD`` or more each rank's are
            one shard, as they must be where the ranks lie on several nodes.
    """
    if stated != AUTO:
        return stated
    experts = config["n_routed_experts"]
    held = experts // expert_parallel_size
    if expert_parallel_size >= ONE_SHARD:
        return max(1, held)
    each = 2 * PRODUCTS * config["hidden_size"] * config["moe_intermediate_size"]
    most = max(1, min(int(LARGEST / each), experts // FEWEST, held))
    return max(size for size in range(1, most + 1) if held % size == 0)


def adapted(config: dict[str, Any], stated: int | Literal["auto"], parallel: int, ranks_per_node: int) -> int:
    """Experts of a shard where they are spread over ``parallel`` ranks and not over those that ``stated`` was made for.

    What is stated, or less where it does not divide a rank's experts; over several nodes all that a rank holds. For
    ``auto`` what a run would take.
    """
    held, over = divmod(config["n_routed_experts"], parallel)
    if stated == AUTO or over:
        return experts_per_shard(config, stated, parallel)
    if parallel > ranks_per_node:
        return held
    return max(size for size in range(1, min(stated, held) + 1) if held % size == 0)


def problems(
    config: dict[str, Any], each: int, parallel: int, ranks: int, ranks_per_node: int, recompute: str = "full"
) -> Iterator[tuple[str, str]]:
    """Sizes that do not divide what they must: problem and fix.

    Args:
        each: experts of a shard.
        parallel: ranks over which a layer's experts are spread.
        recompute: ``train.recompute``.
    """
    experts = config["n_routed_experts"]
    if experts % each:
        yield (
            f"train.experts_per_shard {each} does not divide the base's {experts} routed experts",
            "set it to a divisor, or to auto",
        )
    elif experts % (each * parallel):
        yield (
            f"train.expert_parallel_size {parallel} does not divide the {experts // each} shards of a layer "
            f"({experts} routed experts, train.experts_per_shard {each})",
            "set experts_per_shard: auto, or a size that divides them",
        )
    if parallel > ranks_per_node and experts != each * parallel:
        yield (
            f"train.expert_parallel_size {parallel} lies over several nodes, where each rank holds its "
            f"{experts // parallel} experts in one shard, and train.experts_per_shard is {each}",
            f"set experts_per_shard: {max(1, experts // parallel)}",
        )
    if ranks % parallel:
        yield f"train.expert_parallel_size {parallel} does not divide the {ranks} ranks", "set it to a divisor"
    elif ranks_per_node % parallel and parallel % ranks_per_node:
        yield (
            f"train.expert_parallel_size {parallel} neither divides the {ranks_per_node} ranks of a node nor is a "
            "multiple of them: a group would lie across nodes that it fills in part",
            "set it to a divisor or a multiple of a node's ranks",
        )
    if recompute == "without_experts" and parallel <= ranks_per_node:
        yield (
            "train.recompute without_experts keeps what expert parallelism over several nodes gave, and "
            f"train.expert_parallel_size {parallel} lies within a node",
            "set recompute: full, or a multiple of a node's ranks",
        )


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
