"""DeepSeek-V3's published configuration, whole or with small sizes, and the plan's figures for it."""

import json
from pathlib import Path
from typing import Any

from check import Place

from deepseek_sft import families
from deepseek_sft.planning.counting import Model, count
from deepseek_sft.planning.settings import Training

PUBLISHED = Path(__file__).resolve().parents[2] / "resources/models/deepseek-v3/config.json"
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 192,
    "moe_intermediate_size": 64,
    "vocab_size": 1024,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
}


def published(**changes: Any) -> dict[str, Any]:
    found = json.loads(PUBLISHED.read_text())
    found.pop("quantization_config", None)
    return found | {"num_nextn_predict_layers": 0} | changes


def configuration(place: Place) -> dict[str, Any]:
    few = {"num_hidden_layers": 4, "n_routed_experts": 16, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 4}
    return published(**(SMALL | few if place.small else {}))


def model_of(config: dict[str, Any]) -> Model:
    return count(families.checked(config, PUBLISHED))


def training(experts_per_shard: int) -> Training:
    """Training's settings as far as the plan's formulas for one layer depend on them."""
    return Training(
        strategy="zero3_offload",
        sequence_parallel_size=1,
        micro_batch_size=1,
        gradient_accumulation_steps=1,
        epochs=1,
        max_steps=None,
        experts_per_shard=experts_per_shard,
        dtype="bfloat16",
        activation_checkpointing=True,
        save_every_steps=1,
        keep_checkpoints=1,
    )
