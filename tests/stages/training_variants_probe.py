"""Run by the train environment's Python: models of several releases' kinds against transformers' own; prints JSON.

Usage: training_variants_probe.py FOLDER FP8
FOLDER takes the models made here; FP8 is a small FP8 release, beside it ``FP8.npz`` with the values it stands for.
"""

import json
import sys
import types
from pathlib import Path

import family_shapes
import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode
from training_probe import difference, released_gradients

from deepseek_sft.convert import tiny_model
from deepseek_sft.families import deepseek_v3
from deepseek_sft.model import attention, expert_products
from deepseek_sft.training.xtuner_engine import compat

SHAPE = tiny_model.TinyShape(vocab_size=512, kv_lora_rank=64, layers=2, heads=2)
# Changes to config.json: other releases, and one that trains beyond the context of the first pre-training.
KINDS = {
    "r1": {},
    "beyond the original context": {"rope_scaling": family_shapes.YARN | {"original_max_position_embeddings": 64}},
    **family_shapes.FAMILIES,
    "weights not normalised": {"norm_topk_prob": False, "routed_scaling_factor": 16.0},
}
WAYS = {
    "fused experts": {"experts_per_shard": 4, "products": "loop"},
    "one expert a shard": {"experts_per_shard": 1, "products": "loop"},
    "grouped products": {"experts_per_shard": 8, "products": "grouped"},
    "checkpointing": {"experts_per_shard": 4, "products": "loop", "checkpointing": True},
    "attention kept": {"experts_per_shard": 4, "products": "loop", "checkpointing": True, "keep_attention": True},
}
LENGTH = 160  # more than the 64 of the second kind


class Kernels(TorchDispatchMode):
    """Counts how often attention's kernel computes."""

    def __init__(self):
        super().__init__()
        self.forward = 0

    def __torch_dispatch__(self, operator, types, arguments=(), named=None):
        self.forward += operator.name() == "aten::_scaled_dot_product_flash_attention_for_cpu"
        return operator(*arguments, **(named or {}))


def write_model(folder: Path, config: dict) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {}
    for name, spec in deepseek_v3.tensor_specs(config).items():
        values = tiny_model.values_of(name, spec, SHAPE, 0)
        dtype = torch.float32 if spec.dtype == "F32" else torch.bfloat16
        tensors[name] = torch.frombuffer(bytearray(values), dtype=dtype).reshape(spec.shape)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def compare(folder: Path, changes: dict) -> dict:
    """Every way of computing one kind of model against transformers: logits, loss, worst gradient."""
    from transformers import DeepseekV3ForCausalLM

    from deepseek_sft.model import loss as loss_module
    from deepseek_sft.model.loading import release_names
    from deepseek_sft.model.training_model import build

    write_model(folder, tiny_model.config_of(SHAPE) | changes)
    native = DeepseekV3ForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").train()
    random = torch.Generator().manual_seed(3)
    input_ids = torch.randint(2, SHAPE.vocab_size, (2, LENGTH), generator=random)
    targets = F.pad(input_ids[:, 1:], (0, 1), value=-100)
    targets[0, :120] = targets[1, 7:] = -100
    learned = targets != -100
    logits = native(input_ids).logits
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
    loss.backward()
    figures: dict[str, dict] = {}
    bits = {}
    for way, options in WAYS.items():
        checkpointing = options.get("checkpointing", False)
        options = {key: value for key, value in options.items() if key != "checkpointing"}
        model = build(folder, attention=attention.SDPA, dtype=torch.float32, **options).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        loss_module.MAX_LOGITS["cpu"] = 9 * SHAPE.vocab_size  # several chunks
        with Kernels() as kernels:
            hidden = model.model(input_ids=input_ids).last_hidden_state
            mean = model.lm_head(hidden[learned], targets[learned]) / learned.sum()
            mean.backward()
        bits[way] = [mean.detach(), *(parameter.grad for parameter in model.parameters())]
        size = options["experts_per_shard"]
        gradients = released_gradients(model, lambda name, size=size: release_names(name, size), native)
        figures[way] = {
            "logits": difference(model.lm_head(hidden), logits),
            "loss": abs(mean.item() / loss.item() - 1),
            "gradients": max(gradients.values()),
            "kernels": kernels.forward,
        }
    pairs = zip(bits["checkpointing"], bits["attention kept"], strict=True)
    figures["attention kept"]["same bits"] = all(torch.equal(one, other) for one, other in pairs)
    return figures


def flash(folder: Path) -> dict[str, float]:
    """The flash-attn path with a stand-in for the package, which has its signatures and checks, against SDPA."""
    from deepseek_sft.model.training_model import build

    def attend(q, k, v, softmax_scale, causal):  # [rows, length, heads, size]
        assert causal and q.shape[-1] == k.shape[-1] == v.shape[-1]
        scores = torch.einsum("rqhd,rkhd->rhqk", q, k) * softmax_scale
        later = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).triu(1)
        return torch.einsum("rhqk,rkhd->rqhd", scores.masked_fill(later, float("-inf")).softmax(-1), v)

    def attend_each(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal):
        assert cu_seqlens_q.dtype == torch.int32 and q.dim() == 3
        sizes = cu_seqlens_q.diff().tolist()
        assert max_seqlen_q == max_seqlen_k == max(sizes) and sum(sizes) == len(q)
        parts = zip(*(tensor.split(sizes) for tensor in (q, k, v)), strict=True)
        return torch.cat([attend(*(t[None] for t in part), softmax_scale, causal)[0] for part in parts])

    stand_in = types.ModuleType("flash_attn")
    stand_in.flash_attn_func, stand_in.flash_attn_varlen_func = attend, attend_each
    sys.modules["flash_attn"] = stand_in
    models = [
        build(folder, experts_per_shard=8, attention=attention.choose(name, "cuda"), dtype=torch.float32)
        for name in ("sdpa", "flash")
    ]
    assert [model.config._attn_implementation for model in models] == [attention.SDPA, attention.FLASH]
    ids = torch.randint(2, SHAPE.vocab_size, (2, 30), generator=torch.Generator().manual_seed(4))
    sample_of = torch.tensor([[0] * 11 + [1] * 19, [0] * 25 + [1] * 5], dtype=torch.int32)
    packing = attention.Packing.of(sample_of)
    with torch.no_grad():
        rows = [model.model(ids).last_hidden_state for model in models]
        packed = [model.model(ids, packing=packing).last_hidden_state for model in models]
    assert difference(rows[0], packed[0]) > 1e-3
    return {"rows": difference(*rows), "packed": difference(*packed)}


def released_weights(folder: Path) -> dict[str, float]:
    """After the forward pass a shard's weights are let go; the backward pass uses those that are there by then."""
    from deepseek_sft.model.training_model import build

    model = build(folder, experts_per_shard=4, attention=attention.SDPA, dtype=torch.float32).train()
    shard = model.model.layers[1].mlp.experts["0"]
    rows = torch.randn(6, SHAPE.hidden_size, requires_grad=True)
    output = shard(rows, expert_products.Counts([1, 0, 3, 2], None))
    weights = shard.w2.data
    shard.w2.data = torch.empty(0)
    shard.w2.data = 2 * weights
    output.sum().backward()
    doubled = rows.grad.clone()
    rows.grad = None
    shard.w2.data = weights
    shard(rows, expert_products.Counts([1, 0, 3, 2], None)).sum().backward()
    return {"input_gradient": difference(doubled, 2 * rows.grad), "size": rows.grad.abs().max().item()}


def fp8(folder: Path) -> dict:
    """Values built from an FP8 release, and any part of a matrix read alone."""
    from deepseek_sft.model.loading import ReleaseReader, release_names
    from deepseek_sft.model.training_model import build

    expected = {name: torch.from_numpy(values) for name, values in np.load(f"{folder}.npz").items()}
    model = build(folder, experts_per_shard=2, attention=attention.SDPA, dtype=torch.bfloat16)
    worst = 0.0
    for name, parameter in model.named_parameters():
        wanted = torch.cat([expected[part].flatten() for part in release_names(name, 2)])
        worst = max(worst, difference(parameter.float().flatten(), wanted))
    reader = ReleaseReader(folder)
    name = "model.layers.1.mlp.experts.1.gate_proj.weight"
    parts = 0.0
    for start, end in ((0, 5), (1, 161), (20000, 23000), (160 * 127, 160 * 129), (22000, expected[name].numel())):
        part = reader.elements(name, start, end).bfloat16().float()
        parts = max(parts, difference(part, expected[name].flatten()[start:end]))
    whole = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return {"worst": worst, "parts": parts, "rows": list(expected[name].shape), "share_read": model.bytes_read / whole}


def rule() -> dict[str, bool]:
    """Grouped products by the rule, here."""
    cpu = torch.device("cpu")
    return {
        "auto on CPU": expert_products.choose("auto", cpu, torch.bfloat16, 7168, 2048),
        "grouped on CPU": expert_products.choose("grouped", cpu, torch.bfloat16, 7168, 2048),
        "loop": expert_products.choose("loop", cpu, torch.bfloat16, 7168, 2048),
    }


if __name__ == "__main__":
    compat.install("cpu")
    torch.set_num_threads(1)
    work = Path(sys.argv[1])
    found = {"kinds": {kind: compare(work / kind, changes) for kind, changes in KINDS.items()}}
    found |= {"flash": flash(work / "r1"), "released": released_weights(work / "r1"), "fp8": fp8(Path(sys.argv[2]))}
    print(json.dumps(found | {"rule": rule()}))
