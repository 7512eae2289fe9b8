"""256 ranks of which 255 are faked: one run of ``scale_worker.py``, and what comes into a node of 671B."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[1]


def faked(*arguments: Any) -> dict[str, Any]:
    """Figures of ``scale_worker.py``."""
    paths = ":".join(str(PROJECT / folder) for folder in ("workflow", "tests", "tests/gpu"))
    done = subprocess.run(
        [PROJECT / ".envs/train/bin/python", PROJECT / "benchmarks/scale_worker.py", *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def exchange(bench: Any) -> None:
    """What comes into a node of 671B on 32 nodes, experts over 64 ranks: rows and gathers counted, beside the plan."""
    from deepseek_sft import families
    from deepseek_sft.planning import load
    from deepseek_sft.planning.counting import count as counted
    from deepseek_sft.planning.expert_exchange import Exchange
    from deepseek_sft.planning.settings import Cluster, Training

    tokens, parallel = 128, 64
    model = counted(families.read_config(load.SHAPES / "deepseek-v3"))
    shape = {"strategy": "zero3_offload", "sequence_parallel_size": 1, "micro_batch_size": 1, "epochs": 1}
    shape |= {"gradient_accumulation_steps": 1, "max_steps": None, "experts_per_shard": 256 // parallel}
    shape |= {"dtype": "bfloat16", "activation_checkpointing": True, "save_every_steps": 100, "keep_checkpoints": 2}
    spread = {"recompute": "without_experts", "expert_parallel_size": parallel}
    training = Training(**shape, **spread, gradient_communication_dtype="bfloat16")
    nodes = {"nodes": 32, "ranks_per_node": 8, "gpu_bytes": None, "host_bytes": None, "storage_bytes": None}
    speeds = dict.fromkeys(("gpu_tflops", "node_gb_per_second", "memory_gb_per_second", "storage_gb_per_second"), 1.0)
    plan = Exchange(model, training, Cluster(**nodes, **speeds, failures_per_1000_node_days=1.0))
    found = faked(bench.layers, 256 // parallel, parallel, "ours", tokens)
    layers = bench.layers - model.layers + model.moe_layers
    visits = found["rows of other nodes"] / (layers * plan.passes * tokens)
    print(f"32 nodes × 8 of 671B, experts over {parallel} ranks, {bench.layers} layers, bf16; 255 ranks faked")
    print(f"  other nodes of a token and pass: {visits:.2f}, the plan's {plan.visits:.2f}")
    moves, planned = found["experts moved"], plan.gathers()[0] + 1
    print(f"  gathers and scatters of a rank's experts in a micro batch: {moves:.2f}, the plan's {planned:.2f}")
    others = plan.weights_into_node() - 2 * planned * plan.experts_into_node()
    for each in (16_384, 8_192, 4_096):
        rows = plan.rows_into_node(each)
        terabytes = (2 * moves * plan.experts_into_node() + others + rows * visits / plan.visits) / 1e12
        told = (plan.weights_into_node() + rows) / 1e12
        print(f"  {each:,} tokens a rank: {terabytes:.2f} TB into a node, the plan's {told:.2f}")
        bench.bar(f"counted / planned, {each:,} tokens", max(terabytes / told, told / terabytes), 1.1)
