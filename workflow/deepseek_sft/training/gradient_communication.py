"""In what dtype gradients are summed over the ranks; settled when a run begins, see ``new_runs``."""

from .settings import Settings

NAMES = {"float32": "fp32", "bfloat16": "bf16"}  # ours → DeepSpeed's


def of_deepspeed(settings: Settings) -> dict[str, str]:
    """DeepSpeed's key; none where it would say the model's dtype, which is its default."""
    if settings.gradient_communication_dtype in (None, settings.dtype):
        return {}
    return {"communication_data_type": NAMES[settings.gradient_communication_dtype]}
