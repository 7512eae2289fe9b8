"""Where the bytes of an output tensor come from, and how they are read."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..tensors import fp8_blocks, int4_groups
from ..tensors.byte_ranges import OpenFiles
from ..tensors.number_formats import WIDTHS
from ..tensors.partitioned_parameter import Partitioned
from ..tensors.safetensors_files import ITEM_SIZES, StoredTensor
from ..tensors.tensor_spec import FP8_BLOCK, INT4


@dataclass(frozen=True, eq=False)
class Source:
    """A range of a parameter of the checkpoint, or a tensor of a model folder.

    Attributes:
        start: first element in the flattened parameter.
        factors: where the block factors of an FP8 tensor lie, or the scales of an INT4 one; its values are then read
            dequantised.
    """

    parameter: Partitioned | StoredTensor
    start: int
    shape: tuple[int, ...]
    factors: StoredTensor | None = None

    @property
    def dtype(self) -> str:
        """Of what is read."""
        if self.factors:
            return "F32"
        return self.parameter.dtype if isinstance(self.parameter, Partitioned) else self.parameter.spec.dtype

    @property
    def row(self) -> int:
        """Elements that can only be read together."""
        return self.shape[-1] if self.factors else 1

    @property
    def stored_bytes(self) -> int:
        """Bytes that reading all of it takes."""
        if self.factors and isinstance(self.parameter, StoredTensor):
            return self.parameter.bytes + self.factors.bytes
        item = ITEM_SIZES[self.dtype]
        return int(np.prod(self.shape, dtype=np.int64)) * item

    def read(self, opened: OpenFiles, start: int, count: int) -> NDArray:
        """Elements ``start`` to ``start + count``, as bits of ``dtype``: one dimension.

        Raises:
            BadInputError: a file ends early or cannot be read.
        """
        if self.factors and isinstance(self.parameter, StoredTensor) and self.parameter.spec.dtype == INT4:
            return self._unpacked(opened, start, count)
        if self.factors:
            return self._dequantized(opened, start, count)
        target = np.empty(count, WIDTHS[self.dtype])
        if isinstance(self.parameter, Partitioned):
            self.parameter.read_into(opened, self.start + start, target)
        else:
            offset = self.parameter.offset + (self.start + start) * ITEM_SIZES[self.dtype]
            opened.read_into(self.parameter.file, offset, target)
        return target

    def _unpacked(self, opened: OpenFiles, start: int, count: int) -> NDArray[np.float32]:
        """As ``_dequantized``, of INT4."""
        assert isinstance(self.parameter, StoredTensor) and self.factors
        columns = self.shape[-1]
        words, groups = columns // int4_groups.WORD, columns // int4_groups.GROUP
        first, rows = start // columns, count // columns
        codes = opened.read(self.parameter.file, self.parameter.offset + first * words * 4, np.uint32, rows * words)
        scales = opened.read(self.factors.file, self.factors.offset + first * groups * 2, np.uint16, rows * groups)
        return int4_groups.dequantize(codes.reshape(rows, words), scales.reshape(rows, groups)).reshape(-1)

    def _dequantized(self, opened: OpenFiles, start: int, count: int) -> NDArray[np.float32]:
        """``start`` and ``count`` are multiples of the row length."""
        assert isinstance(self.parameter, StoredTensor) and self.factors
        columns = self.shape[-1]
        first, last = start // columns, (start + count) // columns
        top, bottom = first // FP8_BLOCK, -(-last // FP8_BLOCK)
        codes = opened.read(self.parameter.file, self.parameter.offset + start, np.uint8, count)
        width = self.factors.spec.shape[1]
        offset = self.factors.offset + top * width * 4
        factors = opened.read(self.factors.file, offset, np.float32, (bottom - top) * width).reshape(-1, width)
        values = fp8_blocks.dequantize(codes.reshape(-1, columns), factors, first % FP8_BLOCK)
        return values.reshape(-1)
