"""What a plan is made for: training settings, the samples, the cluster."""

import dataclasses
import functools
import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import engines, saving_tiers
from ..data import dealing
from ..errors import BadInputError
from ..expert_shards import AUTO, experts_per_shard
from ..json_files import Maybe
from .gpu_models import GPUS

GIB, MB = 1 << 30, 1 << 20  # Slurm's MB are powers of two
LOCAL_GB_PER_SECOND = 3.0  # one NVMe drive writes as much, several in a stripe a multiple
DTYPE_BYTES = {"bfloat16": 2, "float32": 4}


@dataclass(frozen=True)
class Validation:
    """The key ``train.validation``; ``keeps_best``: whether the best checkpoint is kept beside the newest."""

    every_steps: int
    samples: int
    keeps_best: bool = False


@dataclass(frozen=True)
class OwnDisks:
    """The entry of ``train.checkpoints`` for the nodes' own disks."""

    every_s: float
    keep: int


@dataclass(frozen=True)
class Training:
    """The part of the configuration's ``train`` section that decides memory, disk and time.

    Attributes:
        stock_experts: of the ``plan`` section: expert layers hold as much as stock xtuner's.
        save_every_minutes, keep_checkpoints: of the shared storage, wherever they are written.
        checkpoints: on the nodes' own disks; None saves none there.
    """

    strategy: str
    sequence_parallel_size: int
    micro_batch_size: int
    gradient_accumulation_steps: int
    epochs: float
    max_steps: int | None
    experts_per_shard: int
    dtype: str
    activation_checkpointing: bool
    save_every_steps: int
    keep_checkpoints: int
    offload: str = "both"
    gradient_accumulation_dtype: str = "float32"
    keep_layer_gathered: bool = False
    stock_experts: bool = False
    save_every_minutes: float | None = None
    gradient_communication_dtype: str | None = None
    accumulate_by: str = "rows"
    deal_rows: str | None = None
    zero_thresholds: str | None = None
    recompute: str = "full"
    expert_parallel_size: int = 1
    exchange_rows: int | None = None
    async_save: str | None = None
    engine: str = engines.DEFAULT
    validation: Validation | None = None
    checkpoints: OwnDisks | None = None

    @property
    def process(self) -> engines.ProcessMemory:
        """What one rank's process takes beside what is counted."""
        return engines.ENGINES[self.engine].memory

    @classmethod
    def from_config(cls, train: dict[str, Any], plan: dict[str, Any], model: dict[str, Any]) -> "Training":
        """From the configuration's sections and the model's ``config.json``."""
        keys = [*cls.train_keys(), "engine"]
        values = {key: train[key] for key in keys if key in train} | saving_tiers.of_shared(train)
        every_s = saving_tiers.local_seconds(train)
        values["checkpoints"] = every_s and OwnDisks(every_s, saving_tiers.local_keep(train))
        if values.get("validation"):
            given = values["validation"]
            values["validation"] = Validation(given["every_steps"], given["samples"], bool(given["early_stop"]))
        if values.get("expert_parallel_size") == AUTO:
            values["expert_parallel_size"] = 1  # until a plan is there to choose by: ``expert_choice``
        size = values.get("expert_parallel_size", 1)
        values["experts_per_shard"] = experts_per_shard(model, train["experts_per_shard"], size)
        return cls(**values, stock_experts=plan["stock_experts"])

    @classmethod
    def train_keys(cls) -> list[str]:
        """Keys of the ``train`` section that a plan depends on, beside the engine."""
        return [field.name for field in dataclasses.fields(cls) if field.name not in ("stock_experts", "engine")]

    def for_rows(self, samples: "Samples") -> "Training":
        """With accumulation counted in micro batches of these rows, also where it is counted in samples."""
        if self.accumulate_by == "rows":
            return self
        steps = dealing.accumulation_for(self.gradient_accumulation_steps, samples.per_row)
        return dataclasses.replace(self, gradient_accumulation_steps=steps, accumulate_by="rows")

    @property
    def saves_beside_steps(self) -> bool:
        """Whether checkpoints are written while the next step computes, as new runs do."""
        return not self.stock_experts and self.async_save != "off"

    @property
    def thresholds_by_shard(self) -> bool:
        """Whether ZeRO-3's thresholds follow the experts' shards, as new runs do; stock xtuner's are DeepSpeed's."""
        return not self.stock_experts and self.zero_thresholds != "deepspeed"

    @property
    def keeps_attention(self) -> bool:
        """Whether every layer keeps what attention's kernel gave, and does not compute it again."""
        return self.activation_checkpointing and self.recompute == "without_attention"

    @property
    def keeps_experts(self) -> bool:
        """Whether every layer keeps what its experts gave, and exchanges no rows to compute it again."""
        return self.activation_checkpointing and self.recompute == "without_experts"

    @property
    def offloads_optimizer(self) -> bool:
        """Whether master weights, Adam's moments and gradients are in host memory."""
        return self.strategy == "zero3_offload" and self.offload != "parameters"

    @property
    def offloads_parameters(self) -> bool:
        """Whether partitioned parameters are in host memory."""
        return self.strategy == "zero3_offload" and self.offload != "optimizer"

    @property
    def width(self) -> int:
        """Bytes of one element of parameters and activations."""
        return DTYPE_BYTES[self.dtype]

    @property
    def communication_width(self) -> int:
        """Bytes of one element of gradients while they are summed over the ranks; float32 unless said otherwise."""
        return DTYPE_BYTES[self.gradient_communication_dtype or "float32"]

    @property
    def gradient_width(self) -> int:
        """Bytes of one element of a rank's gradients, as they are held until the optimizer step."""
        several = self.gradient_accumulation_steps > 1
        return max(self.width, DTYPE_BYTES[self.gradient_accumulation_dtype]) if several else self.width


# What is needed of the receipt of tokenize_data; quantiles came later.
COUNTED = {
    "figures": {
        **dict.fromkeys(("rows", "mean_length", "longest"), float),
        "samples": Maybe(float),
        "packed": Maybe(bool),
        "row_quantiles": Maybe(dict),
        "held_out": Maybe(dict),
    }
}
FILLED = 0.97  # of packed rows, where it is not counted: best fit of lengths below half a row leaves less open
SPREAD = 0.8  # of a log-normal estimate of unpacked rows


@dataclass(frozen=True)
class Samples:
    """The rows to train on.

    Attributes:
        rows: rows of the token dataset; None where neither counted nor estimated.
        mean_length: tokens of a row on average.
        longest_row: tokens of the longest row: a micro batch is padded to its longest, so this decides memory.
        source: ``estimated`` from the configuration or ``counted`` by tokenize_data.
        per_row: samples of a row on average.
        packed: whether rows hold several samples.
        spread: rows that stand for all, evenly taken from them in the order of their lengths; None where all are taken
            to be of ``mean_length``.
        held_out: samples to validate on; None where neither counted nor estimated.
    """

    rows: int | None
    mean_length: float
    longest_row: int
    source: str
    per_row: float = 1.0
    packed: bool = False
    spread: dealing.Rows | None = None
    held_out: int | None = None

    @classmethod
    def estimated(cls, config: dict[str, Any]) -> "Samples":
        """From the configuration's ``plan`` and ``data`` sections; rows as long as allowed where nothing is said."""
        plan, allowed = config["plan"], config["data"]["max_length"]
        longest = min(plan["longest_row"] or allowed, allowed)
        mean, samples = min(plan["mean_length"] or longest, longest), plan["samples"]
        filled, share = FILLED * allowed, config["data"].get("held_out") or 0
        held_out = math.ceil(samples * share / (1 - share)) if samples and share else None
        if not config["data"].get("pack") or 2 * mean > filled:
            spread = None if mean == longest else estimate(mean, longest)
            return cls(samples, mean, longest, "estimated", spread=spread, held_out=held_out)
        rows = max(1, round(samples * mean / filled)) if samples else None
        one = np.full(dealing.QUANTILES, round(filled), np.int64)
        spread = dealing.Rows(one, _pairs(one, mean))
        return cls(rows, filled, allowed, "estimated", filled / mean, True, spread, held_out)

    @classmethod
    def counted(cls, receipt: dict[str, Any]) -> "Samples":
        """From the receipt of tokenize_data, read with ``COUNTED``."""
        figures = receipt["figures"]
        held_out = (figures.get("held_out") or {}).get("samples")
        rows, spread = figures["rows"], figures.get("row_quantiles")
        return cls(
            rows,
            figures["mean_length"],
            figures["longest"],
            "counted",
            (figures.get("samples") or rows) / rows,
            bool(figures.get("packed")),
            dealing.Rows(*(np.array(spread[name], np.int64) for name in ("lengths", "pairs"))) if spread else None,
            held_out if isinstance(held_out, int) else None,
        )


def _pairs(lengths: NDArray[np.int64], sample: float) -> NDArray[np.int64]:
    """Pairs of rows of these lengths whose samples have ``sample`` tokens each."""
    return (lengths * (sample + 1) / 2).astype(np.int64)


@functools.cache
def estimate(mean: float, longest: int) -> dealing.Rows:
    """Quantiles of a log-normal distribution that is cut at ``longest`` and has this mean."""
    normal = NormalDist()
    shares = [math.exp(SPREAD * normal.inv_cdf((i + 0.5) / dealing.QUANTILES)) for i in range(dealing.QUANTILES)]
    low, high = 0.0, float(longest) * 100
    for _ in range(60):  # by bisection: the mean grows with the scale
        scale = (low + high) / 2
        low, high = (
            (scale, high) if sum(min(scale * s, longest) for s in shares) / dealing.QUANTILES < mean else (low, scale)
        )
    lengths = np.array([max(1, round(min(high * share, longest))) for share in shares], np.int64)
    return dealing.Rows(lengths, lengths * (lengths + 1) // 2)


@dataclass(frozen=True)
class Cluster:
    """What training runs on. Bandwidths are 10⁹ bytes per second; None where unknown, which is not judged.

    Attributes:
        nodes, ranks_per_node: shape of the allocation.
        gpu_bytes: memory of one GPU that PyTorch can use; None on CPU.
        host_bytes: memory that a node's job gets.
        storage_bytes: free space for results.
        gpu_tflops: peak of dense BF16 matrix products of one GPU.
        node_gb_per_second: network of one node.
        memory_gb_per_second: host memory of one node.
        storage_gb_per_second: shared file system, all nodes together.
        failures_per_1000_node_days: how often a node fails.
        runtime_minutes: time limit of the job.
        signal_lead_s: seconds before the limit at which Slurm asks training to save.
        node_bytes: memory that a node physically has for jobs; None where neither the site nor Slurm says it.
        gres, slurm_extra: the profile's words.
        gpu: name of the GPU in planning/gpu_models.py; None where the configuration names none.
        nvlink_gb_per_second: between GPUs of a node, each direction.
        pcie_gb_per_second: between a GPU and its host, each direction.
        price_per_gpu_hour: in whatever currency; None where it is not told.
        local_gb_per_second: a node's own disk.
        local_bytes: space of a node's own disk.
    """

    nodes: int
    ranks_per_node: int
    gpu_bytes: float | None
    host_bytes: float | None
    storage_bytes: float | None
    gpu_tflops: float
    node_gb_per_second: float
    memory_gb_per_second: float
    storage_gb_per_second: float
    failures_per_1000_node_days: float
    runtime_minutes: int | None = None
    signal_lead_s: int | None = None
    node_bytes: float | None = None
    gres: str = ""
    slurm_extra: str = ""
    gpu: str | None = None
    nvlink_gb_per_second: float = GPUS["h100"].nvlink_gb_per_second
    pcie_gb_per_second: float = GPUS["h100"].pcie_gb_per_second
    price_per_gpu_hour: float | None = None
    local_gb_per_second: float = LOCAL_GB_PER_SECOND
    local_bytes: float | None = None

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node

    @property
    def cpu(self) -> bool:
        return self.gpu_bytes is None

    @classmethod
    def from_config(
        cls,
        config: dict[str, Any],
        resources: dict[str, Any],
        storage_bytes: float | None,
        node_mb: int | None = None,
    ) -> "Cluster":
        """Shape and memory from the profile's resources of ``train``, speeds from the ``plan`` section.

        Args:
            node_mb: memory of a node as Slurm says it, in its MB.

        Raises:
            BadInputError: the number of ranks per node is not known.
        """
        plan, cpu = config["plan"], config["accelerator"] == "cpu"
        ranks = config["train"]["ranks_per_node"] if cpu else resources.get("gpus_per_node")
        if not ranks:
            raise BadInputError(
                "the number of GPUs per node is not known: the profile asks for none for rule train",
                'write `gres: "gpu:8"` below set-resources: train: in the profile, or give '
                """--resources '{"nodes": 32, "gpus_per_node": 8}'""",
            )
        stated, physical, gpu = plan["storage_tb"], plan.get("node_memory_gib"), plan.get("gpu")
        return cls(
            nodes=resources.get("nodes", 1),
            ranks_per_node=ranks,
            gpu_bytes=None if cpu else plan["gpu_memory_gib"] * GIB,
            host_bytes=resources["mem_mb"] * MB if resources.get("mem_mb") else None,
            storage_bytes=storage_bytes if stated is None else stated * 1e12,
            gpu_tflops=plan["gpu_tflops"],
            node_gb_per_second=plan["node_gb_per_second"],
            memory_gb_per_second=plan["memory_gb_per_second"],
            storage_gb_per_second=plan["storage_gb_per_second"],
            failures_per_1000_node_days=plan["failures_per_1000_node_days"],
            runtime_minutes=resources.get("runtime"),
            signal_lead_s=resources.get("signal_lead_s"),
            node_bytes=physical * GIB if physical else node_mb * MB if node_mb else None,
            gres=resources.get("gres", ""),
            slurm_extra=resources.get("slurm_extra", ""),
            gpu=None if cpu else gpu,
            nvlink_gb_per_second=GPUS[gpu or "h100"].nvlink_gb_per_second,
            pcie_gb_per_second=GPUS[gpu or "h100"].pcie_gb_per_second,
            price_per_gpu_hour=plan.get("price_per_gpu_hour"),
            local_gb_per_second=plan.get("local_gb_per_second") or LOCAL_GB_PER_SECOND,
            local_bytes=plan["local_tb"] * 1e12 if plan.get("local_tb") else None,
        )
