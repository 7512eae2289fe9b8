"""Run by the train environment's Python: what a clock times, and which time-out a group gets; prints a JSON object."""

import datetime
import json

import torch
import torch.distributed as dist
from torch import nn

from deepseek_sft.training.xtuner_engine import compat
from deepseek_sft.training.xtuner_engine.compute_clock import ComputeClock

LAYERS, WIDTH = 61, 8


def main() -> None:
    layers = nn.ModuleList(nn.Sequential(*(nn.Linear(4, 4) for _ in range(WIDTH))) for _ in range(LAYERS))
    clock = ComputeClock(layers, torch.device("cpu"))
    kinds = {index for layer in layers for index, module in enumerate(layer) if module in clock.timed}
    tokens = torch.ones(2, 5, 4)
    for layer in layers:
        tokens = layer(tokens)
    (seconds, rows), after = clock.take(), clock.take()

    timeout = datetime.timedelta(hours=5)
    compat.limit_every_group(timeout)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    group = dist.new_group([0])  # as DeepSpeed and xtuner make theirs
    found = group._get_backend(torch.device("cpu")).options._timeout
    told = {"timed": len(clock.timed), "kinds": len(kinds), "rows": rows, "seconds": seconds, "after": list(after)}
    print(json.dumps(told | {"timeout_hours": found.total_seconds() / 3600}))


if __name__ == "__main__":
    main()
