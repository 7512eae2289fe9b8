"""How fast one rank's device and its share of the host's memory are, all ranks of the job at the same time.

At the same time, since a GPU that is alone on its node gets power and cooling that it will not have in training.
"""

import os
import statistics
import time

import torch

SIZES = {"cuda": 8192, "cpu": 256}  # of the square matrices of a product
BATCHES = 5  # whose median counts: one hiccup is not a slow device
LEAST_S = {"cuda": 0.5, "cpu": 0.02}  # of a batch: long enough for clocks to settle
COPIED = {"cuda": 256 << 20, "cpu": 32 << 20}  # bytes: together more than the caches of a node hold


def multiply(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> None:
    """One product."""
    torch.mm(left, right, out=out)


def gemm_tflops(device: torch.device) -> float:
    """TFLOP/s of dense products: bf16 on GPUs, fp32 on CPU."""
    size, dtype = SIZES[device.type], torch.bfloat16 if device.type == "cuda" else torch.float32
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty(size, size, device=device, dtype=dtype)
    multiply(left, right, out)  # warm up
    rates = []
    for _ in range(BATCHES):
        _wait(device)
        started, done = time.perf_counter(), 0
        while done == 0 or time.perf_counter() - started < LEAST_S[device.type]:
            for _ in range(8):
                multiply(left, right, out)
            done += 8
            _wait(device)
        rates.append(2 * size**3 * done / (time.perf_counter() - started) / 1e12)
    return statistics.median(rates)


def memory_gb_per_second(kind: str, threads: int) -> float:
    """GB/s, read and written, of copies within host memory by ``threads`` threads; ``kind`` as of the training."""
    torch.set_num_threads(max(1, threads))
    elements = COPIED[kind] // 4
    source, target = torch.ones(elements), torch.empty(elements)
    target.copy_(source)
    rates = []
    for _ in range(BATCHES):
        started = time.perf_counter()
        target.copy_(source)
        rates.append(2 * 4 * elements / 1e9 / (time.perf_counter() - started))
    return statistics.median(rates)


def threads_of(ranks_per_node: int) -> int:
    """CPUs that each of so many ranks has."""
    return max(1, len(os.sched_getaffinity(0)) // ranks_per_node)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
