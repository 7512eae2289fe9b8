"""Run by the train environment's Python: defects of an earlier system, each as three values printed as JSON.

Usage: defects_probe.py BASE
Every function returns ``right`` (from the definition), ``ours``, and ``old`` (what that system did, with the libraries'
own code where it used them). A defect that came back would make ``ours`` equal ``old``.
"""

import json
import sys
import types
from pathlib import Path

import torch
import torch.nn.functional as F

from deepseek_sft.training.xtuner_engine import compat

TRIPLE = dict[str, list[float]]
RANKS = 4


def routed_scaling(model, config) -> TRIPLE:
    """Sum of a token's expert weights: the factor applies although they are normalised."""
    router = model.routers()[0].eval()
    _, weights, _ = router(torch.randn(1, 8, config["hidden_size"]))
    assert config["norm_topk_prob"]
    old = weights / config["routed_scaling_factor"]
    return {
        "right": [config["routed_scaling_factor"]] * 8,
        "ours": weights.sum(-1).tolist(),
        "old": old.sum(-1).tolist(),
    }


def yarn(model, config) -> TRIPLE:
    """Rotary frequencies and softmax scale; xtuner rewrites ``rope_scaling`` when it is told a length."""
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as native
    from xtuner.model import SupervisedFinetune

    def values(changed: dict) -> list[float]:
        built = DeepseekV3Config.from_dict(changed)
        built._attn_implementation = "eager"
        rotary = native.DeepseekV3RotaryEmbedding(built)
        return [*rotary.inv_freq.tolist(), native.DeepseekV3Attention(built, 0).scaling]

    rewritten = SupervisedFinetune._prepare_for_long_context_training(
        types.SimpleNamespace(), DeepseekV3Config.from_dict(config), 32768
    )
    linear = {**config, "rope_scaling": rewritten.rope_scaling}
    ours = [*model.model.rotary_emb.inv_freq.tolist(), model.model.layers[0].self_attn.scaling]
    return {"right": values(config), "ours": ours, "old": values(linear)}


def rotary_precision(model, config) -> TRIPLE:
    """Cosines of neighbouring positions in a bf16 model."""
    rotary = model.model.rotary_emb
    positions = torch.tensor([[256, 257, 1001]])
    exact = rotary.inv_freq.double()
    ours, _ = rotary(torch.zeros(1, 1, dtype=torch.float32), positions)
    scale = rotary.attention_scaling
    right = torch.outer(positions[0].double(), exact).cos() * scale
    # As xtuner's linear rotary class: positions in the dtype that a bf16 model gives the frequencies.
    table = torch.arange(1002, dtype=torch.bfloat16)[positions[0]]
    old = torch.outer(table, exact.bfloat16()).float().cos() * scale
    half = right.shape[-1]
    return {
        "right": right.flatten().tolist(),
        "ours": ours[0, :, :half].flatten().tolist(),
        "old": old.flatten().tolist(),
    }


def split_targets(model, config) -> TRIPLE:
    """Mean loss of a row that two ranks share, its prompt masked."""
    from deepseek_sft.training.xtuner_engine.micro_batches import NO_LOSS, pad

    random = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 50, (16,), generator=random)
    labels = ids.clone()
    labels[:5] = NO_LOSS
    logits = torch.randn(16, 50, generator=random, dtype=torch.float64)
    right = F.cross_entropy(logits[:-1], labels[1:], ignore_index=NO_LOSS)
    row = {"input_ids": ids.tolist(), "labels": labels.tolist(), "sample_lengths": [16]}
    targets = pad([row], 2).targets[0]
    sums = [
        F.cross_entropy(part, target, ignore_index=NO_LOSS, reduction="sum")
        for part, target in zip(logits.chunk(2), targets.chunk(2), strict=True)
    ]
    ours = sum(sums) / (targets != NO_LOSS).sum()
    # Split first, then shifted inside each part, and the parts' means weighed alike.
    parts = zip(logits.chunk(2), labels.chunk(2), strict=True)
    means = [F.cross_entropy(part[:-1], label[1:], ignore_index=NO_LOSS) for part, label in parts]
    return {"right": [right.item()], "ours": [ours.item()], "old": [(sum(means) / 2).item()]}


def correction_bias(model, config) -> TRIPLE:
    """The router's bias in a model cast to bf16, as DeepSpeed casts it."""
    from safetensors import safe_open

    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    (file,) = Path(config["folder"]).glob("*.safetensors")
    with safe_open(file, "pt") as stored:
        right = stored.get_tensor(name)
    ours = model.routers()[0].e_score_correction_bias
    assert name.removeprefix("model.") not in dict(model.model.named_parameters())
    return {
        "right": right.tolist(),
        "ours": ours.float().tolist(),
        "old": right.bfloat16().float().tolist(),
    }


def balance_loss(model, config) -> TRIPLE:
    """Equations 17 to 20 of the DeepSeek-V3 report for one row, scores normalised over the experts."""
    from deepseek_sft.model.router import AuxiliaryLoss

    router = model.routers()[0].train()
    hidden = torch.randn(1, 8, config["hidden_size"])
    scores = F.linear(hidden[0].float(), router.weight.float()).sigmoid()
    experts = router.choose(scores)
    count, chosen = config["n_routed_experts"], config["num_experts_per_tok"]
    frequency = torch.bincount(experts.flatten(), minlength=count) * count / (chosen * 8)
    router.auxiliary = AuxiliaryLoss(1.0, torch.ones(1, 8, dtype=torch.bool))
    ours = router(hidden)[2]
    router.auxiliary = None
    assert router(hidden)[2] is None  # switched off, it is not computed; the old one crashed here
    right = (frequency * (scores / scores.sum(-1, keepdim=True)).mean(0)).sum()
    return {"right": [right.item()], "ours": [ours.item()], "old": [(frequency * scores.mean(0)).sum().item()]}


def learning_rate(model, config) -> TRIPLE:
    """Highest share of the peak rate that runs of 40 to 60 steps reach, warm-up 0.03."""
    from mmengine.optim import LinearLR

    from deepseek_sft.training.schedule import Schedule

    ours, old = [], []
    for steps in (40, 50, 60):
        plan = Schedule(steps, 1, 1, steps, max(1, round(0.03 * steps)), 1.0, 0.0, "cosine")
        ours.append(max(plan.learning_rate(step) for step in range(1, steps + 1)))
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        scheduler = LinearLR.build_iter_from_epoch(
            optimizer=optimizer, start_factor=1e-5, begin=0, end=0.03, by_epoch=True, epoch_length=steps
        )
        rates = []
        for _ in range(steps):
            rates.append(optimizer.param_groups[0]["lr"])
            scheduler.step()
        old.append(max(rates))
    return {"right": [1.0] * 3, "ours": ours, "old": old}


def share_read(model, config) -> TRIPLE:
    """Share of the release that one of four ranks reads to fill its partitions."""
    from deepseek_sft.model import loading

    read = 0
    elements = loading.ReleaseReader.elements

    def counting(self, name: str, start: int, end: int) -> torch.Tensor:
        nonlocal read
        read += end - start
        return elements(self, name, start, end)

    whole = 0
    for parameter in model.parameters():
        parameter.ds_numel, parameter.ds_shape = parameter.numel(), parameter.shape
        parameter.ds_tensor = torch.empty(-(-parameter.numel() // RANKS), dtype=parameter.dtype)
        parameter.ds_tensor.ds_numel = parameter.ds_tensor.numel()
        parameter.ds_process_group = None
        whole += parameter.numel()
    loading.dist = types.SimpleNamespace(get_rank=lambda group: 1)
    loading.ReleaseReader.elements = counting
    loading.load_release(model, Path(config["folder"]))
    return {"right": [1 / RANKS], "ours": [round(read / whole, 3)], "old": [1.0]}


def main() -> None:
    compat.install("cpu")
    from deepseek_sft.model.attention import SDPA
    from deepseek_sft.model.training_model import build

    torch.manual_seed(0)
    base = Path(sys.argv[1])
    config = json.loads((base / "config.json").read_text())
    config["folder"] = str(base)
    model = build(base, experts_per_shard=4, attention=SDPA, dtype=torch.float32)
    exact = (routed_scaling, yarn, split_targets, balance_loss, learning_rate)
    figures = {probe.__name__: probe(model, config) for probe in exact}
    model.bfloat16()
    # Last: it gives the parameters partitions.
    figures |= {probe.__name__: probe(model, config) for probe in (rotary_precision, correction_bias, share_read)}
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
