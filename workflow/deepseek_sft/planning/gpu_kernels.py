"""Which kernels a named GPU will run, by the same rule by which training chooses them."""

from ..model import attention_choice
from .counting import Model
from .gpu_models import Gpu
from .settings import Samples

# Versions with which torch's build of the locked environment reaches every kernel that it knows.
TORCH, CUDNN = (2, 13), attention_choice.CUDNN_LEAST


def attention(gpu: Gpu, model: Model, samples: Samples) -> str:
    """The kernel of `train.attention: auto` for samples of the average length."""
    device = attention_choice.Device(gpu.capability, TORCH, CUDNN)
    sizes = (model["qk_nope_head_dim"] + model["qk_rope_head_dim"], model["v_head_dim"])
    length = round(samples.mean_length / samples.per_row)
    return attention_choice.choose("auto", device, sizes, samples.packed, [length])


def served_dtype_note(name: str, gpu: Gpu, served_dtype: str) -> str:
    """What a format of the served model means on this GPU where it is no ordinary one; else empty."""
    if served_dtype != "fp8" or gpu.multiplies_fp8:
        return ""
    return (
        f"convert.dtype: fp8 on {name}, which has no FP8 arithmetic: vLLM 0.32 keeps such weights in FP8 and "
        "multiplies in BF16 (Marlin kernels, by its source; not run); convert: {dtype: bf16} is the sure way, on twice "
        "the GPUs"
    )
