"""Time, memory and error of something on a device."""

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

GIB = 1 << 30


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def milliseconds(device: str, call: Callable[[], Any], times: int = 5) -> float:
    """Median of ``times`` calls, after one that is not counted."""
    call()
    found = []
    for _ in range(times):
        wait(device)
        started = time.perf_counter()
        call()
        wait(device)
        found.append(1000 * (time.perf_counter() - started))
    return round(statistics.median(found), 3)


def peak_gib(device: str, call: Callable[[], Any]) -> float | None:
    """Memory that a call takes at most beyond what was there; None on a CPU, where torch does not count it."""
    if device != "cuda":
        call()
        return None
    torch.cuda.empty_cache()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / GIB, 3)


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Norm of the difference over the norm of what is wanted; infinite where a value is not finite."""
    found, wanted = found.double(), wanted.double()
    apart = float((found - wanted).norm() / wanted.norm().clamp(min=1e-30))
    return apart if math.isfinite(apart) else 1e30
