"""What a plan counts with: estimates of the samples, and the cluster's figures."""

from collections.abc import Iterator
from typing import Annotated, Literal

from annotated_types import Ge

from ..planning.gpu_models import GPUS
from .field_types import AboveZero, Number, Positive, Truth, section, setting

SHAPES = ("deepseek-v3", "deepseek-r1", "moonlight-16b-a3b")  # folders of resources/models


@section
class Plan:
    on_misfit: Literal["stop", "warn"] = "stop"
    """What a plan that does not fit does: stops the chain before the base model is prepared, or warns."""
    stock_experts: Truth = False
    """Plan the memory of stock xtuner's expert layers, which hold all gathered experts of a layer and fp32 gradients of
    their outputs, instead of this workflow's: for the published table, whose runs had them."""
    samples: Positive | None = None
    """Estimate of the samples, until tokenize_data has counted them; null leaves steps and time of the run unknown."""
    mean_length: Annotated[Number, Ge(1)] | None = None
    """Estimate of a sample's tokens on average, until they are counted; null plans with the longest."""
    longest_row: Positive | None = None
    """Estimate of the longest sample's tokens, until they are counted; null plans with `data.max_length`. A micro batch
    is padded to its longest sample, so this decides GPU memory."""
    model: Literal[*SHAPES] | None = setting(None, later=True)
    """Plan with this public model's shape (`resources/models`) as long as `model.base` is not there; nothing is
    downloaded."""
    gpu: Literal[*GPUS] | None = setting(None, later=True)
    """GPU by name: its memory and peak stand for `gpu_memory_gib` and `gpu_tflops` where these are not given
    (docs/planning.md has the table)."""
    node_memory_gib: AboveZero | None = setting(None, later=True)
    """Memory that a node physically has for jobs, in GiB, so that no plan asks for more; null asks Slurm (`sinfo`)."""
    gpu_memory_gib: AboveZero = 79.1
    """Memory of one GPU that PyTorch sees, in GiB (an H100 of 80 GB: 79.1)."""
    gpu_tflops: AboveZero = 989
    """Peak of dense BF16 matrix products of one GPU, in TFLOP/s."""
    node_gb_per_second: AboveZero = 400
    """Line rate of one node's network in GB/s (8 adapters of 400 Gbit/s: 400)."""
    memory_gb_per_second: AboveZero = 600
    """Host memory bandwidth of one node in GB/s (two sockets of 8 channels DDR5-4800: 614)."""
    storage_gb_per_second: AboveZero = 20
    """What the shared file system takes and gives from all nodes together, in GB/s."""
    local_gb_per_second: AboveZero = setting(3.0, later=True)
    """What a node's own disk takes and gives, in GB/s (one NVMe drive: 3; several in a stripe: a multiple), for
    `train.checkpoints`."""
    local_tb: AboveZero | None = setting(None, later=True)
    """Space of a node's own disk in TB; null leaves that to preflight."""
    storage_tb: AboveZero | None = None
    """Space for results in TB (10¹² bytes); null takes what is free where `results` lies."""
    failures_per_1000_node_days: AboveZero = 6.5
    """Failures of nodes, for the cadence of checkpoints."""

    price_per_gpu_hour: AboveZero | None = setting(None, later=True)
    """Price of a GPU's hour, in whatever currency, for what plan, status and report say of cost; null tells GPU hours
    alone."""

    def problems(self) -> Iterator[str]:
        if self.mean_length and self.longest_row and self.mean_length > self.longest_row:
            yield "mean_length: is above longest_row"
