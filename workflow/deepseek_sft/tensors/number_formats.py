"""BF16, FP16, FP32 and FP8 (E4M3) in numpy, which knows two of them: the others are bit patterns in integers."""

import numpy as np
from numpy.typing import NDArray

BF16_NAN = np.uint16(0x7FC0)
BF16_OVERFLOW = np.uint32(0x7F7F8000).view(np.float32)  # the smallest number that rounds to infinity
BLOCK = 1 << 18  # elements converted at a time: what is needed in between stays in the processor's cache
WIDTHS = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16, "F8_E4M3": np.uint8}  # numpy's type for the bits

FLOATS = ("F32", "F16", "BF16")  # what ``to_float32`` reads


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


E4M3_LARGEST = 448.0
_E4M3_NORMAL = np.uint32(121 << 23)  # FP32 bits of 2⁻⁶, the smallest normal E4M3 value
_E4M3_LARGEST_BITS = np.uint32(0x43E00000)  # FP32 bits of 448


def float32_to_e4m3(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Round to nearest, ties to even, as ``torch.Tensor.to(torch.float8_e4m3fn)`` does for |x| ≤ 448.

    Larger values become 448 of their sign, infinities and NaNs become NaN (0x7F with the sign).

    Args:
        values: any shape, contiguous. Left unchanged.

    Returns:
        The E4M3 bit patterns, same shape.
    """
    bits = values.view(np.uint32)
    magnitudes = bits & np.uint32(0x7FFFFFFF)
    special = magnitudes >= np.uint32(0x7F800000)
    np.minimum(magnitudes, _E4M3_LARGEST_BITS, out=magnitudes)
    small = magnitudes < _E4M3_NORMAL
    # Below 2⁻⁶ the codes are multiples of 2⁻⁹; adding 2¹⁴, whose last bit is worth 2⁻⁹, rounds to them.
    subnormal = magnitudes[small].view(np.float32) + np.float32(2.0**14)
    rounded = magnitudes >> 20
    rounded &= 1
    rounded += np.uint32(0x7FFFF)
    rounded += magnitudes
    rounded >>= 20
    rounded -= np.uint32((127 - 7) << 3)  # the exponent's bias is 7 instead of 127
    codes = rounded.astype(np.uint8)  # wraps for small values only, which are set next
    codes[small] = subnormal.view(np.uint32) - np.float32(2.0**14).view(np.uint32)
    codes[special] = 0x7F
    codes |= (bits >> 24).astype(np.uint8) & 0x80
    return codes


def count_non_finite(bits: NDArray[np.uint16] | NDArray[np.uint32]) -> int:
    """Number of infinities and NaNs among BF16 (uint16) or FP32 (uint32) bit patterns."""
    exponent = bits.dtype.type(0x7F80 if bits.dtype == np.uint16 else 0x7F800000)
    return int(np.count_nonzero((bits & exponent) == exponent))


def to_float32(bits: NDArray, dtype: str) -> NDArray[np.float32]:
    """Values of ``F32``, ``F16`` or ``BF16`` bits; exact. ``bits`` itself if they are FP32 already."""
    if dtype == "F32":
        return bits.view(np.float32)
    return bits.view(np.float16).astype(np.float32) if dtype == "F16" else bf16_to_float32(bits)


def convert(values: NDArray, source: str, target: str) -> tuple[NDArray, int]:
    """Convert a flat array from one safetensors dtype to another, in blocks.

    Args:
        values: bits as in ``WIDTHS[source]``.
        source: ``F32``, ``F16`` or ``BF16``; any dtype if it equals ``target``.
        target: ``F32`` or ``BF16``.

    Returns:
        Bits as in ``WIDTHS[target]`` (``values`` itself if the dtypes are equal), and how many of them are not finite.
    """
    if source == target and source not in ("F32", "BF16"):
        return values, 0
    result = values if source == target else np.empty(values.shape, WIDTHS[target])
    non_finite = 0
    for start in range(0, len(values), BLOCK):
        part = slice(start, start + BLOCK)
        if source != target:
            widened = to_float32(values[part], source)
            result[part] = float32_to_bf16(widened) if target == "BF16" else widened
        if source != "F32" or not within_bf16(values[part].view(np.float32)):
            non_finite += count_non_finite(result[part].view(np.uint16 if target == "BF16" else np.uint32))
    return result, non_finite
