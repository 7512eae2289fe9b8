"""All tokens on the experts of one rank: what it allocates beside the plan's bound, and whether it is exact."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from faked_ranks import PROJECT

RANKS, ROWS, TOKENS = 4, 4_096, 2_048
WORST = 1e-5


def skew(bench: Any) -> None:
    """The busiest rank's peak in a layer's exchange, backward, rows in eight chunks; inside a node and over two."""
    from deepseek_sft.convert import tiny_model
    from deepseek_sft.planning.counting import count
    from deepseek_sft.planning.expert_exchange import Exchange
    from deepseek_sft.planning.settings import Cluster, Training

    hidden, ffn, held, top_k = 512, 256, 8, 4  # skew_worker.py
    shape = {"hidden_size": hidden, "moe_intermediate_size": ffn, "routed_experts": held * RANKS}
    model = count(tiny_model.config_of(tiny_model.TinyShape(**shape, experts_per_token=top_k)))
    settings = {"strategy": "zero3", "sequence_parallel_size": 1, "micro_batch_size": 1, "epochs": 1, "max_steps": None}
    settings |= {"gradient_accumulation_steps": 1, "experts_per_shard": held, "dtype": "float32"}
    settings |= {"activation_checkpointing": True, "save_every_steps": 1, "keep_checkpoints": 1}
    training = Training(**settings, expert_parallel_size=RANKS, exchange_rows=ROWS)
    limits = dict.fromkeys(("gpu_bytes", "host_bytes", "storage_bytes"))
    speeds = dict.fromkeys(("gpu_tflops", "node_gb_per_second", "memory_gb_per_second", "storage_gb_per_second"), 1.0)
    for nodes in (1, 2):
        cluster = Cluster(nodes, RANKS // nodes, **limits, **speeds, failures_per_1000_node_days=1.0)
        planned = sum(term.value for term in Exchange(model, training, cluster).buffers())
        planned += 4 * held * model.expert_parameters  # of the parameters' gradients
        planned += (
            2 * 4 * hidden * TOKENS * (top_k if nodes == 1 else 1)
        )  # gradients of this rank's own rows, or tokens
        output = Path(bench.folder) / f"skew-{nodes}.json"
        paths = f"{PROJECT / 'workflow'}:{PROJECT / 'tests'}"
        variables = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo"}
        words = [PROJECT / ".envs/train/bin/python", PROJECT / "benchmarks/skew_worker.py"]
        words += [str(RANKS), str(RANKS // nodes), str(ROWS), str(TOKENS), output]
        subprocess.run(words, env=os.environ | variables, stderr=subprocess.DEVNULL, check=True)
        found = json.loads(output.read_text())
        print(
            f"{RANKS} ranks on {nodes} nodes, all tokens on rank 0's experts: {found['rows_arrived']:,} rows "
            f"in chunks of {ROWS:,}; peak {found['peak'] / 2**20:.1f} MiB, planned {planned / 2**20:.1f}"
        )
        bench.bar("peak / planned", found["peak"] / planned, 1.05)
        bench.bar("largest relative difference of outputs and gradients / 1e-5", found["worst"] / WORST, 1.0)
