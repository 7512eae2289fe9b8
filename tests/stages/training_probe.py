"""Run by the train environment's Python: compares the training model with transformers' own; prints figures as JSON.

Usage: training_probe.py BASE
"""

import json
import sys
import types
from pathlib import Path

import torch
import torch.nn.functional as F

from deepseek_sft.training.xtuner_engine import compat

ROWS, LENGTH = 3, 24


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


def batch(vocabulary: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random rows; labels with prompts masked, unevenly."""
    random = torch.Generator().manual_seed(1)
    input_ids = torch.randint(2, vocabulary, (ROWS, LENGTH), generator=random)
    labels = input_ids.clone()
    for row in range(ROWS):
        labels[row, : 5 + 6 * row] = -100
    return input_ids, labels


def released_gradients(model: torch.nn.Module, names_of, reference: torch.nn.Module) -> dict[str, float]:
    """Relative difference of each gradient from the reference's, fused experts compared part by part."""
    # transformers skips experts without tokens
    wanted = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in reference.named_parameters()}
    worst = {}
    for name, parameter in model.named_parameters():
        expected = torch.cat([wanted[part].flatten() for part in names_of(name)])
        norm = expected.norm().clamp(min=1e-12)
        worst[name] = ((parameter.grad.flatten() - expected).norm() / norm).item()
    return worst


def probe_model(base: Path) -> dict:
    from transformers import DeepseekV3ForCausalLM

    from deepseek_sft.model import loss as loss_module
    from deepseek_sft.model.attention import SDPA, Packing
    from deepseek_sft.model.loading import release_names
    from deepseek_sft.model.router import AuxiliaryLoss
    from deepseek_sft.model.training_model import build

    figures = {}
    model = build(base, experts_per_shard=4, attention=SDPA, dtype=torch.float32).train()
    native = DeepseekV3ForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager").train()
    input_ids, labels = batch(model.config.vocab_size)
    targets = F.pad(labels[:, 1:], (0, 1), value=-100)
    learned = targets != -100

    hidden = model.model(input_ids=input_ids).last_hidden_state
    with torch.no_grad():
        figures["logits"] = difference(model.lm_head(hidden), native(input_ids).logits)
    wanted = native(input_ids, labels=labels).loss
    wanted.backward()
    loss_module.MAX_LOGITS["cpu"] = 7 * model.config.vocab_size  # several chunks
    mean = model.lm_head(hidden[learned], targets[learned]) / learned.sum()
    mean.backward()
    figures["loss"] = difference(mean, wanted)
    with torch.no_grad():
        each = F.cross_entropy(native(input_ids).logits[learned], targets[learned], reduction="none")
    figures["token_losses"] = difference(model.lm_head(hidden[learned], targets[learned], summed=False), each)
    figures["gradients"] = released_gradients(model, lambda name: release_names(name, 4), native)
    figures["inv_freq"] = difference(model.model.rotary_emb.inv_freq, native.model.rotary_emb.inv_freq)

    # No trained token at all: the loss is 0, every parameter still gets a gradient.
    model.zero_grad()
    hidden = model.model(input_ids=input_ids).last_hidden_state
    model.lm_head(hidden[:, :0].flatten(0, 1), targets[:, :0].flatten()).backward()
    figures["without_targets"] = [name for name, p in model.named_parameters() if p.grad is None or p.grad.any()]

    # Two samples packed in a row against each alone.
    first, second = input_ids[:1, :10], input_ids[1:2, :14]
    packed = torch.cat([first, second], dim=1)
    sample_of = torch.tensor([[0] * 10 + [1] * 14], dtype=torch.int32)
    positions = torch.cat([torch.arange(10), torch.arange(14)])[None]
    with torch.no_grad():
        together = model.model(packed, position_ids=positions, packing=Packing.of(sample_of)).last_hidden_state
        alone = torch.cat([model.model(first).last_hidden_state, model.model(second).last_hidden_state], dim=1)
    figures["packing"] = difference(together, alone)

    # The balance loss: gradient at the router's weights against its formula written out; padding does not count.
    router = model.routers()[0]
    x = torch.randn(2, 12, model.config.hidden_size)
    valid = torch.ones(2, 12, dtype=torch.bool)
    valid[1, 7:] = False
    router.auxiliary = AuxiliaryLoss(0.3, valid)
    router.zero_grad()
    router(x)[2].backward()
    got = router.weight.grad.clone()
    router.zero_grad()
    total = 0.0
    for row, size in ((0, 12), (1, 7)):
        scores = (x[row, :size] @ router.weight.T).sigmoid()
        chosen = F.one_hot(router.choose(scores.detach()), router.n_routed_experts).sum((0, 1))
        frequency = chosen * router.n_routed_experts / (router.top_k * size)
        total = total + 0.3 * (frequency * (scores / scores.sum(-1, keepdim=True)).mean(0)).sum() / 2
    total.backward()
    figures["balance"] = difference(got, router.weight.grad) / router.weight.grad.abs().max().item()

    # An expert of a group left out never wins, however negative the others' biased scores are.
    router.e_score_correction_bias.fill_(-5.0)
    scores = torch.rand(64, router.n_routed_experts)
    groups = router.choose(scores) // (router.n_routed_experts // router.n_group)
    figures["groups_used"] = max(len(set(row)) for row in groups.tolist())

    # As production builds it: split by ZeRO-3 while it is made, in bf16, then cast as DeepSpeed does.
    zero3 = use_zero3()
    split = build(base, experts_per_shard=4, attention=SDPA, dtype=torch.bfloat16).bfloat16()
    figures["split_parameters"] = all(hasattr(parameter, "ds_tensor") for parameter in split.parameters())
    figures["buffers_of_split_model"] = sorted({str(buffer.dtype) for buffer in split.buffers()})
    figures["inv_freq_of_split_model"] = difference(split.model.rotary_emb.inv_freq, native.model.rotary_emb.inv_freq)
    whole = dict(model.named_parameters())
    figures["split_weights"] = max(
        difference(parameter.ds_tensor.float()[: parameter.ds_numel], whole[name].bfloat16().float().flatten())
        for name, parameter in split.named_parameters()
    )
    del zero3
    return figures


def use_zero3():
    """Have models be built under ZeRO-3 in a world of one rank; lasts as long as the result lives."""
    import deepspeed
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed("gloo", verbose=False, auto_mpi_discovery=False)
    config = {"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}, "zero_optimization": {"stage": 3}}
    return HfDeepSpeedConfig(config)


def probe_shims() -> dict:
    """Which shims are applied here, and which where the real packages are present."""
    needed = compat.install("cpu")
    again = compat.install("cpu")
    for name in ("torchvision", "skimage"):
        sys.modules[name] = types.ModuleType(name)
    for module, _ in compat.VISION_DATASETS.values():
        sys.modules.pop(module, None)
    with_packages = compat.install("cuda")
    stubbed = [module for module, _ in compat.VISION_DATASETS.values() if module in sys.modules]
    for name in ("torchvision", "skimage"):
        del sys.modules[name]
    compat.install("cpu")
    return {"needed": needed, "again": again, "with_packages": with_packages, "stubbed_with_packages": stubbed}


if __name__ == "__main__":
    shims = probe_shims()
    print(json.dumps({"shims": shims} | probe_model(Path(sys.argv[1]))))
