"""A parameter whose elements lie in the files of several ranks."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .byte_ranges import OpenFiles
from .safetensors_files import ITEM_SIZES, StoredTensor


@dataclass(frozen=True, eq=False)
class Partitioned:
    """A parameter spread over the files of all ranks; see docs/checkpoints.md for both layouts.

    Element i lies in rank ``(first + i) // partition``, there at ``(first + i) % partition``.

    Attributes:
        shape: as in training.
        dtype: that of the master weights (``F32``), or of the weights for frozen parameters.
        partition: elements in each rank's file; at stage 3 of this parameter, at stages 1 and 2 of the flat tensor.
        files: rank → file.
        starts: rank → byte offset of the flat tensor that holds it, int64 [world_size].
        skip: bytes from there to this parameter, the same in every rank (stage 3).
        first: elements before this parameter in the flat tensor of all ranks together (stages 1 and 2).
        trained: whether an optimizer holds it.
    """

    shape: tuple[int, ...]
    dtype: str
    partition: int
    files: list[Path]
    starts: NDArray[np.int64]
    skip: int = 0
    first: int = 0
    trained: bool = True

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    def pieces(self, start: int, count: int) -> Iterator[tuple[Path, int, int]]:
        """(file, byte offset, elements) of the ranges that make up elements ``start`` to ``start + count``."""
        item = ITEM_SIZES[self.dtype]
        position = self.first + start
        while count:
            rank, inside = divmod(position, self.partition)
            length = min(count, self.partition - inside)
            yield self.files[rank], int(self.starts[rank]) + self.skip + inside * item, length
            position, count = position + length, count - length

    def read_into(self, files: OpenFiles, start: int, target: NDArray) -> None:
        """Fill ``target``, an array of this parameter's width, from element ``start`` on."""
        position = 0
        for file, offset, length in self.pieces(start, len(target)):
            files.read_into(file, offset, target[position : position + length])
            position += length


def in_one_file(tensor: StoredTensor) -> Partitioned:
    """A parameter that is not trained and lies whole in one file."""
    partition = max(1, tensor.spec.elements)
    return Partitioned(
        tensor.spec.shape, tensor.spec.dtype, partition, [tensor.file], np.array([tensor.offset]), trained=False
    )
