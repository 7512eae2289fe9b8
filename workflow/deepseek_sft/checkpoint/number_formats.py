"""BF16, FP32 and FP8 (E4M3) in numpy, which knows only one of them: bit patterns in unsigned integers."""

import numpy as np
from numpy.typing import NDArray

BF16_NAN = np.uint16(0x7FC0)
BF16_OVERFLOW = np.uint32(0x7F7F8000).view(np.float32)  # the smallest number that rounds to infinity
BLOCK = 1 << 18  # elements converted at a time: what is needed in between stays in the processor's cache
WIDTHS = {"F32": np.float32, "BF16": np.uint16, "F8_E4M3": np.uint8}  # safetensors dtype → numpy's for its bits


def float32_to_bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round to nearest, ties to even, as ``torch.Tensor.to(torch.bfloat16)`` does; every NaN becomes 0x7FC0.

    Args:
        values: any shape, contiguous. Left unchanged.

    Returns:
        The BF16 bit patterns, same shape.
    """
    bits = values.view(np.uint32)
    rounded = bits >> 16
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits  # wraps for some NaNs only, which are set below
    rounded >>= 16
    result = rounded.astype(np.uint16)
    if not within_bf16(values):
        result[np.isnan(values)] = BF16_NAN
    return result


def within_bf16(values: NDArray[np.float32]) -> bool:
    """Whether all values are finite and stay so when rounded to BF16; a fifth of the time of looking at each."""
    return values.size == 0 or bool(values.min() > -BF16_OVERFLOW and values.max() < BF16_OVERFLOW)


def bf16_to_float32(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Exact."""
    widened = bits.astype(np.uint32)
    widened <<= 16
    return widened.view(np.float32)


def _e4m3_values() -> NDArray[np.float32]:
    """The 256 values of FP8 E4M3 "fn": bias 7, no infinities, 0x7F and 0xFF are NaN."""
    codes = np.arange(256)
    exponent, mantissa = (codes >> 3) & 0xF, codes & 0x7
    normal = np.ldexp(1 + mantissa / 8, exponent - 7)
    values = np.where(exponent == 0, np.ldexp(mantissa / 8, -6), normal)
    values = np.where(codes & 0x7F == 0x7F, np.nan, values)
    return np.where(codes & 0x80, -values, values).astype(np.float32)


E4M3_VALUES = _e4m3_values()


def count_non_finite(bits: NDArray[np.uint16] | NDArray[np.uint32]) -> int:
    """Number of infinities and NaNs among BF16 (uint16) or FP32 (uint32) bit patterns."""
    exponent = bits.dtype.type(0x7F80 if bits.dtype == np.uint16 else 0x7F800000)
    return int(np.count_nonzero((bits & exponent) == exponent))


def convert(values: NDArray, source: str, target: str) -> tuple[NDArray, int]:
    """Convert a flat array between safetensors dtypes ``F32`` and ``BF16``, in blocks.

    Args:
        values: bits as in ``WIDTHS[source]``.

    Returns:
        Bits as in ``WIDTHS[target]`` (``values`` itself if the dtypes are equal), and how many of them are not finite.
    """
    result = values if source == target else np.empty(values.shape, WIDTHS[target])
    non_finite = 0
    for start in range(0, len(values), BLOCK):
        part = slice(start, start + BLOCK)
        if source != target:
            result[part] = float32_to_bf16(values[part]) if target == "BF16" else bf16_to_float32(values[part])
        if source != "F32" or not within_bf16(values[part].view(np.float32)):
            non_finite += count_non_finite(result[part].view(np.uint16 if target == "BF16" else np.uint32))
    return result, non_finite
