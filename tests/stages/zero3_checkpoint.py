"""Makes a real DeepSpeed ZeRO-3 checkpoint of a base model in the training layout (run by torchrun, needs no GPU).

usage: torchrun zero3_checkpoint.py BASE OUTPUT [EXPERTS_PER_SHARD SUB_GROUP_SIZE PREFIX DTYPE(bf16|fp32)]

Every parameter takes part in a made-up loss, so that a few AdamW steps move each of them. The names and the fusing of
experts follow the training engine: prefix ``llm.``, ``experts.K.w1w3`` [n, 2·ffn, hidden] (gate, then up) and
``experts.K.w2`` [n, hidden, ffn]. The client state holds objects of mmengine, as an xtuner run leaves them.
"""

import json
import os
import sys
from pathlib import Path

import deepspeed
import torch
from mmengine.config import ConfigDict
from mmengine.logging import HistoryBuffer
from safetensors import safe_open


class Node(torch.nn.Module):
    """Holds tensors under dotted names; its forward touches each parameter through its own module, as ZeRO-3 wants."""

    def put(self, name: str, tensor: torch.Tensor) -> None:
        first, _, rest = name.partition(".")
        if rest:
            if first not in self._modules:
                self.add_module(first, Node())
            self._modules[first].put(rest, tensor)
        elif first == "e_score_correction_bias":
            self.register_buffer(first, tensor)
        else:
            self.register_parameter(first, torch.nn.Parameter(tensor))

    def forward(self):
        total = 0.0
        for parameter in self._parameters.values():
            target = torch.linspace(-1, 1, parameter.numel(), dtype=parameter.dtype).view_as(parameter)
            total = total + ((parameter - target).float() ** 2).sum()
        for module in self._modules.values():
            total = total + module()
        return total


def training_tensors(base: Path, experts_per_shard: int):
    config = json.loads((base / "config.json").read_text())
    tensors = {}
    for file in sorted(base.glob("*.safetensors")):
        with safe_open(file, "pt") as stored:
            tensors |= {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}.mlp.experts"
        if f"{prefix}.0.up_proj.weight" not in tensors:
            continue
        for shard in range(config["n_routed_experts"] // experts_per_shard):
            experts = range(shard * experts_per_shard, (shard + 1) * experts_per_shard)
            halves = [tensors.pop(f"{prefix}.{e}.{half}_proj.weight") for e in experts for half in ("gate", "up")]
            rows, hidden = halves[0].shape
            tensors[f"{prefix}.{shard}.w1w3"] = torch.stack(halves).view(experts_per_shard, 2 * rows, hidden)
            tensors[f"{prefix}.{shard}.w2"] = torch.stack(
                [tensors.pop(f"{prefix}.{e}.down_proj.weight") for e in experts]
            )
    return tensors


def main() -> None:
    base, output = Path(sys.argv[1]), Path(sys.argv[2])
    experts_per_shard, sub_group_size = int(sys.argv[3]), int(sys.argv[4])
    prefix, dtype = sys.argv[5], sys.argv[6]
    torch.manual_seed(0)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # gloo alone: no compiler needed
    deepspeed.init_distributed("gloo")
    model = Node()
    for name, tensor in training_tensors(base, experts_per_shard).items():
        model.put(prefix + name, tensor.float())
    biases = {n: b.clone() for n, b in model.named_buffers()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        config=ConfigDict(
            train_micro_batch_size_per_gpu=1,
            bf16={"enabled": dtype == "bf16"},
            zero_optimization={"stage": 3, "sub_group_size": sub_group_size},
            zero_allow_untested_optimizer=True,
            zero_force_ds_cpu_optimizer=False,
        ),
    )
    for name, buffer in engine.module.named_buffers():  # DeepSpeed rounds buffers to BF16; training keeps them in FP32
        buffer.data = biases[name]
    for _ in range(3):
        engine.backward(engine())
        engine.step()
    history = HistoryBuffer([1.0, 2.0], [1, 1])
    engine.save_checkpoint(
        str(output.parent),
        tag=output.name,
        client_state={"meta": {"iter": 3, "epoch": 1}, "message_hub": {"log_scalars": {"loss": history}}},
        save_latest=False,
    )
    if os.environ["RANK"] == "0":
        Path(str(output) + ".parameters.json").write_text(json.dumps(len(biases)))


if __name__ == "__main__":
    main()
