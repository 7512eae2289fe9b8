"""The release's FP8 block format: E4M3 codes and one FP32 factor for each block of 128 × 128 of a matrix.

A value is code × factor. The factor is stored as ``<name>_scale_inv`` [ceil(rows / 128), ceil(columns / 128)]; blocks
at the right and lower edge are smaller. Both directions work on whole rows, so that a matrix can be streamed.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import number_formats
from .tensor_spec import FP8_BLOCK, TensorSpec, scale_shape

QUANTIZATION_CONFIG = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
}
TILE_COLUMNS = number_formats.BLOCK // FP8_BLOCK  # of what is worked on at a time


def factors_spec(matrix: TensorSpec) -> TensorSpec:
    """What the block factors of a matrix are."""
    return TensorSpec(scale_shape(matrix.shape), "F32")


class Quantized(NamedTuple):
    """Whole rows of a quantised matrix.

    Attributes:
        codes: uint8 [rows, columns], E4M3.
        factors: float32 [ceil(rows / 128), ceil(columns / 128)].
        non_finite: infinities and NaNs among the values; they became NaN.
    """

    codes: NDArray[np.uint8]
    factors: NDArray[np.float32]
    non_finite: int


def quantize(values: NDArray[np.float32]) -> Quantized:
    """Quantise whole rows of a matrix, the first of which begins a block.

    Each block's factor is its largest magnitude / 448, computed in FP32 (1 where that is zero); each code is
    value / factor, rounded to nearest even. Infinities and NaNs do not enter the factor.

    Args:
        values: float32 [rows, columns]; contiguous, left unchanged.

    Memory:
        About 4 MiB besides the result, whatever the shape.
    """
    rows, columns = values.shape
    codes = np.empty(values.shape, np.uint8)
    factors = np.empty((-(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK)), np.float32)
    non_finite = 0
    for band in range(factors.shape[0]):
        lines = slice(band * FP8_BLOCK, (band + 1) * FP8_BLOCK)
        for left in range(0, columns, TILE_COLUMNS):
            place = lines, slice(left, left + TILE_COLUMNS)
            tile = np.ascontiguousarray(values[place])
            largest = np.abs(tile).max(axis=0)
            if not np.isfinite(largest).all():
                finite = np.isfinite(tile)
                non_finite += int(tile.size - np.count_nonzero(finite))
                largest = np.abs(np.where(finite, tile, 0)).max(axis=0)
            factor = np.maximum.reduceat(largest, np.arange(0, len(largest), FP8_BLOCK))
            factor /= np.float32(number_formats.E4M3_LARGEST)
            factor[factor == 0] = 1
            with np.errstate(over="ignore", invalid="ignore"):
                codes[place] = number_formats.float32_to_e4m3(tile / _by_column(factor, tile.shape[1]))
            factors[band, left // FP8_BLOCK : left // FP8_BLOCK + len(factor)] = factor
    return Quantized(codes, factors, non_finite)


def dequantize(codes: NDArray[np.uint8], factors: NDArray[np.float32], first_row: int = 0) -> NDArray[np.float32]:
    """Values of whole rows: code × factor, computed in FP32 as DeepSeek's ``fp8_cast_bf16.py`` does.

    Args:
        codes: uint8 [rows, columns].
        factors: those of the blocks that the rows lie in, float32 [blocks, ceil(columns / 128)].
        first_row: row of the first block at which ``codes`` begins, 0 to 127.

    Returns:
        float32 [rows, columns].
    """
    values = np.take(number_formats.E4M3_VALUES, codes)
    position = 0
    for band in factors:
        end = min(len(codes), position + FP8_BLOCK - first_row)
        with np.errstate(over="ignore", invalid="ignore"):  # whoever writes the values counts what is not finite
            values[position:end] *= _by_column(band, codes.shape[1])
        position, first_row = end, 0
    return values


def _by_column(factors: NDArray[np.float32], columns: int) -> NDArray[np.float32]:
    return np.repeat(factors, FP8_BLOCK)[:columns]
