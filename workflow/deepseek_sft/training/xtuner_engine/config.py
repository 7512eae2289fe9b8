"""The xtuner configuration of a run, rendered from settings; needs no torch."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ... import templates
from ...model import release
from .. import deepspeed_keys, gradient_communication, slow_nodes
from ..nodes import NodeEnvironment
from ..settings import Settings

if TYPE_CHECKING:
    from ..stage import Run

TEMPLATE = "sft_config.py.j2"


def zero_optimization(settings: Settings, accelerator: str, base: Path) -> dict[str, Any]:
    """DeepSpeed's section of the same name.

    Args:
        base: folder of the base model.
    """
    section: dict[str, Any] = {
        "stage": 3,
        "overlap_comm": accelerator == "cuda",
        "contiguous_gradients": True,
        "stage3_gather_16bit_weights_on_model_save": False,
    }
    if settings.keep_layer_gathered:
        # A layer is used twice within this many elements: recomputed, then run backward.
        elements = 2 * release.largest_layer(release.read_config(base))
        section |= {"stage3_max_reuse_distance": elements, "stage3_max_live_parameters": elements}
    if settings.strategy == "zero3_offload":
        place = {"device": "cpu", "pin_memory": accelerator == "cuda"}
        kept = {"optimizer": ["optimizer"], "parameters": ["param"]}.get(settings.offload, ["optimizer", "param"])
        section |= {f"offload_{what}": dict(place) for what in kept}
    return section


def deepspeed(settings: Settings, accelerator: str, base: Path) -> dict[str, Any]:
    """DeepSpeed's configuration without what the strategy adds; `train.deepspeed` comes last.

    Args:
        base: folder of the base model.
    """
    config: dict[str, Any] = {"bf16": {"enabled": settings.dtype == "bfloat16"}}
    if settings.gradient_accumulation_steps > 1 and settings.gradient_accumulation_dtype == "float32":
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    config |= gradient_communication.of_deepspeed(settings)
    config |= {
        "zero_optimization": zero_optimization(settings, accelerator, base),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    return deepspeed_keys.merged(config, settings.deepspeed)


def render(run: "Run", node: NodeEnvironment, accelerator: str) -> str:
    """Text of ``sft_config.py``: a plain mmengine configuration, all values literal."""
    return templates.load(TEMPLATE, python=repr).render(
        run_id=run.run_id,
        run=str(run.folder),
        base=str(run.base),
        tokens=str(run.tokens),
        settings=run.settings,
        schedule=run.schedule,
        node=node,
        accelerator=accelerator,
        slow_rank_percent=slow_nodes.allowed_percent(run.settings.slow_rank_percent, accelerator),
        deepspeed=deepspeed(run.settings, accelerator, run.base),
    )
