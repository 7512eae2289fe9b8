"""Settings of one training run, read from ``train/settings.json``."""

import dataclasses
import math
from pathlib import Path
from typing import Any, Literal

from .. import files, json_files
from ..errors import BadInputError
from ..limits import PHASES
from . import deepspeed_keys

# Part of the run id: raise it when a change of the training code changes what the same settings train.
CODE_VERSION = 2

# Changing them re-runs nothing.
STEERING = (
    "save_every_steps",
    "save_every_minutes",
    "keep_checkpoints",
    "log_every_steps",
    "first_loss_max",
    "keep_layer_gathered",
    "on_not_finite",
    "spike_factor",
    "on_spike",
    "hang_minutes",
    "slow_rank_percent",
    "check_base",
)
# Not part of the run id: the same run goes on when they change.
OPERATIONAL = (*STEERING, "gpu_tflops", "max_hours")
CHOICES = {
    "engine": ("xtuner",),
    "strategy": ("zero3", "zero3_offload"),
    "offload": ("both", "optimizer", "parameters"),
    "optimizer": ("adamw", "cpu_adam"),
    "lr_schedule": ("cosine", "constant"),
    "dtype": ("bfloat16", "float32"),
    "gradient_accumulation_dtype": ("bfloat16", "float32"),
    "gradient_communication_dtype": (None, "float32", "bfloat16"),
    "expert_products": ("auto", "grouped", "loop"),
    "attention": ("auto", "sdpa", "flash"),
    "on_not_finite": ("stop", "skip"),
    "on_spike": ("warn", "skip", "stop"),
    "check_base": ("auto", "always", "never"),
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything the configuration says about training; keys and units as in ``config/README.md``."""

    engine: str
    strategy: str
    offload: str
    sequence_parallel_size: int
    micro_batch_size: int
    gradient_accumulation_steps: int
    gradient_accumulation_dtype: str
    epochs: float
    max_steps: int | None
    learning_rate: float
    min_learning_rate: float
    adam_betas: tuple[float, float]
    weight_decay: float
    max_grad_norm: float
    optimizer: str
    warmup_ratio: float
    lr_schedule: Literal["cosine", "constant"]
    experts_per_shard: int
    expert_products: str
    keep_layer_gathered: bool
    auxiliary_loss_weight: float
    balance_bias_speed: float
    dtype: str
    activation_checkpointing: bool
    seed: int
    max_hours: float | None
    save_every_steps: int
    save_every_minutes: float | None
    keep_checkpoints: int
    log_every_steps: int
    first_loss_max: float | None
    on_not_finite: Literal["stop", "skip"]
    spike_factor: float | None
    on_spike: Literal["warn", "skip", "stop"]
    hang_minutes: dict[str, float | None] | None
    gpu_tflops: float | None
    attention: str
    run_name: str
    slow_rank_percent: float | None = None
    check_base: str = "auto"
    gradient_communication_dtype: str | None = None
    deepspeed: dict[str, Any] | None = None

    @property
    def max_seconds(self) -> float | None:
        return None if self.max_hours is None else self.max_hours * 3600

    def shaping(self) -> dict[str, Any]:
        """The settings that decide what is trained, without the operational ones and the early end."""
        values = dataclasses.asdict(self)
        at_default = {key for key, default in LATER.items() if values[key] == default}
        return {key: value for key, value in values.items() if key not in OPERATIONAL and key not in at_default}


# Settings that came later (``x-later`` in the schema), which settings files of begun runs lack: part of the run id only
# where they differ from these defaults, under which a run goes on as it was begun.
LATER: dict[str, Any] = {
    field.name: field.default for field in dataclasses.fields(Settings) if field.default is not dataclasses.MISSING
}


def read(path: str | Path) -> Settings:
    """Read and check a settings file.

    Raises:
        BadInputError: unreadable, a key missing or unknown, or a value outside its range.
    """
    path = Path(path)
    try:
        values = json_files.load(path)
    except (OSError, ValueError) as error:
        raise BadInputError(f"settings {path} cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise BadInputError(f"settings {path} are not a JSON object")
    names = {field.name for field in dataclasses.fields(Settings)}
    if missing := sorted(names - LATER.keys() - values.keys()):
        raise BadInputError(f"{path}: missing settings: {', '.join(missing)}", "add them (config/README.md)")
    if unknown := sorted(values.keys() - names):
        raise BadInputError(f"{path}: unknown settings: {', '.join(unknown)}", "remove them (config/README.md)")
    values = LATER | values
    for key, allowed in CHOICES.items():
        if values[key] not in allowed:
            raise BadInputError(f"{path}: {key} is {values[key]!r}, allowed: {', '.join(map(str, allowed))}")
    positive = ("sequence_parallel_size", "micro_batch_size", "gradient_accumulation_steps", "experts_per_shard")
    for key in (*positive, "save_every_steps", "keep_checkpoints", "log_every_steps"):
        if not isinstance(values[key], int) or isinstance(values[key], bool) or values[key] < 1:
            raise BadInputError(f"{path}: {key} must be a positive integer, found {values[key]!r}")
    if values["max_steps"] is not None and (not isinstance(values["max_steps"], int) or values["max_steps"] < 1):
        raise BadInputError(f"{path}: max_steps must be a positive integer or null, found {values['max_steps']!r}")
    for key in ("epochs", "learning_rate", "max_grad_norm"):
        if not _is_number(values[key]) or values[key] <= 0:
            raise BadInputError(f"{path}: {key} must be above 0, found {values[key]!r}")
    for key in ("max_hours", "save_every_minutes", "first_loss_max", "spike_factor", "gpu_tflops", "slow_rank_percent"):
        if values[key] is not None and (not _is_number(values[key]) or values[key] <= 0):
            raise BadInputError(f"{path}: {key} must be above 0 or null, found {values[key]!r}")
    if values["deepspeed"] is not None and not isinstance(values["deepspeed"], dict):
        raise BadInputError(f"{path}: deepspeed must be keys and their values or null, found {values['deepspeed']!r}")
    if wrong := list(deepspeed_keys.problems(values["deepspeed"])):
        raise BadInputError(f"{path}: " + "; ".join(wrong), "remove them (docs/training.md)")
    limits = values["hang_minutes"]
    if limits is not None and (
        not isinstance(limits, dict)
        or limits.keys() != set(PHASES)
        or not all(value is None or _is_positive(value) for value in limits.values())
    ):
        raise BadInputError(f"{path}: hang_minutes must give {', '.join(PHASES)} in minutes, found {limits!r}")
    for key in ("min_learning_rate", "weight_decay", "warmup_ratio", "auxiliary_loss_weight", "balance_bias_speed"):
        if not _is_number(values[key]) or values[key] < 0:
            raise BadInputError(f"{path}: {key} must not be negative, found {values[key]!r}")
    if values["min_learning_rate"] > values["learning_rate"]:
        raise BadInputError(f"{path}: min_learning_rate is above learning_rate")
    if values["warmup_ratio"] > 1:
        raise BadInputError(f"{path}: warmup_ratio must be at most 1, found {values['warmup_ratio']!r}")
    if values["optimizer"] == "cpu_adam" and (
        values["strategy"] != "zero3_offload" or values["offload"] == "parameters"
    ):
        raise BadInputError(
            f"{path}: optimizer cpu_adam needs optimizer states in host memory",
            "set strategy zero3_offload and offload both or optimizer, or optimizer adamw",
        )
    betas = values["adam_betas"]
    if not (isinstance(betas, list) and len(betas) == 2 and all(_is_number(b) and 0 <= b < 1 for b in betas)):
        raise BadInputError(f"{path}: adam_betas must be two numbers in [0, 1), found {betas!r}")
    return Settings(**(values | {"adam_betas": tuple(betas)}))


def run_id(settings: Settings, base: dict[str, Any], tokens: dict[str, Any]) -> str:
    """Name of the run that these settings and inputs make.

    Args:
        base: receipt of prepare_model.
        tokens: receipt of tokenize_data.

    The inputs are known by what they were made from: rule, input fingerprints and settings of their receipts.
    The world size is not part of it; a resume with another one is refused instead.
    """
    return files.digest(
        {
            "code": CODE_VERSION,
            "settings": settings.shaping(),
            "base": identity(base),
            "tokens": identity(tokens),
        }
    )


def identity(receipt: dict[str, Any]) -> str:
    """Digest of what determines a receipt's result, whatever its paths, times and hosts."""
    inputs = {name: entry["fingerprint"] for name, entry in receipt["inputs"].items()}
    fingerprints = {k: v for k, v in receipt["figures"].items() if "fingerprint" in k}
    return files.digest([receipt["rule"], inputs, receipt["settings"], fingerprints], 64)


def _is_positive(value: Any) -> bool:
    return _is_number(value) and value > 0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
