"""What all ranks of a start are told, as data in the run folder; needs no torch."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ... import families
from ...planning import zero_thresholds
from ...settings import deepspeed_keys
from ...slurm.nodes import NodeEnvironment
from .. import gradient_communication, slow_nodes
from ..schedule import Schedule
from ..settings import Settings

if TYPE_CHECKING:
    from ..stage import Run

NEVER = 10**13  # steps between DeepSpeed's own lines on its progress


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """One start of one run; paths are absolute.

    Attributes:
        base, tokens: folders of the base model and of the token dataset.
        base_sums: file with the sums of the base's files; None where prepare_model wrote none.
        slow_rank_percent: above the median from which a rank is slow; None judges nothing.
        deepspeed: DeepSpeed's whole configuration.
        begun: see ``same_training.Found``.
        held_out: folder of the held-out token dataset; None where nothing is validated.
    """

    run_id: str
    base: str
    base_sums: str | None
    tokens: str
    accelerator: str
    nodes: int
    settings: Settings
    schedule: Schedule
    slow_rank_percent: float | None
    deepspeed: dict[str, Any]
    begun: dict[str, int] = dataclasses.field(default_factory=dict)
    held_out: str | None = None

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "EngineConfig":
        settings = values["settings"]
        betas = tuple(settings["adam_betas"])
        return cls(
            **values
            | {
                "settings": Settings(**settings | {"adam_betas": betas}),
                "schedule": Schedule(**values["schedule"]),
            }
        )


@dataclasses.dataclass(frozen=True)
class Attempt:
    """One start, as its ranks see it.

    Attributes:
        run: the run's folder.
        name: of this start.
        hosts: names of all nodes in the order of their ranks.
        stop_files: files whose existence asks to save and stop.
        end_after: step after which a rehearsal ends without saving; None trains to the end.
        logs: folder of this start's logs.
        began: when this process did, seconds since the epoch.
        memory_before_model_gib: resident size of this process: interpreter, libraries, communication.
    """

    run: Path
    name: str
    logs: Path
    hosts: list[str]
    stop_files: list[Path]
    end_after: int | None
    memory_before_model_gib: float
    began: float

    @property
    def results(self) -> Path:
        """``<results>/train``."""
        return self.run.parent.parent


def of(run: "Run", node: NodeEnvironment, accelerator: str) -> EngineConfig:
    """What the ranks of a start are told."""
    return EngineConfig(
        run_id=run.run_id,
        base=str(run.base),
        base_sums=run.base_sums,
        tokens=str(run.tokens),
        accelerator=accelerator,
        nodes=node.nodes,
        settings=run.settings,
        schedule=run.schedule,
        slow_rank_percent=slow_nodes.allowed_percent(run.settings.slow_rank_percent, accelerator),
        deepspeed=deepspeed(run.settings, accelerator, run.base),
        begun=run.begun,
        held_out=str(run.held_out) if run.held_out else None,
    )


def zero_optimization(settings: Settings, accelerator: str, base: Path) -> dict[str, Any]:
    """DeepSpeed's section of the same name.

    Args:
        base: folder of the base model.
    """
    section: dict[str, Any] = {
        "stage": 3,
        "overlap_comm": accelerator == "cuda",
        "contiguous_gradients": False,  # a gradient waits where it is: each would be copied once more
        "stage3_gather_16bit_weights_on_model_save": False,
    }
    by_shard = settings.zero_thresholds == "shard"
    if by_shard or settings.keep_layer_gathered:
        section |= zero_thresholds.of_model(
            families.read_config(base), settings.experts_per_shard, by_shard, settings.keep_layer_gathered
        ).keys()
    if settings.strategy == "zero3_offload":
        place = {"device": "cpu", "pin_memory": accelerator == "cuda"}
        kept = {"optimizer": ["optimizer"], "parameters": ["param"]}.get(settings.offload, ["optimizer", "param"])
        section |= {f"offload_{what}": dict(place) for what in kept}
    return section


def deepspeed(settings: Settings, accelerator: str, base: Path) -> dict[str, Any]:
    """DeepSpeed's configuration; `train.deepspeed` comes last.

    Args:
        base: folder of the base model.
    """
    config: dict[str, Any] = {
        "bf16": {"enabled": settings.dtype == "bfloat16"},
        "gradient_clipping": settings.max_grad_norm,
        "train_micro_batch_size_per_gpu": settings.micro_batch_size,
        "gradient_accumulation_steps": settings.gradient_accumulation_steps,
        "steps_per_print": NEVER,
    }
    if settings.gradient_accumulation_steps > 1 and settings.gradient_accumulation_dtype == "float32":
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    config |= gradient_communication.of_deepspeed(settings)
    config |= {
        "zero_optimization": zero_optimization(settings, accelerator, base),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    return deepspeed_keys.merged(config, settings.deepspeed)
