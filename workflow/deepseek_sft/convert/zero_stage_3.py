"""Stage 3: every parameter is split over all ranks.

In the order of ``param_shapes[g]`` a parameter of n elements takes ceil(n / W) elements of the flat tensor of sub-group
g in every rank: element i lies in rank i // ceil(n / W). What is left at the end is padding
(deepspeed/runtime/zero/stage3.py).
"""

import math
from pathlib import Path

import numpy as np

from ..errors import BadInputError
from ..tensors.partitioned_parameter import Partitioned
from ..tensors.safetensors_files import ITEM_SIZES, StoredTensor
from .zero_files import ModelState, Shapes


def _partition(shape: tuple[int, ...], world_size: int) -> int:
    return -(-math.prod(shape) // world_size)


def check_groups(path: Path, groups: list[StoredTensor], shapes: Shapes, world_size: int) -> None:
    """
    Raises:
        BadInputError: a rank's flat tensors are not as long as the parameters' shapes ask for.
    """
    found = [group.spec.elements for group in groups]
    expected = [sum(_partition(shape, world_size) for shape in group.values()) for group in shapes]
    if found != expected:
        raise BadInputError(
            f"{path}: its flat tensors have {found} elements, the parameters' shapes ask for {expected}",
            "this file belongs to another run or model, or keeps its weights elsewhere (NVMe offload)",
        )


def trained(ranks: list[tuple[Path, list[StoredTensor]]], shapes: Shapes) -> dict[str, Partitioned]:
    """The trained parameters by name.

    Args:
        ranks: each rank's file and its flat tensors.
        shapes: names and shapes of the parameters in each flat tensor.
    """
    parameters = {}
    paths = [path for path, _ in ranks]
    for index, group in enumerate(shapes):
        starts = np.array([groups[index].offset for _, groups in ranks], np.int64)
        dtype = ranks[0][1][index].spec.dtype
        skip = 0
        for name, shape in group.items():
            partition = _partition(shape, len(ranks))
            parameters[name] = Partitioned(shape, dtype, partition, paths, starts, skip=skip * ITEM_SIZES[dtype])
            skip += partition
    return parameters


def frozen(states: list[ModelState], paths: list[Path]) -> dict[str, Partitioned]:
    """Parameters that were not trained: each rank's model state file holds its partition of each.

    Raises:
        BadInputError: naming the file that lacks its part.
    """
    parameters = {}
    for name, shape in states[0].frozen_shapes.items():
        partition = _partition(shape, len(paths))
        for path, state in zip(paths, states, strict=True):
            part = state.frozen.get(name)
            if part is None or part.spec.elements < partition or part.spec.dtype != states[0].frozen[name].spec.dtype:
                raise BadInputError(f"{path} lacks its part of the frozen parameter {name}")
        starts = np.array([state.frozen[name].offset for state in states], np.int64)
        dtype = states[0].frozen[name].spec.dtype
        parameters[name] = Partitioned(shape, dtype, max(1, partition), paths, starts, trained=False)
    return parameters
