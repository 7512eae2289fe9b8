"""Plans of the published cluster for the tests of planning."""

import functools

import planning_models as models

from deepseek_sft.planning import plan as planning
from deepseek_sft.planning.counting import count
from deepseek_sft.planning.settings import GIB, MB, Cluster, Samples, Training, estimate

LONGEST_ROW = 16_384  # of all published rows alike: docs/planning.md


@functools.cache
def _counted(name: str):
    return count(getattr(models, name))


def cluster(nodes: int, **changes) -> Cluster:
    """Nodes of 8 × H100 with 1.9 TB for the job each, 100 TB of storage."""
    values = {
        "nodes": nodes,
        "ranks_per_node": 8,
        "gpu_bytes": 79.1 * GIB,
        "host_bytes": 1_900_000 * MB,
        "storage_bytes": 100e12,
        "gpu_tflops": 989,
        "node_gb_per_second": 400,
        "memory_gb_per_second": 600,
        "storage_gb_per_second": 20,
        "failures_per_1000_node_days": 6.5,
    }
    return Cluster(**(values | changes))


def training(size: int, strategy: str, micro_batch: int) -> Training:
    """As the published runs were: DeepSpeed sums gradients in the model's dtype unless told otherwise."""
    shape = (strategy, size, micro_batch, 4 * size, 1, None, 8, "bfloat16", True, 100, 2)
    return Training(*shape, stock_experts=True, gradient_communication_dtype="bfloat16", deal_rows="order")


def make(config: dict, chosen: Training, where: Cluster, longest_row: int = LONGEST_ROW) -> planning.Plan:
    name = "DEEPSEEK_V3" if config is models.DEEPSEEK_V3 else "MOONLIGHT_16B"
    mean = min(8_000, longest_row)
    spread = estimate(mean, longest_row) if mean < longest_row else None
    samples = Samples(100_000, mean, longest_row, "estimated", spread=spread)
    return planning.make(_counted(name), chosen, samples, where)


def published(
    nodes: int, size: int, strategy: str, micro_batch: int, longest_row: int = LONGEST_ROW, **changes
) -> planning.Plan:
    """A plan of DeepSeek-V3 with the settings of a row of the published table."""
    return make(models.DEEPSEEK_V3, training(size, strategy, micro_batch), cluster(nodes, **changes), longest_row)
