"""Run by the train environment's Python: what the checks before the first step find in damaged models; prints JSON.

Usage: start_checks_probe.py BASE FP8
FP8 is the same model in the release's FP8 format.
"""

import json
import sys
from pathlib import Path

import torch

from deepseek_sft.training.xtuner_engine import compat


def main() -> None:
    compat.install("cpu")
    from deepseek_sft.model.attention import SDPA
    from deepseek_sft.model.training_model import build
    from deepseek_sft.training.xtuner_engine import start_checks

    base, quantised = map(Path, sys.argv[1:3])
    published = json.loads((base / "config.json").read_text())

    def fresh(**options):
        return build(base, **({"experts_per_shard": 2, "attention": SDPA, "dtype": torch.float32} | options))

    def weights(model, folder=base, rank=0):
        return start_checks.compare_weights(model, folder, rank)

    model = fresh()
    problems, elements, checksum = weights(model)
    figures = {
        "intact": problems,
        "elements": elements,
        "repeatable": weights(model)[2] == checksum,
        "config": start_checks.compare_config(model, published, "float32"),
        "dtype": start_checks.compare_config(model, published, "bfloat16")[:1],
    }

    shard = model.get_parameter("model.layers.1.mlp.experts.0.w1w3")
    with torch.no_grad():
        shard.copy_(torch.cat(shard.chunk(2, dim=1)[::-1], dim=1))  # up above gate
    figures["gate and up exchanged"] = weights(model)[0]

    model = fresh()
    before = start_checks.bias_checksum(model)
    model.routers()[0].e_score_correction_bias[0] += 1e-3
    figures["bias"] = weights(model)[0]
    outcome = start_checks.Outcome([], 0, 0, before)
    other = start_checks.Outcome([], 0, 0, start_checks.bias_checksum(model))
    figures["ranks"] = start_checks.together([outcome, other, outcome, other])

    model = fresh()
    model.routers()[0].top_k = 1
    model.config.rope_theta = 5.0
    model.config.rms_norm_eps = 0.5
    figures["changed config"] = start_checks.compare_config(model, published, "float32")

    model = fresh()
    plain = published | {"rope_scaling": None, "rope_theta": 10000}
    figures["scaling lost"] = start_checks.compare_config(model, plain, "float32")
    model.model.rotary_emb.inv_freq[2] *= 1.001
    model.model.layers[1].self_attn.scaling = float("nan")
    model.routers()[0].routed_scaling_factor = 1.0
    figures["numbers"] = start_checks.compare_config(model, published, "float32")

    new = json.loads(json.dumps(published))
    new["rope_parameters"] = new.pop("rope_scaling") | {"rope_type": "yarn", "rope_theta": new.pop("rope_theta")}
    new["dtype"] = new.pop("torch_dtype")
    (base / "config.json").write_text(json.dumps(new))
    model = fresh()
    figures["new names"] = [*start_checks.compare_config(model, new, "float32"), *weights(model)[0]]
    figures["new and old"] = start_checks.compare_config(model, published, "float32")
    (base / "config.json").write_text(json.dumps(published))

    # A model of the dequantised base against the FP8 release, in bf16 as it trains.
    figures["fp8"] = weights(fresh(dtype=torch.bfloat16), quantised)[0]
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    zero = DeepSpeedZeroConfig.model_fields
    figures["zero keys"] = sorted({*zero, *(field.alias for field in zero.values() if field.alias)})
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
