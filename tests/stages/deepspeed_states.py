"""Has DeepSpeed write checkpoints of a base model in training's layout (run by torchrun, needs no GPU).

usage: torchrun deepspeed_states.py BASE CASES.json

Each case (see ``Case``) is a checkpoint of its own after a few steps of AdamW, in which a made-up loss moves every
trained parameter. Names and fused experts are those of the training engine: ``experts.K.w1w3`` [n, 2·ffn, hidden]
(gate, then up) and ``experts.K.w2`` [n, hidden, ffn]. The client state holds objects of mmengine, as xtuner's does.
"""

import dataclasses
import json
import re
import sys
from pathlib import Path

import deepspeed
import torch
from mmengine.config import ConfigDict
from mmengine.logging import HistoryBuffer
from safetensors import safe_open

BIAS = "e_score_correction_bias"
STEPS = 3


@dataclasses.dataclass
class Case:
    """What kind of checkpoint.

    Attributes:
        output: folder of the checkpoint.
        stage: of ZeRO.
        prefix: before every name; ``llm.`` is xtuner's.
        dtype: ``bf16`` or ``fp32``.
        frozen: pattern of names that are not trained.
        biases: of the router: ``fp32`` buffers, ``bf16`` buffers (as DeepSpeed rounds them), or bf16 ``parameters``
            that are not trained.
        two_groups: norms in a parameter group of their own.
        fp32_gradients: with stage 1 and bf16 DeepSpeed takes its BF16 optimizer then.
    """

    output: str
    stage: int
    experts_per_shard: int = 2
    sub_group_size: int = 10**9
    prefix: str = "llm."
    dtype: str = "bf16"
    frozen: str = "nothing"
    biases: str = "fp32"
    two_groups: bool = False
    fp32_gradients: bool = False


class Node(torch.nn.Module):
    """Holds tensors under dotted names; its forward touches each parameter through its own module, as ZeRO-3 wants."""

    def put(self, name: str, tensor: torch.Tensor, buffer: bool, trained: bool) -> None:
        first, _, rest = name.partition(".")
        if rest:
            if first not in self._modules:
                self.add_module(first, type(self)())
            self._modules[first].put(rest, tensor, buffer, trained)
        elif buffer:
            self.register_buffer(first, tensor)
        else:
            self.register_parameter(first, torch.nn.Parameter(tensor, requires_grad=trained))

    def loss(self, parameter: torch.Tensor) -> torch.Tensor:
        target = torch.linspace(-1, 1, parameter.numel(), dtype=parameter.dtype).view_as(parameter)
        return ((parameter - target).float() ** 2).sum()

    def forward(self):
        total = torch.zeros(())
        for parameter in self._parameters.values():
            if parameter.requires_grad:
                total = total + self.loss(parameter)
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
        if f"{prefix}.0.up_proj.weight" not in tensors or experts_per_shard == 1:
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


def write(base: Path, case: Case) -> None:
    torch.manual_seed(0)
    model = Node()
    for name, tensor in training_tensors(base, case.experts_per_shard).items():
        buffer = name.endswith(BIAS) and case.biases != "parameters"
        trained = not (name.endswith(BIAS) or re.search(case.frozen, name))
        model.put(case.prefix + name, tensor.float(), buffer, trained)
    biases = {name: tensor.clone() for name, tensor in model.named_buffers()}
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    norms = [p for name, p in trained if "norm" in name and case.two_groups]
    others = [p for name, p in trained if not ("norm" in name and case.two_groups)]
    groups = [{"params": params} for params in (others, norms) if params]
    settings = ConfigDict(
        train_micro_batch_size_per_gpu=1,
        bf16={"enabled": case.dtype == "bf16"},
        zero_optimization={"stage": case.stage, "sub_group_size": case.sub_group_size},
        zero_allow_untested_optimizer=True,
        zero_force_ds_cpu_optimizer=False,
    )
    if case.fp32_gradients:
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(groups, lr=1e-3), config=settings)
    if case.biases == "fp32":  # as this workflow keeps them; DeepSpeed rounds buffers to BF16
        for name, buffer in engine.module.named_buffers():
            buffer.data = biases[name]
    for _ in range(STEPS):
        engine.backward(engine())
        with torch.no_grad():  # gloo gathers stages 1 and 2 into views of a tensor that autograd watches
            engine.step()
    history = HistoryBuffer([1.0, 2.0], [1, 1])
    output = Path(case.output)
    engine.save_checkpoint(
        str(output.parent),
        tag=output.name,
        client_state={"meta": {"iter": STEPS, "epoch": 1}, "message_hub": {"log_scalars": {"loss": history}}},
        save_latest=False,
    )
    engine.destroy()


def main() -> None:
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # gloo alone: no compiler needed
    deepspeed.init_distributed("gloo")
    for case in json.loads(Path(sys.argv[2]).read_text()):
        write(Path(sys.argv[1]), Case(**case))


if __name__ == "__main__":
    main()
