"""Stages 1 and 2: the parameters of a group lie one after another in a flat tensor that is cut over the ranks.

A group of n elements is padded to a multiple of 2 · W and cut into W equal parts (older DeepSpeed: of W). The files
hold the parts without the padding, DeepSpeed's BF16 optimizer with it (deepspeed/runtime/zero/stage_1_and_2.py,
bf16_optimizer.py). Weights that are not trained lie whole in the one model state file.
"""

import math
from pathlib import Path

import numpy as np

from ..errors import BadInputError
from ..tensors.partitioned_parameter import Partitioned, in_one_file
from ..tensors.safetensors_files import StoredTensor
from .zero_files import ModelState, Shapes


def _partition(elements: int, found: list[int], world_size: int) -> int | None:
    """Elements per rank of a group, or None where the ranks' parts have other lengths than any version writes."""
    for alignment in (2, 1):
        partition = alignment * -(-elements // (alignment * world_size))
        without = [min(partition, max(0, elements - rank * partition)) for rank in range(world_size)]
        if found in (without, [partition] * world_size):
            return partition
    return None


def trained(ranks: list[tuple[Path, list[StoredTensor]]], shapes: Shapes) -> dict[str, Partitioned]:
    """The trained parameters by name.

    Args:
        ranks: each rank's file and its flat tensors.
        shapes: names and shapes of the parameters in each flat tensor, in its order.

    Raises:
        BadInputError: a rank's flat tensors are not as long as the parameters' shapes ask for, naming its file.
    """
    paths = [path for path, _ in ranks]
    for path, groups in ranks:
        if len(groups) != len(shapes):
            raise BadInputError(f"{path} holds {len(groups)} flat tensors for {len(shapes)} groups of parameters")
    parameters = {}
    for index, group in enumerate(shapes):
        elements = sum(map(math.prod, group.values()))
        found = [groups[index].spec.elements for _, groups in ranks]
        partition = _partition(elements, found, len(ranks))
        if partition is None:
            raise BadInputError(
                f"{_odd_one(paths, found)}: the ranks' parts of group {index} have {found} elements, the parameters' "
                f"shapes ask for {elements} in all",
                "a file belongs to another run or model",
            )
        starts = np.array([groups[index].offset for _, groups in ranks], np.int64)
        dtype = ranks[0][1][index].spec.dtype
        first = 0
        for name, shape in group.items():
            parameters[name] = Partitioned(shape, dtype, max(1, partition), paths, starts, first=first)
            first += math.prod(shape)
    return parameters


def _odd_one(paths: list[Path], found: list[int]) -> Path:
    """The file whose part has another length than most, the first if none stands out."""
    usual = max(set(found), key=found.count)
    return next((path for path, length in zip(paths, found, strict=True) if length != usual), paths[0])


def frozen(state: ModelState) -> dict[str, Partitioned]:
    """Parameters that were not trained: what the model state holds besides trained parameters and buffers."""
    known = {name for group in state.shapes for name in group} | state.buffers.keys() | state.shared.keys()
    return {name: in_one_file(tensor) for name, tensor in state.tensors.items() if name not in known}
