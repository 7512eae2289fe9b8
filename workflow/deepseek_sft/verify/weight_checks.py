"""What is measured of every weight of a converted model, in one pass over its files."""

import hashlib
import math
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .. import families
from ..convert.base_model import BaseModel
from ..convert.tensor_sources import Source
from ..errors import BadInputError
from ..tensors import fp8_blocks, number_formats
from ..tensors.byte_ranges import OpenFiles
from ..tensors.number_formats import BLOCK, FLOATS, WIDTHS
from ..tensors.partitioned_parameter import Partitioned
from ..tensors.safetensors_files import ITEM_SIZES, StoredTensor
from ..tensors.tensor_spec import FP8_BLOCK, SCALE_SUFFIX

SAMPLE_BLOCK, SAMPLE_BLOCKS = 1 << 16, 4  # elements compared with the checkpoint per block, blocks per tensor
# Largest rounding error of each dtype, in parts of the rounded value: half of the last of 8, 4 or 24 significant bits.
HALF_ULP = {"BF16": 2.0**-8, "F8_E4M3": 2.0**-4, "F32": 2.0**-22}
E4M3_SUBNORMAL_HALF_ULP = 2.0**-10  # in block factors
E4M3_LARGEST_ERROR = 16 / number_formats.E4M3_LARGEST  # in parts of the block's largest magnitude


def adamw_ratio(beta1: float, beta2: float) -> float:
    """The largest |m̂| / √v̂, and so the furthest that AdamW moves an element per step in learning rates.

    By the Cauchy-Schwarz inequality it never exceeds (1 - β1) / √((1 - β2)(1 - β1²/β2)): 7.27 for 0.9 and 0.999,
    1.17 for 0.9 and 0.95.

    Raises:
        BadInputError: betas for which there is no bound.
    """
    if not (0 <= beta1 < 1 and 0 < beta2 < 1 and beta1**2 < beta2):
        raise BadInputError(f"AdamW's betas {beta1} and {beta2} bound nothing", "give those of the training run")
    return max(1.0, (1 - beta1) / math.sqrt((1 - beta2) * (1 - beta1**2 / beta2)))


@dataclass(frozen=True)
class ChangeBound:
    """How far training may have moved an element of value x: ``drift + decay · |x|``, besides rounding.

    Attributes:
        drift: absolute.
        decay: relative, by weight decay.
        bias_drift: absolute, of the routers' biases, which only the balance rule moves.
        learning_rate: the highest, about what one step of AdamW moves an element by.
        decay_per_step: relative, by the weight decay of one step at that rate.
    """

    drift: float
    decay: float
    bias_drift: float = 0.0
    learning_rate: float = 0.0
    decay_per_step: float = 0.0

    @staticmethod
    def of(
        learning_rate: float,
        steps: int,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.999),
        balance_bias_speed: float = 0.0,
    ) -> "ChangeBound":
        decay = learning_rate * steps * weight_decay
        drift = learning_rate * steps * adamw_ratio(*betas) * (1 + decay)
        return ChangeBound(drift, decay, balance_bias_speed * steps, learning_rate, learning_rate * weight_decay)


@dataclass
class Measured:
    """Figures of one tensor against the base model's.

    Attributes:
        non_finite: infinities and NaNs; ``base_non_finite`` those of the base, whose change cannot be judged.
        squared_change, squared_base: sums over elements.
        largest_excess: largest |change| beyond rounding and decay; to compare with ``ChangeBound.drift``.
        differing: elements that differ from the base's.
        compared: elements compared with their source, and ``unequal`` how many of them differ.
        fp8_error: largest |dequantised − source| in parts of the block's largest magnitude.
        stepped: whether the FP32 master weights differ from the base; None where that was not or cannot be looked at.
        smallest: of a tensor that was not stepped, the smallest magnitude.
    """

    non_finite: int = 0
    base_non_finite: int = 0
    squared_change: float = 0.0
    squared_base: float = 0.0
    largest_excess: float = 0.0
    differing: int = 0
    compared: int = 0
    unequal: int = 0
    fp8_error: float = 0.0
    stepped: bool | None = None
    smallest: float = math.inf

    @property
    def moved(self) -> bool:
        """Whether it is another tensor than the base's: by the FP32 master weights where these were looked at."""
        return self.differing > 0 if self.stepped is None else self.stepped

    @property
    def relative_change(self) -> float:
        """‖change‖ / ‖base‖; infinite where the base is zero and the model is not."""
        if self.squared_change == 0:
            return 0.0
        return math.sqrt(self.squared_change / self.squared_base) if self.squared_base else math.inf


def larger(first: float, second: float) -> float:
    """The larger of two; NaN if either is, which Python's ``max`` loses."""
    return first if math.isnan(first) or second <= first else second


def measure_block(result: Measured, new: NDArray, old: NDArray, half_ulp: float, decay: float) -> None:
    """Add one block.

    Args:
        new, old: float32 [n], the model's and the base's values.
        half_ulp: largest rounding error of ``new`` in parts of its value.
    """
    finite, base_finite = np.isfinite(new), np.isfinite(old)
    if not (finite.all() and base_finite.all()):
        result.non_finite += int(len(new) - np.count_nonzero(finite))
        result.base_non_finite += int(len(old) - np.count_nonzero(base_finite))
        old = np.where(base_finite, old, 0)
        new = np.where(finite & base_finite, new, old)
    change = np.abs(new - old)
    result.differing += int(np.count_nonzero(change))
    result.squared_change += float(np.dot(change, change))
    result.squared_base += float(np.dot(old, old))
    change -= half_ulp * np.abs(new)
    change -= decay * np.abs(old)
    result.largest_excess = larger(result.largest_excess, float(change.max(initial=0.0)))


def _step(*row_lengths: int) -> int:
    """About ``BLOCK`` elements: a multiple of the longest of the row lengths, which are equal where not 1."""
    row = max(row_lengths)
    return max(1, BLOCK // row) * row


def _factors(opened: OpenFiles, tensor: StoredTensor) -> NDArray[np.float32]:
    values = opened.read(tensor.file, tensor.offset, np.float32, tensor.spec.elements)
    return values.reshape(tensor.spec.shape)


def _old_values(opened: OpenFiles, base: Source, start: int, count: int) -> NDArray[np.float32]:
    """The base's values as training starts from them: what is FP8 there is rounded to BF16."""
    values = number_formats.to_float32(base.read(opened, start, count), base.dtype)
    return _in_bf16(values) if base.factors else values


def _in_bf16(values: NDArray[np.float32]) -> NDArray[np.float32]:
    return number_formats.bf16_to_float32(number_formats.float32_to_bf16(values))


def measure_tensor(
    opened: OpenFiles,
    hasher: "hashlib._Hash",
    model: StoredTensor,
    factors: StoredTensor | None,
    base: Source | None,
    decay: float,
) -> Measured:
    """Read one tensor of the model and of the base once; the bytes of the model also enter ``hasher``.

    Args:
        factors: block factors of the model's tensor if it is FP8.
        base: the same tensor of the base, or None.
    """
    result = Measured()
    dtype, item = model.spec.dtype, ITEM_SIZES[model.spec.dtype]
    scales = _factors(opened, factors) if factors else None
    columns = model.spec.shape[-1] if scales is not None else 1
    step = _step(columns, base.row if base else 1)
    rounding = HALF_ULP.get(dtype, 0.0)
    if base and base.dtype == "F32" and not base.factors and dtype == "BF16":
        rounding *= 2  # training begins with the base's FP32 values rounded
    for start in range(0, model.spec.elements, step):
        count = min(step, model.spec.elements - start)
        raw = opened.read(model.file, model.offset + start * item, np.uint8, count * item)
        hasher.update(raw)
        if scales is not None:
            row = start // columns
            band = scales[row // FP8_BLOCK :]
            new = fp8_blocks.dequantize(raw.reshape(-1, columns), band, row % FP8_BLOCK).reshape(-1)
        elif dtype in FLOATS:
            new = number_formats.to_float32(raw.view(WIDTHS[dtype]), dtype)
        else:  # the dtype check reports it
            continue
        if base is None:
            result.non_finite += int(np.count_nonzero(~np.isfinite(new)))
        else:
            measure_block(result, new, _old_values(opened, base, start, count), rounding, decay)
    if scales is not None:
        finite = scales[np.isfinite(scales)]  # of blocks with another factor every value counts as not finite
        smallest = E4M3_SUBNORMAL_HALF_ULP * float(finite.max(initial=0.0))
        result.largest_excess = larger(0.0, result.largest_excess - smallest)
    return result


def sampled_ranges(name: str, elements: int, full: bool, row: int = 1) -> Iterator[tuple[int, int]]:
    """(start, count) of the elements to compare: all, or the first, the last and two blocks chosen by the name.

    Args:
        row: elements that stay together; all starts are multiples of it.
    """
    sample = max(1, SAMPLE_BLOCK // row) * row
    if full or elements <= sample * SAMPLE_BLOCKS:
        step = max(1, BLOCK // row) * row
        for start in range(0, elements, step):
            yield start, min(step, elements - start)
        return
    last = (elements - sample) // row * row
    random = np.random.default_rng(zlib.crc32(name.encode()))
    for start in sorted({0, last, *(random.integers(0, last, SAMPLE_BLOCKS - 2) // row * row).tolist()}):
        yield int(start), min(sample, elements - int(start)) if start < last else elements - int(start)


def compare_with_source(
    opened: OpenFiles, name: str, model: StoredTensor, source: Source, full: bool, result: Measured
) -> None:
    """Compare bit for bit with the checkpoint's master weights, rounded as the conversion must round them."""
    dtype = model.spec.dtype
    for start, count in sampled_ranges(name, model.spec.elements, full, source.row):
        found = opened.read(model.file, model.offset + start * ITEM_SIZES[dtype], WIDTHS[dtype], count)
        expected, _ = number_formats.convert(source.read(opened, start, count), source.dtype, dtype)
        result.compared += count
        bits = {1: np.uint8, 2: np.uint16, 4: np.uint32}[ITEM_SIZES[dtype]]
        result.unequal += int(np.count_nonzero(found.view(bits) != expected.view(bits)))


def compare_quantized(
    opened: OpenFiles,
    name: str,
    model: StoredTensor,
    factors: StoredTensor,
    source: Source,
    full: bool,
    result: Measured,
) -> None:
    """Compare codes and factors bit for bit with the source's, quantised anew, and the dequantised values with it."""
    columns = model.spec.shape[1]
    found_factors = _factors(opened, factors)
    for start, count in sampled_ranges(name, model.spec.elements, full, FP8_BLOCK * columns):
        codes = opened.read(model.file, model.offset + start, np.uint8, count).reshape(-1, columns)
        values = number_formats.to_float32(source.read(opened, start, count), source.dtype).reshape(-1, columns)
        expected = fp8_blocks.quantize(values)
        top = start // columns // FP8_BLOCK
        held = found_factors[top : top + len(expected.factors)]
        result.compared += count
        result.unequal += int(np.count_nonzero(codes != expected.codes))
        result.unequal += int(np.count_nonzero(held.view(np.uint32) != expected.factors.view(np.uint32)))
        for band in range(len(held)):
            lines = slice(band * FP8_BLOCK, (band + 1) * FP8_BLOCK)
            error = np.abs(fp8_blocks.dequantize(codes[lines], held[band : band + 1]) - values[lines]).max(axis=0)
            judged = np.isfinite(values[lines]).all(axis=0)  # what is not finite is counted as such
            largest = np.maximum.reduceat(np.where(judged, error, 0), np.arange(0, columns, FP8_BLOCK))
            relative = largest / (number_formats.E4M3_LARGEST * held[band])
            result.fp8_error = larger(result.fp8_error, float(relative.max(initial=0.0)))


def look_for_steps(opened: OpenFiles, name: str, master: Source, base: Source, result: Measured) -> None:
    """Find out whether any FP32 master weight differs from the base's value that training started from.

    Samples first: in a tensor that was trained they differ; only one that was not is read to its end.
    """
    elements = math.prod(master.shape)
    for full in (False, True):
        for start, count in sampled_ranges(name, elements, full, base.row):
            found, old = master.read(opened, start, count).view(np.float32), _old_values(opened, base, start, count)
            if not (np.array_equal(found, old) or np.array_equal(found, _in_bf16(old))):
                result.stepped = True
                return
            result.smallest = min(result.smallest, float(np.abs(old).min(initial=np.inf)))
    result.stepped = False


def can_be_judged(master: Source) -> bool:
    """Whether a tensor comes from FP32 weights that an optimizer holds: rounding cannot have undone a step."""
    return isinstance(master.parameter, Partitioned) and master.parameter.trained and master.dtype == "F32"


def measure_file(
    opened: OpenFiles,
    path: Path,
    tensors: Mapping[str, StoredTensor],
    everything: Mapping[str, StoredTensor],
    base: BaseModel,
    sources: Mapping[str, Source],
    decay: float,
    full: bool,
) -> tuple[str, dict[str, Measured]]:
    """sha256 of a weight file and the figures of its tensors.

    Args:
        opened: shared by all threads, so that together they keep within what this process may open.
        tensors: those in the file, in the order of their offsets.
        everything: those of all files; block factors may lie elsewhere.
        sources: where tensors were converted or copied from, as far as they are to be compared with it.
    """
    hasher = hashlib.sha256()
    figures = {}
    correction_bias = families.of(base.config).CORRECTION_BIAS
    header = min((t.offset for t in tensors.values()), default=path.stat().st_size)
    hasher.update(opened.read(path, 0, np.uint8, header))
    for name, tensor in tensors.items():
        factors = everything.get(name + SCALE_SUFFIX) if tensor.spec.dtype == "F8_E4M3" else None
        if factors and factors.spec != fp8_blocks.factors_spec(tensor.spec):
            factors = None  # the shape check reports it
        known = name in base.tensors and not name.endswith(SCALE_SUFFIX)
        old = base.source(name) if known and base.tensors[name].spec.shape == tensor.spec.shape else None
        decays = 0.0 if name.endswith(correction_bias) else decay
        figures[name] = measure_tensor(opened, hasher, tensor, factors, old, decays)
        source = sources.get(name)
        if source is None or tuple(source.shape) != tensor.spec.shape:
            continue
        if old is not None and can_be_judged(source) and not name.endswith(correction_bias):
            look_for_steps(opened, name, source, old, figures[name])
        if factors and source.dtype != "F8_E4M3":
            compare_quantized(opened, name, tensor, factors, source, full, figures[name])
        elif tensor.spec.dtype in ("F32", "BF16", source.dtype):
            compare_with_source(opened, name, tensor, source, full, figures[name])
    return hasher.hexdigest(), figures
