"""Why the shape of a stage cannot run in the allocation that the profile gives it, with ways out."""

from typing import Any

from . import time_limits
from .settings import reading
from .settings.serve import Serve
from .slurm.sbatch import Allocation


def of_preflight(config: dict[str, Any], allocation: Allocation) -> list[str]:
    """Why preflight's own job would be ended while healthy nodes still import torch and measure."""
    ranks = allocation.nodes * (allocation.gpus_per_node() or 1)
    found = time_limits.under_load(ranks)
    needed = found.loading + found.measuring
    if config["accelerator"] == "cpu" or needed <= 60 * allocation.runtime:
        return []
    return [
        f"preflight: its job has {allocation.runtime} minutes, but {ranks} ranks may take "
        f"{found.loading / 60:.0f} to import torch from a shared folder and {found.measuring / 60:.0f} to measure\n"
        f"    fix: set-resources: preflight: runtime: {-(-needed // 60):.0f} in the profile"
    ]


def of_serving(config: dict[str, Any], rule: str, allocation: Allocation) -> list[str]:
    """Why the shape of ``serve`` cannot run in the allocation of a rule, with ways out that the nodes have."""
    serve = reading.parse(Serve, config["serve"], "serve")
    tensor, replica, ranks, nodes = serve.tensor_parallel_size, serve.ranks_per_replica, serve.ranks, allocation.nodes
    sizes = f"serve: {serve.sizes}"
    per_node = allocation.gpus_per_node() if config["accelerator"] == "cuda" else None
    place = f"set-resources: {rule}: nodes"
    if not serve.splits(nodes):
        fitting = max(n for n in range(1, nodes + 1) if serve.splits(n))
        if per_node:
            fitting = next((n for n in range(-(-ranks // per_node), ranks + 1) if serve.splits(n)), fitting)
        return [
            f"{sizes} cannot be spread evenly over the {nodes} nodes of the profile\n"
            f"    fix: {place}: {fitting} in the profile, or sizes whose product is a multiple of {nodes}"
            + (f", with whole replicas of {replica} on a node or whole nodes for each" if serve.replicas > 1 else "")
        ]
    if not per_node or ranks // nodes <= per_node:
        return []
    enough = next(n for n in range(-(-ranks // per_node), ranks + 1) if serve.splits(n))
    ways = [f"{place}: {enough} in the profile"]
    if tensor > per_node:
        ways[0] += f" with tensor_parallel_size {per_node}, pipeline_parallel_size {-(-replica // per_node)}"
    held = nodes * per_node
    ways.append(f"sizes whose product is at most {held}, where the model fits {held} GPUs")
    return [
        f"{sizes} needs {ranks // nodes} GPUs on each of {nodes} nodes, and the profile gives {per_node} "
        f"(set-resources: {rule}: gres: {allocation.gres})\n    fix: {'; or '.join(ways)}"
    ]
