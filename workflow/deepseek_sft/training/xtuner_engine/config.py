"""The xtuner configuration of a run, rendered from settings; needs no torch."""

from typing import TYPE_CHECKING, Any

from ... import templates
from ..nodes import NodeEnvironment

if TYPE_CHECKING:
    from ..stage import Run

TEMPLATE = "sft_config.py.j2"


def zero_optimization(strategy: str, accelerator: str) -> dict[str, Any]:
    """DeepSpeed's section of the same name for ``zero3`` and ``zero3_offload``."""
    section: dict[str, Any] = {
        "stage": 3,
        "overlap_comm": accelerator == "cuda",
        "contiguous_gradients": True,
        "stage3_gather_16bit_weights_on_model_save": False,
    }
    if strategy == "zero3_offload":
        pinned = {"device": "cpu", "pin_memory": accelerator == "cuda"}
        section |= {"offload_optimizer": dict(pinned), "offload_param": dict(pinned)}
    return section


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
        zero=zero_optimization(run.settings.strategy, accelerator),
    )
