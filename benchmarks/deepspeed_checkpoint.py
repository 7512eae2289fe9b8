"""Writes a ZeRO-3 checkpoint of a base model's shape with DeepSpeed itself (run by torchrun in the train environment).

usage: torchrun deepspeed_checkpoint.py BASE OUTPUT    OUTPUT: .../iter_1.pth

Parameters carry xtuner's prefix and the release's names, so that DeepSpeed's, xtuner's and our converter all read it.
They are partitioned as they are made: no rank ever holds the model.
"""

import sys
from pathlib import Path

import deepspeed
import torch
from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests/stages"))

from deepspeed_states import Node

PREFIX = "llm."
SETTINGS = {
    "train_micro_batch_size_per_gpu": 1,
    "bf16": {"enabled": True},
    "zero_optimization": {
        "stage": 3,
        "sub_group_size": 100_000_000,
        "stage3_max_live_parameters": 10_000_000,
        "stage3_max_reuse_distance": 10_000_000,
        "stage3_prefetch_bucket_size": 1_000_000,
        "reduce_bucket_size": 40_000_000,  # elements; by default every rank holds 500 million of them
    },
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}


class Light(Node):
    """Keeps no activations: every rank computes the whole loss."""

    def loss(self, parameter: torch.Tensor) -> torch.Tensor:
        return parameter.sum(dtype=torch.float32)


def main() -> None:
    base, output = Path(sys.argv[1]), Path(sys.argv[2])
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # gloo alone: no compiler needed
    deepspeed.init_distributed("gloo")
    torch.manual_seed(0)
    shapes = {}
    for file in sorted(base.glob("*.safetensors")):
        with safe_open(file, "pt") as stored:
            shapes |= {name: stored.get_slice(name).get_shape() for name in stored.keys()}  # noqa: SIM118
    model = Light()
    with deepspeed.zero.Init(config_dict_or_path=SETTINGS):
        for name, shape in shapes.items():
            bias = name.endswith("e_score_correction_bias")
            values = torch.zeros(shape) if bias else torch.randn(shape) * 0.02
            model.put(PREFIX + name, values, buffer=bias, trained=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=SETTINGS)
    engine.backward(engine())
    engine.step()
    engine.save_checkpoint(str(output.parent), tag=output.name, client_state={"meta": {"iter": 1}}, save_latest=False)


if __name__ == "__main__":
    main()
