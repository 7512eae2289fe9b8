"""Stage 3: every parameter is split over all ranks, or with expert parallelism over those that hold the same experts.

In the order of ``param_shapes[g]`` a parameter of n elements takes ceil(n / P) elements of the flat tensor of sub-group
g in each of the P ranks that share it: element i lies in the one at place i // ceil(n / P) of them. What is left at the
end is padding (deepspeed/runtime/zero/stage3.py). Ranks that hold other experts name other parameters in the same
sub-group.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import BadInputError
from ..tensors.partitioned_parameter import Partitioned
from ..tensors.safetensors_files import ITEM_SIZES, StoredTensor
from .zero_files import ModelState, Shapes


def _partition(shape: tuple[int, ...], world_size: int) -> int:
    return -(-math.prod(shape) // world_size)


@dataclass(frozen=True)
class RankPart:
    """What one rank has of the trained parameters.

    Attributes:
        path: its optimizer file.
        groups: its flat tensors.
        sharing: of each, the ranks that its parameters are split over.
        shapes: of each, names and shapes of these parameters.
    """

    path: Path
    groups: list[StoredTensor]
    sharing: list[list[int]]
    shapes: Shapes


def check_groups(path: Path, groups: list[StoredTensor], shapes: Shapes, sharing: list[list[int]]) -> None:
    """
    Args:
        sharing: of each flat tensor, the ranks that its parameters are split over.

    Raises:
        BadInputError: a rank's flat tensors are not as long as the parameters' shapes ask for.
    """
    found = [group.spec.elements for group in groups]
    expected = [
        sum(_partition(shape, len(ranks)) for shape in group.values())
        for group, ranks in zip(shapes, sharing, strict=False)
    ]
    if len(shapes) != len(found) or found != expected:
        raise BadInputError(
            f"{path}: its flat tensors have {found} elements, the parameters' shapes ask for {expected}",
            "this file belongs to another run or model, or keeps its weights elsewhere (NVMe offload)",
        )


def trained(parts: list[RankPart]) -> dict[str, Partitioned]:
    """The trained parameters by name.

    Args:
        parts: of all ranks, by rank.

    Raises:
        BadInputError: ranks contradict each other on what they share, or two sets of ranks hold the same parameter.
    """
    parameters: dict[str, Partitioned] = {}
    for index in range(len(parts[0].groups)):
        for rank, part in enumerate(parts):
            ranks = part.sharing[index]
            first = parts[ranks[0]]
            if rank not in ranks or first.sharing[index] != ranks or first.shapes[index] != part.shapes[index]:
                raise BadInputError(
                    f"{part.path} and {first.path.name} contradict each other on the parameters that they share "
                    f"(sub-group {index} of ranks {', '.join(map(str, ranks[:8]))}{', …' if len(ranks) > 8 else ''})",
                    "the folder holds files of two checkpoints: restore those of one",
                )
            if rank != ranks[0]:
                continue
            found = _of_sub_group(index, [parts[other] for other in ranks])
            if twice := sorted(found.keys() & parameters.keys()):
                raise BadInputError(f"{part.path} holds {twice[0]}, which other ranks hold, too")
            parameters |= found
    return parameters


def _of_sub_group(index: int, sharing: list[RankPart]) -> dict[str, Partitioned]:
    """Parameters of one sub-group, of the ranks that share it."""
    parameters = {}
    paths = [part.path for part in sharing]
    starts = np.array([part.groups[index].offset for part in sharing], np.int64)
    dtype = sharing[0].groups[index].spec.dtype
    skip = 0
    for name, shape in sharing[0].shapes[index].items():
        partition = _partition(shape, len(sharing))
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
