"""A tensor of a model folder by shape and dtype, and the FP8 block format's constants, whatever model it belongs to."""

import math
from dataclasses import dataclass

FP8_BLOCK = 128  # side of the square blocks that share one scale in the FP8 release
INT4 = "I4"  # dtype of a matrix in ``int4_groups``; no tensor of a file has it
SCALE_SUFFIX = "_scale_inv"  # of a quantised tensor's name


@dataclass(frozen=True)
class TensorSpec:
    """A tensor of a model folder: its shape and its safetensors dtype (``BF16``, ``F32``, ``F8_E4M3``)."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the scales of a quantised matrix: one per block of 128 × 128, the last ones cut."""
    return tuple(math.ceil(size / FP8_BLOCK) for size in shape)
