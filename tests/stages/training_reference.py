"""The plain loop that ``training_spread_probe.py`` compares training with; no code of ours computes.

transformers' DeepseekV3ForCausalLM, each sample on its own, mean over all trained tokens of a step's rows, torch's
AdamW; in fp32, and in bf16 with fp32 master weights.
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F

SHARD = 4  # experts per shard of training_helpers.SETTINGS


def samples_of_step(rows, step: int, batch: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Token ids and labels of each sample of a step's rows, packed rows taken apart."""
    from deepseek_sft.training.schedule import rows_of_step

    return [sample for number in rows_of_step(len(rows), 42, step, batch) for sample in samples_of(rows[number])]


def samples_of(row) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Token ids and labels of each sample of a row."""
    samples, start = [], 0
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


def load(base: Path, dtype: torch.dtype):
    """The model of ``base`` with its correction biases in fp32, which transformers loads in the model's dtype."""
    from transformers import DeepseekV3ForCausalLM

    model = DeepseekV3ForCausalLM.from_pretrained(base, dtype=dtype, attn_implementation="eager").train()
    for module in model.modules():
        if hasattr(module, "e_score_correction_bias"):
            module.e_score_correction_bias = module.e_score_correction_bias.float()
    exact_biases(model, base)
    return model


def train(model, rows, *, batch: int, steps: int, rate: float, clip: float):
    """Losses of ``steps`` steps, and the gradients of the first."""
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


def balance(model, rows, *, batch: int, speed: float) -> list[list[float]]:
    """Correction bias of every router after one step of the balance rule: down above the mean load, up below it."""
    loads: dict = {}

    def count(router, inputs, outputs) -> None:
        load = torch.bincount(outputs[0].flatten(), minlength=router.n_routed_experts)
        loads[router] = loads.get(router, 0) + load

    routers = [module for module in model.modules() if hasattr(module, "e_score_correction_bias")]
    handles = [router.register_forward_hook(count) for router in routers]
    with torch.no_grad():
        mean_loss(model, samples_of_step(rows, 0, batch))
    for handle in handles:
        handle.remove()
    moves = [speed * torch.sign(load.double().mean() - load).float() for load in loads.values()]
    return [(r.e_score_correction_bias + move).tolist() for r, move in zip(routers, moves, strict=True)]


def float32(inputs: Path, output: Path) -> None:
    """Writes ``reference-float32.json``, and ``reference.pt``: gradients of the first step as fused experts lie."""
    from deepseek_sft.data.tokens import TokenDataset
    from deepseek_sft.model.loading import release_names

    rows, model = TokenDataset(str(inputs / "tokens")), load(inputs / "base", torch.float32)
    biases = balance(model, rows, batch=4, speed=0.01)
    held_out = TokenDataset(str(inputs / "held_out"))
    with torch.no_grad():
        validation = mean_loss(model, [sample for row in held_out for sample in samples_of(row)]).item()
    losses, first = train(model, rows, batch=16, steps=20, rate=1e-3, clip=1e6)
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
    (output / "reference-float32.json").write_text(
        json.dumps({"losses": losses, "biases": biases, "validation": validation})
    )


def bfloat16(inputs: Path, output: Path) -> None:
    """Writes ``reference-bfloat16.json``."""
    from deepseek_sft.data.tokens import TokenDataset

    rows, model = TokenDataset(str(inputs / "tokens")), load(inputs / "base", torch.bfloat16)
    losses, _ = train(model, rows, batch=4, steps=50, rate=5e-4, clip=1.0)
    (output / "reference-bfloat16.json").write_text(json.dumps({"losses": losses}))


LOOPS = (float32, bfloat16)
