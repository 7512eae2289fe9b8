"""What the tests of the training stage share: settings, and a run folder with stand-in checkpoints."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from deepseek_sft.training import checkpoints
from deepseek_sft.training import settings as training_settings

SETTINGS: dict[str, Any] = {
    "engine": "xtuner",
    "strategy": "zero3",
    "offload": "both",
    "sequence_parallel_size": 1,
    "micro_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "gradient_accumulation_dtype": "float32",
    "epochs": 1,
    "max_steps": None,
    "learning_rate": 1e-3,
    "min_learning_rate": 0.0,
    "adam_betas": [0.9, 0.999],
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "optimizer": "adamw",
    "warmup_ratio": 0.0,
    "lr_schedule": "constant",
    "experts_per_shard": 4,
    "expert_products": "auto",
    "keep_layer_gathered": False,
    "auxiliary_loss_weight": 0.0,
    "balance_bias_speed": 0.0,
    "dtype": "float32",
    "activation_checkpointing": True,
    "seed": 42,
    "max_hours": None,
    "save_every_steps": 100,
    "save_every_minutes": None,
    "keep_checkpoints": 2,
    "log_every_steps": 1,
    "first_loss_max": None,
    "on_not_finite": "stop",
    "spike_factor": None,
    "on_spike": "warn",
    "hang_minutes": None,
    "gpu_tflops": None,
    "attention": "auto",
    "run_name": "",
}


def settings(**changes: Any) -> training_settings.Settings:
    values = SETTINGS | changes
    return training_settings.Settings(**(values | {"adam_betas": tuple(values["adam_betas"])}))


def write_settings(path: Path, **changes: Any) -> Path:
    path.write_text(json.dumps(SETTINGS | changes))
    return path


def write_checkpoint(run: Path, step: int, run_id: str = "abc", world_size: int = 2, commit: bool = True) -> Path:
    """A checkpoint folder with small files under DeepSpeed's names."""
    folder = checkpoints.folder_of(run, step)
    folder.mkdir(parents=True)
    for rank in range(world_size):
        (folder / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").write_bytes(b"optimizer" * step)
        (folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt").write_bytes(b"model")
    if commit:
        marker = {"run_id": run_id, "step": step, "world_size": world_size, "progress": {}}
        checkpoints.commit(folder, marker, checkpoints.sizes(folder))
    return folder


def receipt(rule: str, **changes: Any) -> dict[str, Any]:
    values = {"rule": rule, "inputs": {"a": {"path": "x", "fingerprint": "f"}}, "settings": {"s": 1}, "figures": {}}
    return values | changes


def replaced(value: training_settings.Settings, **changes: Any) -> training_settings.Settings:
    return dataclasses.replace(value, **changes)
