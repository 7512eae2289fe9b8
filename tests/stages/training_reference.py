"""Run by the train environment's Python: the plain loop that training is compared with; no code of ours computes.

Usage: training_reference.py INPUTS OUTPUT
transformers' DeepseekV3ForCausalLM, each sample on its own, mean over all trained tokens of a step's rows, torch's
AdamW; in fp32, and in bf16 with fp32 master weights. Writes OUTPUT/reference.json (losses) and, in the layout of the
fused experts, OUTPUT/reference.pt (gradients of the first step).
"""

import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
SHARD = 4  # experts per shard of training_helpers.SETTINGS


def samples_of_step(rows, step: int, batch: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Token ids and labels of each sample of a step's rows, packed rows taken apart."""
    from deepseek_sft.training.schedule import rows_of_step

    samples = []
    for number in rows_of_step(len(rows), 42, step, micro_batch=batch, accumulation=1, groups=1, group=0):
        row, start = rows[number], 0
        for size in map(int, row["sample_lengths"]):
            part = slice(start, start + size)
            samples.append((torch.tensor(row["input_ids"][part]).long(), torch.tensor(row["labels"][part]).long()))
            start += size
    return samples


def mean_loss(model, samples: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Mean cross-entropy over all trained tokens; fp32 softmax."""
    total, trained = torch.zeros(()), 0
    for ids, labels in samples:
        logits = model(ids[None]).logits[0, :-1].float()
        total = total + F.cross_entropy(logits, labels[1:], reduction="sum", ignore_index=-100)
        trained += int((labels[1:] != -100).sum())
    return total / trained


def train(base: Path, rows, *, batch: int, steps: int, dtype: torch.dtype, rate: float, clip: float):
    """Losses of ``steps`` steps, and the model after the first backward pass and at the end."""
    from transformers import DeepseekV3ForCausalLM

    model = DeepseekV3ForCausalLM.from_pretrained(base, dtype=dtype, attn_implementation="eager").train()
    for module in model.modules():  # transformers loads the correction bias in the model's dtype
        if hasattr(module, "e_score_correction_bias"):
            module.e_score_correction_bias = module.e_score_correction_bias.float()
    exact_biases(model, base)
    masters = [parameter.detach().float().clone() for parameter in model.parameters()]
    optimizer = torch.optim.AdamW(masters, lr=rate, betas=(0.9, 0.999), weight_decay=0.0)
    losses, first = [], None
    for step in range(steps):
        loss = mean_loss(model, samples_of_step(rows, step, batch))
        loss.backward()
        losses.append(loss.item())
        for master, parameter in zip(masters, model.parameters(), strict=True):
            gradient = parameter.grad
            master.grad = torch.zeros_like(master) if gradient is None else gradient.float()
        if first is None:
            first = {n: m.grad.clone() for (n, _), m in zip(model.named_parameters(), masters, strict=True)}
        torch.nn.utils.clip_grad_norm_(masters, clip)
        optimizer.step()
        with torch.no_grad():
            for master, parameter in zip(masters, model.parameters(), strict=True):
                parameter.copy_(master)
        model.zero_grad()
    return losses, first


def exact_biases(model, base: Path) -> None:
    from safetensors import safe_open

    names = {n: b for n, b in model.named_buffers() if n.endswith("e_score_correction_bias")}
    for file in base.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            for name in names.keys() & set(opened.keys()):
                names[name].copy_(opened.get_tensor(name))


def main(inputs: Path, output: Path) -> None:
    from deepseek_sft.data.tokens import TokenDataset
    from deepseek_sft.model.loading import release_names

    torch.set_num_threads(1)
    base, rows = inputs / "base", TokenDataset(str(inputs / "tokens"))
    losses, first = train(base, rows, batch=16, steps=20, dtype=torch.float32, rate=1e-3, clip=1e6)
    rounded, _ = train(base, rows, batch=4, steps=50, dtype=torch.bfloat16, rate=1e-3, clip=1.0)
    (output / "reference.json").write_text(json.dumps({"float32": losses, "bfloat16": rounded}))
    fused = {}
    for name in first:
        if ".mlp.experts." not in name:
            fused[name] = first[name].flatten()
            continue
        layer, rest = name.split(".mlp.experts.")
        shard = int(rest.split(".")[0]) // SHARD
        for kind in ("w1w3", "w2"):
            whole = f"{layer}.mlp.experts.{shard}.{kind}"
            if whole not in fused:
                fused[whole] = torch.cat([first[part].flatten() for part in release_names(whole, SHARD)])
    torch.save(fused, output / "reference.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
