"""The ZeRO-3 checkpoint of DeepSpeed as it lies on disk: which bytes of which file are which parameter.

Layout (deepspeed/runtime/zero/stage3.py; see docs/checkpoints.md): rank r of W writes
``[bf16_]zero_pp_rank_r_mp_rank_00_optim_states.pt`` with one flat FP32 tensor per sub-group. In the order of
``param_shapes[g]`` a parameter of n elements takes ceil(n / W) elements of the flat tensor of sub-group g in every
rank: element i lies in rank i // ceil(n / W). What is left at the end is padding.
"""

import hashlib
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import BadInputError
from . import torch_pickle
from .byte_ranges import OpenFiles
from .marker import Marker, read_marker
from .safetensors_files import ITEM_SIZES, StoredTensor

RANK_FILE = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_(optim|model)_states\.pt")


@dataclass(frozen=True, eq=False)
class Partitioned:
    """A parameter spread over the files of all ranks.

    Attributes:
        shape: as in training.
        dtype: ``F32`` for master weights, that of the weights for frozen parameters.
        partition: elements in each rank's file, the last ones padded.
        files: rank → file.
        starts: rank → byte offset of the flat tensor that holds it, int64 [world_size].
        skip: bytes from there to this parameter, the same in every rank.
    """

    shape: tuple[int, ...]
    dtype: str
    partition: int
    files: list[Path]
    starts: NDArray[np.int64]
    skip: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    def pieces(self, start: int, count: int) -> Iterator[tuple[Path, int, int]]:
        """(file, byte offset, elements) of the ranges that make up elements ``start`` to ``start + count``."""
        item = ITEM_SIZES[self.dtype]
        while count:
            rank, inside = divmod(start, self.partition)
            length = min(count, self.partition - inside)
            yield self.files[rank], int(self.starts[rank]) + self.skip + inside * item, length
            start, count = start + length, count - length

    def read_into(self, files: OpenFiles, start: int, target: NDArray) -> None:
        """Fill ``target``, an array of this parameter's width, from element ``start`` on."""
        position = 0
        for file, offset, length in self.pieces(start, len(target)):
            files.read_into(file, offset, target[position : position + length])
            position += length


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint folder holds.

    Attributes:
        parameters: training name → where its master weights lie, in the order of the flat tensors.
        buffers: training name → where it lies (rank 0's file; buffers are the same in all ranks).
        step: optimiser steps made.
        fingerprint: over names, sizes and CRC-32 of all records of all files.
        marker: what training wrote when the checkpoint was complete, or None.
    """

    folder: Path
    world_size: int
    step: int
    parameters: dict[str, Partitioned]
    buffers: dict[str, StoredTensor]
    fingerprint: str
    marker: Marker | None

    @property
    def file_count(self) -> int:
        return 2 * self.world_size


def rank_files(folder: Path) -> tuple[dict[int, Path], dict[int, Path]]:
    """The optimiser and model state files of a checkpoint folder by rank.

    Raises:
        BadInputError: no such folder, no such files, files of other kinds of parallelism, or two of one rank.
    """
    if not folder.is_dir():
        raise BadInputError(f"checkpoint folder {folder} does not exist")
    found: dict[str, dict[int, Path]] = {"optim": {}, "model": {}}
    for path in sorted(folder.iterdir()):
        if not (match := RANK_FILE.fullmatch(path.name)):
            continue
        rank, model_parallel_rank, kind = int(match[1]), int(match[2]), match[3]
        if model_parallel_rank:
            raise BadInputError(f"{path}: checkpoints with model parallelism are not supported")
        if rank in found[kind]:
            raise BadInputError(f"{path} and {found[kind][rank].name} are both of rank {rank}", "remove the stale one")
        found[kind][rank] = path
    if not found["optim"]:
        inside = [p.name for p in sorted(folder.iterdir()) if p.is_dir() and any(p.glob("*zero_pp_rank_*"))]
        hint = f"give one of its folders: {', '.join(inside)}" if inside else "give the folder that holds *_states.pt"
        raise BadInputError(f"{folder} holds no ZeRO-3 checkpoint (zero_pp_rank_*_optim_states.pt)", hint)
    return found["optim"], found["model"]


def _check_ranks(folder: Path, world_size: int, optimizer: dict[int, Path], model: dict[int, Path]) -> None:
    for kind, files in (("optim_states", optimizer), ("model_states", model)):
        missing = [rank for rank in range(world_size) if rank not in files]
        extra = [files[rank].name for rank in files if rank >= world_size]
        if missing:
            shown = ", ".join(map(str, missing[:8])) + (", …" if len(missing) > 8 else "")
            raise BadInputError(
                f"{folder} is incomplete: of {world_size} ranks the {kind} file of {len(missing)} is missing: "
                f"zero_pp_rank_[{shown}]_mp_rank_00_{kind}.pt",
                "restore the missing files, or use an older checkpoint",
            )
        if extra:
            raise BadInputError(f"{folder} holds files of more than {world_size} ranks: {extra[0]}", "remove them")


def _optimizer_state(path: Path, content: Any) -> dict[str, Any]:
    state = content.get("optimizer_state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict) or "zero_stage" not in state:
        raise BadInputError(f"{path} holds no ZeRO optimizer state")
    stage = state["zero_stage"]
    stage = stage.args[0] if isinstance(stage, torch_pickle.Inert) and stage.args else stage
    if stage != 3:
        raise BadInputError(f"{path} was written by ZeRO stage {stage}; only stage 3 is supported")
    groups = state.get("fp32_flat_groups")
    if not isinstance(groups, list) or not all(isinstance(g, StoredTensor) and g.spec.dtype == "F32" for g in groups):
        raise BadInputError(f"{path} holds no FP32 master weights (fp32_flat_groups)")
    return state


def _partition(elements: int, world_size: int) -> int:
    return -(-elements // world_size)


def _check_groups(path: Path, groups: list[StoredTensor], expected: list[int]) -> None:
    found = [group.spec.elements for group in groups]
    if found != expected:
        raise BadInputError(
            f"{path}: its flat tensors have {found} elements, the parameters' shapes ask for {expected}",
            "this file belongs to another run or model",
        )


def _steps_of(state: Any, files: OpenFiles) -> set[int]:
    """Optimiser steps recorded in a rank's state: a number or a one-element tensor per sub-group."""
    steps = set()
    inner = state.get("optimizer_state_dict")
    for group in (inner.get("state", {}) if isinstance(inner, dict) else {}).values():
        step = group.get("step") if isinstance(group, dict) else None
        if isinstance(step, StoredTensor) and step.spec.dtype == "F32" and step.spec.elements == 1:
            step = files.read(step.file, step.offset, np.float32, 1)[0]
        if isinstance(step, (int, float, np.floating)):
            steps.add(int(step))
    return steps


Shapes = list[dict[str, tuple[int, ...]]]  # one mapping of name to shape per sub-group


def _shapes(path: Path, state: dict[str, Any]) -> Shapes:
    shapes = state.get("param_shapes")
    if not isinstance(shapes, list) or not all(isinstance(group, dict) for group in shapes):
        raise BadInputError(f"{path} holds no param_shapes")
    return [dict(group) for group in shapes]


@dataclass
class _ModelStates:
    """What the model state files of all ranks say; filled rank by rank, as each takes a megabyte or more.

    Attributes:
        shapes, frozen_shapes, shared, buffers: of rank 0; the shapes are the same in all ranks.
        frozen: name → each rank's part.
        steps: optimiser steps by DeepSpeed's count.
    """

    shapes: Shapes
    frozen_shapes: dict[str, tuple[int, ...]]
    shared: list[tuple[str, str]]
    buffers: dict[str, StoredTensor]
    frozen: dict[str, list[StoredTensor]]
    steps: set[int]


def _read_model_states(paths: list[Path], load: Callable[[Path], Any]) -> _ModelStates:
    result = None
    for path in paths:
        state = load(path)
        if not isinstance(state, dict):
            raise BadInputError(f"{path} holds no model state")
        shapes, frozen_shapes = _shapes(path, state), dict(state.get("frozen_param_shapes") or {})
        if result is None:
            tensors, names = state.get("module") or {}, state.get("buffer_names") or ()
            buffers = {name: tensors[name] for name in names if isinstance(tensors.get(name), StoredTensor)}
            shared = [tuple(pair) for pair in state.get("shared_params") or ()]
            result = _ModelStates(shapes, frozen_shapes, shared, buffers, {n: [] for n in frozen_shapes}, set())
        if (shapes, frozen_shapes) != (result.shapes, result.frozen_shapes):
            raise BadInputError(f"{path} describes other parameters than {paths[0].name}")
        if state.get("dp_world_size") not in (None, len(paths)):
            raise BadInputError(f"{path} is of a run with {state['dp_world_size']} ranks, not {len(paths)}")
        if isinstance(state.get("global_steps"), int):
            result.steps.add(state["global_steps"])
            if len(result.steps) > 1:
                raise BadInputError(f"{path} is of another step than {paths[0].name}: {sorted(result.steps)}")
        for name, shape in frozen_shapes.items():
            part = (state.get("frozen_param_fragments") or {}).get(name)
            if not isinstance(part, StoredTensor) or part.spec.elements < _partition(math.prod(shape), len(paths)):
                raise BadInputError(f"{path} lacks its part of the frozen parameter {name}")
            result.frozen[name].append(part)
    assert result is not None, "a checkpoint has at least one rank"
    return result


def _frozen(states: _ModelStates, paths: list[Path]) -> dict[str, Partitioned]:
    """Parameters that were not trained: each rank's model state file holds its partition of each."""
    frozen = {}
    for name, parts in states.frozen.items():
        shape = states.frozen_shapes[name]
        starts = np.array([part.offset for part in parts], np.int64)
        partition = _partition(math.prod(shape), len(paths))
        frozen[name] = Partitioned(shape, parts[0].spec.dtype, partition, paths, starts, 0)
    return frozen


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read the directory of every rank file, check that together they are one complete checkpoint.

    Memory: descriptors only, about 1 KiB per parameter plus 100 bytes per rank and sub-group.

    Raises:
        BadInputError: naming the missing, cut, refused or contradicting file.
    """
    optimizer, model = rank_files(folder)
    marker = read_marker(folder)
    hasher = hashlib.sha256()

    def load(path: Path) -> Any:
        archive = torch_pickle.open_archive(path)
        hasher.update(f"{path.name}\0{archive.directory}\n".encode())
        return torch_pickle.load(archive)

    first = min(optimizer)
    world_size = _optimizer_state(optimizer[first], torch_pickle.load(torch_pickle.open_archive(optimizer[first])))[
        "partition_count"
    ]
    if not isinstance(world_size, int) or world_size < 1:
        raise BadInputError(f"{optimizer[first]}: partition_count {world_size!r} is no number of ranks")
    _check_ranks(folder, world_size, optimizer, model)
    if marker:
        marker.check(folder, world_size)

    model_paths, paths = [model[rank] for rank in range(world_size)], [optimizer[rank] for rank in range(world_size)]
    states = _read_model_states(model_paths, load)
    shapes = states.shapes
    expected = [sum(_partition(math.prod(s), world_size) for s in group.values()) for group in shapes]
    starts = np.empty((len(shapes), world_size), np.int64)
    steps: list[set[int]] = []
    with OpenFiles() as files:
        for rank, path in enumerate(paths):
            state = _optimizer_state(path, load(path))
            if state["partition_count"] != world_size:
                raise BadInputError(f"{path} is of a run with {state['partition_count']} ranks, not {world_size}")
            _check_groups(path, state["fp32_flat_groups"], expected)
            starts[:, rank] = [group.offset for group in state["fp32_flat_groups"]]
            steps.append(_steps_of(state, files))
            if steps[rank] != steps[0]:
                raise BadInputError(f"{path} is of step {steps[rank]}, rank 0 of step {steps[0]}")

    parameters = {}
    for index, group in enumerate(shapes):
        skip = 0
        for name, shape in group.items():
            partition = _partition(math.prod(shape), world_size)
            parameters[name] = Partitioned(shape, "F32", partition, paths, starts[index], 4 * skip)
            skip += partition
    parameters |= _frozen(states, model_paths)
    parameters |= {alias: parameters[name] for alias, name in states.shared if name in parameters}
    step = marker.step if marker else max(states.steps or steps[0] or {0})
    return Checkpoint(folder, world_size, step, parameters, states.buffers, f"zip:{hasher.hexdigest()}", marker)
