"""Rank 0 of 256 ranks that are not there, for ``benchmarks/train.py scale``; run by the train environment's Python.

Usage: scale_worker.py LAYERS EXPERTS_PER_SHARD EXPERT_PARALLEL_SIZE ours|stock [TOKENS]
TOKENS: of rank 0 in the micro batch, a multiple of 128 [32].
Prints one JSON object. ``workflow``, ``tests`` and ``tests/gpu`` on its path.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

import fake_ranks
import torch


def loop_seconds() -> float:
    """What this machine's Python takes for ten million additions, the best of three."""
    best = float("inf")
    for _ in range(3):
        begin, total = time.process_time(), 0
        for number in range(10_000_000):
            total += number
        best = min(best, time.process_time() - begin)
    return best


def main(layers: int, experts_per_shard: int, expert_parallel_size: int, ours: bool, tokens: int) -> None:
    torch.set_num_threads(1)
    shape = (tokens // 128, 128) if tokens else fake_ranks.SHAPE
    fake_ranks.start("cpu", 256)
    with tempfile.TemporaryDirectory() as folder:
        base = fake_ranks.scaled_base(Path(folder) / "scaled", num_hidden_layers=layers)
        figures = fake_ranks.measured(
            "cpu", base, ("optimizer", "param"), ours, experts_per_shard, expert_parallel_size, shape
        )
    print(json.dumps(figures | {"loop s": loop_seconds()}))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]), sys.argv[4] == "ours", int(sys.argv[5]) if len(sys.argv) > 5 else 0)
