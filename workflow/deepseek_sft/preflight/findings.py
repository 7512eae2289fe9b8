"""What one check found on one node."""

from dataclasses import asdict, dataclass
from typing import Any

CHECKS = {
    "host_memory": "free memory against the plan's host memory",
    "shared_memory": "free space of /dev/shm, which NCCL and PyTorch use between the ranks of a node",
    "locked_memory": "limit of locked memory: pinned buffers and InfiniBand need it unlimited (GPUs only)",
    "disk": "free space and inodes of the results folder against the plan",
    "local_disk": "free space of the node's own folder for temporary files",
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


@dataclass(frozen=True)
class Finding:
    """One check on one node.

    Attributes:
        check: a key of ``CHECKS``.
        passed: None where the check did not apply.
        detail: what was found, one sentence without the node's name.
        value: the same in a few characters, for the table.
    """

    check: str
    passed: bool | None
    detail: str
    value: str = ""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)
