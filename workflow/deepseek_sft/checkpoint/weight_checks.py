"""What is measured of every weight of a converted model, in one pass over its files."""

import hashlib
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import BadInputError
from . import number_formats
from .base_model import BaseModel
from .byte_ranges import OpenFiles
from .convert import read_source
from .number_formats import BLOCK, WIDTHS
from .release_names import Source
from .safetensors_files import ITEM_SIZES, StoredTensor

SAMPLE_BLOCK, SAMPLE_BLOCKS = 1 << 16, 4  # elements compared with the checkpoint per block, blocks per tensor
FLOATS = ("F32", "BF16")
BF16_HALF_ULP = 2.0**-8  # relative: BF16 keeps 8 significant bits


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
    """

    drift: float
    decay: float

    @staticmethod
    def of(
        learning_rate: float, steps: int, weight_decay: float = 0.1, betas: tuple[float, float] = (0.9, 0.999)
    ) -> "ChangeBound":
        decay = learning_rate * steps * weight_decay
        return ChangeBound(learning_rate * steps * adamw_ratio(*betas) * (1 + decay), decay)


@dataclass
class Measured:
    """Figures of one tensor against the base model's.

    Attributes:
        non_finite: infinities and NaNs.
        squared_change, squared_base: sums over elements.
        largest_excess: largest |change| beyond rounding and decay; to compare with ``ChangeBound.drift``.
        differing: elements that differ from the base's.
        compared: elements compared with the checkpoint, and ``unequal`` how many of them differ.
    """

    non_finite: int = 0
    squared_change: float = 0.0
    squared_base: float = 0.0
    largest_excess: float = 0.0
    differing: int = 0
    compared: int = 0
    unequal: int = 0

    @property
    def relative_change(self) -> float:
        """‖change‖ / ‖base‖; infinite where the base is zero and the model is not."""
        if self.squared_change == 0:
            return 0.0
        return math.sqrt(self.squared_change / self.squared_base) if self.squared_base else math.inf


def _as_float32(values: NDArray, dtype: str) -> NDArray[np.float32]:
    return values.view(np.float32) if dtype == "F32" else number_formats.bf16_to_float32(values)


def measure_block(result: Measured, new: NDArray, old: NDArray, dtype: str, decay: float) -> None:
    """Add one block.

    Args:
        new, old: float32 [n], the model's and the base's values.
        dtype: that ``new`` was stored in.
    """
    finite = np.isfinite(new)
    if not finite.all():
        result.non_finite += int(len(new) - np.count_nonzero(finite))
        new = np.where(finite, new, old)
    change = np.abs(new - old)
    result.differing += int(np.count_nonzero(change))
    result.squared_change += float(np.dot(change, change))
    result.squared_base += float(np.dot(old, old))
    change -= (BF16_HALF_ULP if dtype == "BF16" else 2.0**-22) * np.abs(new)
    change -= decay * np.abs(old)
    result.largest_excess = max(result.largest_excess, float(change.max(initial=0.0)))


def measure_tensor(
    opened: OpenFiles, hasher: "hashlib._Hash", model: StoredTensor, base: StoredTensor | None, decay: float
) -> Measured:
    """Read one tensor of the model and of the base once; the bytes of the model also enter ``hasher``."""
    result = Measured()
    dtype = model.spec.dtype
    for start in range(0, model.spec.elements, BLOCK):
        count = min(BLOCK, model.spec.elements - start)
        item = ITEM_SIZES[dtype]
        raw = opened.read(model.file, model.offset + start * item, np.uint8, count * item)
        hasher.update(raw)
        if dtype not in FLOATS:  # the dtype check reports it
            continue
        bits = raw.view(WIDTHS[dtype])
        new = _as_float32(bits, dtype)
        if base is None:
            result.non_finite += int(np.count_nonzero(~np.isfinite(new)))
            continue
        offset = base.offset + start * ITEM_SIZES[base.spec.dtype]
        old = _as_float32(opened.read(base.file, offset, WIDTHS[base.spec.dtype], count), base.spec.dtype)
        measure_block(result, new, old, dtype, decay)
    return result


def sampled_ranges(name: str, elements: int, full: bool) -> Iterator[tuple[int, int]]:
    """(start, count) of the elements to compare: all, or the first, the last and two blocks chosen by the name."""
    if full or elements <= SAMPLE_BLOCK * SAMPLE_BLOCKS:
        for start in range(0, elements, BLOCK):
            yield start, min(BLOCK, elements - start)
        return
    last = elements - SAMPLE_BLOCK
    random = np.random.default_rng(zlib.crc32(name.encode()))
    for start in sorted({0, last, *random.integers(0, last, SAMPLE_BLOCKS - 2).tolist()}):
        yield int(start), SAMPLE_BLOCK


def compare_with_source(
    opened: OpenFiles, name: str, model: StoredTensor, source: Source, full: bool, result: Measured
) -> None:
    """Compare bit for bit with the checkpoint's master weights, rounded as the conversion must round them."""
    dtype = model.spec.dtype
    for start, count in sampled_ranges(name, model.spec.elements, full):
        found = opened.read(model.file, model.offset + start * ITEM_SIZES[dtype], WIDTHS[dtype], count)
        expected, _ = number_formats.convert(read_source(opened, source, start, count), source.dtype, dtype)
        result.compared += count
        result.unequal += int(np.count_nonzero(found != expected.view(found.dtype)))


def measure_file(
    path: Path,
    tensors: dict[str, StoredTensor],
    base: BaseModel,
    sources: dict[str, Source] | None,
    decay: float,
    full: bool,
) -> tuple[str, dict[str, Measured]]:
    """sha256 of a weight file and the figures of its tensors, which must be in the order of their offsets."""
    hasher = hashlib.sha256()
    figures = {}
    with OpenFiles() as opened:
        header = min((t.offset for t in tensors.values()), default=path.stat().st_size)
        hasher.update(opened.read(path, 0, np.uint8, header))
        for name, tensor in tensors.items():
            old = base.tensors.get(name)
            comparable = old is not None and old.spec.shape == tensor.spec.shape
            figures[name] = measure_tensor(opened, hasher, tensor, old if comparable else None, decay)
            if sources and name in sources and comparable and tensor.spec.dtype in FLOATS:
                compare_with_source(opened, name, tensor, sources[name], full, figures[name])
    return hasher.hexdigest(), figures
