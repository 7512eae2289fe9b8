"""What a rank's process and device hold, and where its tensors live."""

import resource

import torch
import torch.distributed as dist

from .. import process_memory

GIB = 1 << 30


def memory_gib() -> float:
    """Peak memory of this process: of the GPU's allocator, on CPU the resident set."""
    return torch.cuda.max_memory_allocated() / GIB if torch.cuda.is_available() else resident_gib()


def resident_gib() -> float:
    """Peak resident set of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def kept_gib() -> float:
    """Freed memory that the C library keeps in this process; -1 where it does not tell."""
    kept = process_memory.kept_by_allocator()
    return -1.0 if kept is None else kept / GIB


def rank_device() -> torch.device:
    """Where this rank's tensors live."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def most_over_ranks(*values: float) -> list[float]:
    together = torch.tensor(values, dtype=torch.float64, device=rank_device())
    dist.all_reduce(together, op=dist.ReduceOp.MAX)
    return [round(value, 3) for value in together.tolist()]
