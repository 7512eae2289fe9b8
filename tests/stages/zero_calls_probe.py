"""Our reduce-scatter and gathers of ZeRO-3 against DeepSpeed's own, on three real ranks; prints JSON.

Usage: zero_calls_probe.py FOLDER
"""

import json
import os
import sys
from pathlib import Path

import torch
import training_ranks

RANKS = 3
SIZES = ([1], [2], [3], [7, 1, 12], [30], [5, 64, 2, 9], [8, 8])  # fewer elements than ranks, uneven, even


def compare(folder: Path) -> None:
    """On each rank: the same tensors through both."""
    import deepspeed
    from deepspeed.runtime.comm.coalesced_collectives import reduce_scatter_coalesced

    from deepseek_sft.training.xtuner_engine import zero_calls

    rank, differences = torch.distributed.get_rank(), []
    group = torch.distributed.group.WORLD
    for dtype in (torch.bfloat16, torch.float32):
        for sizes in SIZES:
            generator = torch.Generator().manual_seed(rank)
            tensors = [torch.randn(size, generator=generator).to(dtype) for size in sizes]
            own = reduce_scatter_coalesced([tensor.clone() for tensor in tensors], group)
            ours = zero_calls.reduce_scatter([tensor.clone() for tensor in tensors], group)
            if not all(torch.equal(one, other) for one, other in zip(own, ours, strict=True)):
                differences.append(f"{dtype} {sizes}")
    gathered = []
    for alone in (1, 50, 1 << 24):  # each by itself, some together, all together
        zero_calls.ALONE = alone
        gathered.append(gathers_alike(deepspeed, zero_calls))
    figures = {"reduced differently": differences, "gathered alike": gathered}
    (folder / f"rank{rank}.json").write_text(json.dumps(figures))


def gathers_alike(deepspeed, zero_calls) -> bool:
    """Parameters gathered by DeepSpeed's own way and by ours, and again after they were let go."""
    with deepspeed.zero.Init(config_dict_or_path={"zero_optimization": {"stage": 3}, "train_batch_size": RANKS}):
        model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 11), torch.nn.LayerNorm(11))
    parameters = list(model.parameters())
    handle = parameters[0].all_gather_coalesced(parameters)
    handle.wait()
    expected = [parameter.data.clone() for parameter in parameters]
    for parameter in parameters:
        parameter.partition()
    assert zero_calls.install(model)
    for _ in range(2):
        handle = parameters[0].all_gather_coalesced(parameters)
        handle.wait()
        parameters[0].partition()
        handle.wait()  # DeepSpeed waits once for each parameter: what was let go meanwhile stays away
        if parameters[0].ds_status.name != "NOT_AVAILABLE":
            return False
        if not all(torch.equal(p.data, one) for p, one in zip(parameters[1:], expected[1:], strict=True)):
            return False
        for parameter in parameters[1:]:
            parameter.partition()
    return True


if __name__ == "__main__":
    out = Path(sys.argv[1])
    os.environ["DS_ACCELERATOR"] = "cpu"
    training_ranks.import_libraries()
    training_ranks.group(RANKS, compare, out / "meeting", out)
    print(json.dumps([json.loads(path.read_text()) for path in sorted(out.glob("rank*.json"))]))
