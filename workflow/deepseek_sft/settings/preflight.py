"""Checks of the nodes before training."""

from collections.abc import Iterator
from typing import Annotated, Literal

from annotated_types import Gt, Le

from .field_types import AboveZero, NotNegative, Number, Truth, section, setting

CHECKS = {
    "host_memory": "free memory against the plan's host memory",
    "shared_memory": "free space of /dev/shm, which NCCL and PyTorch use between the ranks of a node",
    "locked_memory": "limit of locked memory: pinned buffers and InfiniBand need it unlimited (GPUs only)",
    "disk": "free space and inodes of the results folder against the plan",
    "local_disk": "free space of the node's own folder for temporary files",
    "own_disk": "the folder of `train.checkpoints` on the node's own disk: writable, with space, and no other node's",
    "shared_files": "a file written to the results folder, and another node's read back",
    "code": "the same workflow code on all nodes",
    "software": "the same Python and packages on all nodes, and training can be imported",
    "model": "the same base model and tokens seen from all nodes",
    "clock": "clocks that agree",
    "ports": "the port of the rendezvous, free on every node and reachable from the others",
    "gpus": "count, model, driver, memory, ECC errors and foreign processes of the GPUs",
    "infiniband": "as many active InfiniBand ports as the other nodes have",
    "cpus": "CPUs and cores that the job may use, against the node's",
    "gemm": "matrix products of every device at the same time, against the median",
    "memory_bandwidth": "copies in host memory by all ranks of a node, against the median",
    "nvlink": "sum over the ranks of one node (over NVLink on GPUs), against the median",
    "all_reduce": "sum over all ranks, so over the network: right, and fast enough",
}


@section
class Checks:
    skip: tuple[Literal[*CHECKS], ...] = ()
    """Checks that are switched off."""
    all_reduce_backend: Literal["auto", "nccl", "gloo", "sockets"] = "auto"
    """What puts the network under load: torch over NCCL or gloo, or plain sockets in a ring; `auto` is nccl on GPUs,
    gloo on up to 4 CPU nodes, sockets above."""
    all_reduce_mb: AboveZero | None = None
    """Size of the message in MB; null is 1024 for nccl, 16 for gloo, 32 for sockets."""
    all_reduce_min_gb_per_second: NotNegative | None = None
    """Least bus bandwidth of the all-reduce in GB/s; null is 40 % of `plan.node_gb_per_second` on GPUs (the least that
    the plan's time range assumes), none on CPU."""
    clock_skew_s: AboveZero = 1.0
    """Seconds that clocks may differ."""
    local_disk_gb: NotNegative = 2.0
    """GB (10⁹ bytes) that must be free for temporary files on each node."""
    shared_memory_gb: NotNegative = 1.0
    """GB that must be free in /dev/shm of each node."""
    slow_percent: Annotated[Number, Gt(0), Le(45)] | None = setting(None, later=True)
    """A device whose matrix products, or a node whose NVLink, is this many percent below the median is bad (host
    memory: twice as many); null is 10 on GPUs and judges nothing on CPU, where others may use the same cores."""
    timeout_s: AboveZero = 600
    """Seconds after which a node that has said nothing counts as bad."""

    def problems(self) -> Iterator[str]:
        for check in sorted({check for check in self.skip if self.skip.count(check) > 1}):
            yield f"skip: {check} stands there twice"
        if self.all_reduce_min_gb_per_second is not None and "all_reduce" in self.skip:
            yield (
                "all_reduce_min_gb_per_second: cannot be judged, since `skip` has all_reduce; take it out of `skip`, "
                "or write all_reduce_min_gb_per_second: null"
            )


@section
class Preflight(Checks):
    in_training: Truth = True
    """Check the very nodes of each training job as its first step; `snakemake preflight` checks without training."""
