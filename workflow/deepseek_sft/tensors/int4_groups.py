"""INT4 of compressed-tensors, as Kimi-K2-Thinking ships its experts: 8 values in an int32, a scale for 32 of them.

A matrix ``X.weight`` lies as ``X.weight_packed`` int32 [rows, columns / 8], value ``i`` of a word in bits ``4 i`` to
``4 i + 3``, stored plus 8; ``X.weight_scale`` BF16 [rows, columns / 32]; and ``X.weight_shape``. A value is
(code - 8) × scale, rounded to BF16: the product of 4 and 8 significant bits is exact in FP32.

Source: compressed_tensors 0.17 (``pack_quantized``, ``lifecycle.forward.dequantize``).
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import BadInputError
from . import number_formats
from .safetensors_files import StoredTensor
from .tensor_spec import INT4, TensorSpec

GROUP = 32  # values of a row that share one scale
WORD = 8  # values of an int32
PACKED, SCALE, SHAPE = "_packed", "_scale", "_shape"  # after the matrix's name
WANTED = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP, "symmetric": True}


def is_format(settings: Any) -> bool:
    """Whether a ``quantization_config`` is of this format."""
    if not isinstance(settings, Mapping) or settings.get("quant_method") != "compressed-tensors":
        return False
    groups = settings.get("config_groups")
    if settings.get("format") != "pack-quantized" or not isinstance(groups, Mapping) or not groups:
        return False
    return all(_is_group(group) for group in groups.values())


def _is_group(group: Any) -> bool:
    weights = group.get("weights") if isinstance(group, Mapping) else None
    if not isinstance(weights, Mapping) or group.get("input_activations") or weights.get("actorder"):
        return False
    return all(weights.get(key) == value for key, value in WANTED.items())


def fold(tensors: Mapping[str, StoredTensor]) -> tuple[dict[str, StoredTensor], dict[StoredTensor, StoredTensor]]:
    """Matrices under their own names, ``INT4``, and the scales of each.

    Raises:
        BadInputError: packed values and scales do not belong together.
    """
    folded: dict[str, StoredTensor] = {}
    scales: dict[StoredTensor, StoredTensor] = {}
    packed = {name.removesuffix(PACKED) for name in tensors if name.endswith(f".weight{PACKED}")}
    for name, stored in tensors.items():
        own = next((name.removesuffix(end) for end in (PACKED, SCALE, SHAPE) if name.endswith(end)), "")
        if own not in packed:
            folded[name] = stored
        elif name.endswith(PACKED):
            rows, words = stored.spec.shape if len(stored.spec.shape) == 2 else (0, 0)
            wanted = TensorSpec((rows, words * WORD // GROUP), "BF16")
            scale = tensors.get(own + SCALE)
            if stored.spec.dtype != "I32" or words * WORD % GROUP or not rows or scale is None or scale.spec != wanted:
                found = f"{scale.spec.dtype} {list(scale.spec.shape)}" if scale else "missing"
                raise BadInputError(
                    f"{stored.file}: {name} is {stored.spec.dtype} {list(stored.spec.shape)} and its scale {found}; "
                    f"needed are int32 and BF16 {list(wanted.shape)}, one for {GROUP} values",
                    "fetch this file again",
                )
            folded[own] = StoredTensor(stored.file, stored.offset, TensorSpec((rows, words * WORD), INT4))
            scales[folded[own]] = scale
    return folded, scales


def dequantize(words: NDArray[np.uint32], scales: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Values of whole rows, as float32 that BF16 holds exactly.

    Args:
        words: [rows, columns / 8], the packed int32 as bits.
        scales: BF16 bits [rows, columns / 32].
    """
    rows, count = words.shape
    values = np.empty((rows, count, WORD), np.float32)
    for at in range(WORD):
        values[:, :, at] = ((words >> np.uint32(4 * at)) & np.uint32(15)).astype(np.float32) - np.float32(8)
    grouped = values.reshape(rows, -1, GROUP)
    grouped *= number_formats.bf16_to_float32(scales)[:, :, None]
    return number_formats.bf16_to_float32(number_formats.float32_to_bf16(values.reshape(rows, count * WORD)))
