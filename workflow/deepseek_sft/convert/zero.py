"""A checkpoint of DeepSpeed's ZeRO as it lies on disk: which bytes of which file are which parameter.

The layouts are those of ``zero_stage_3`` and ``zero_stages_1_2``; docs/checkpoints.md specifies them.
"""

import dataclasses
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import cli
from ..errors import BadInputError
from ..tensors.partitioned_parameter import Partitioned
from ..tensors.safetensors_files import StoredTensor
from . import zero_stage_3, zero_stages_1_2
from .marker import Marker, read_marker
from .zero_files import Loader, ModelState, RankFiles, read_model_state, read_optimizer


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint folder holds.

    Attributes:
        stage: of ZeRO, 1 to 3.
        step: optimizer steps made.
        parameters: training name → where its weights lie, in the order of the flat tensors.
        shared: training name → the name in ``parameters`` of the same parameter (tied weights).
        buffers: training name → where it lies (rank 0's file; buffers are the same in all ranks).
        fingerprint: over names, sizes and CRC-32 of all records of all files; over samples of records without CRC.
        frozen_unsaved: whether parameters that were not trained may have been left out.
        marker: what training wrote when the checkpoint was complete, or None.
    """

    folder: Path
    stage: int
    world_size: int
    step: int
    parameters: dict[str, Partitioned]
    shared: dict[str, str]
    buffers: dict[str, StoredTensor]
    fingerprint: str
    marker: Marker | None
    frozen_unsaved: bool = False

    @property
    def file_count(self) -> int:
        return self.world_size + (self.world_size if self.stage == 3 else 1)


def _read_model_states(paths: list[Path], world_size: int, load: Loader) -> list[ModelState]:
    """The model states of all files, of which only the first keeps tensors, and shapes only what differs.

    Most ranks write the same pickle, byte for byte; it is read once. With expert parallelism ranks that hold other
    experts name other parameters, in as many sub-groups.

    Raises:
        BadInputError: naming the file that contradicts the first.
    """
    states: list[ModelState] = []
    read: dict[Any, ModelState] = {}
    for path in paths:
        archive = load.open(path)
        same = hashlib.sha256(archive.pickle).digest(), tuple(size for _, size, _ in archive.directory)
        if same in read:
            states.append(read[same])
            continue
        state = read_model_state(archive)
        first = states[0] if states else state
        if not _alike(state, first):
            raise BadInputError(f"{path} describes other parameters than {paths[0].name}")
        if state.world_size not in (None, world_size):
            raise BadInputError(f"{path} is of a run with {state.world_size} ranks, not {world_size}")
        if state.step != first.step:
            raise BadInputError(f"{path} is of step {state.step}, {paths[0].name} of step {first.step}")
        shapes = first.shapes if state.shapes == first.shapes else state.shapes
        bare = dataclasses.replace(state, shapes=shapes, frozen_shapes={}, tensors={}, buffers={})
        states.append(bare if states else state)
        if not first.frozen_shapes:  # every rank's file has its own part of those
            read[same] = bare
    return states


def _alike(state: ModelState, first: ModelState) -> bool:
    """Whether two ranks' files can be of one checkpoint: the same parameters, or others in sub-groups of their own."""
    if state.frozen_shapes != first.frozen_shapes or len(state.shapes) != len(first.shapes):
        return False
    return all(
        here == there or (not here.keys() & there.keys() and [*here.values()] == [*there.values()])
        for here, there in zip(state.shapes, first.shapes, strict=True)
    )


def _check_steps(path: Path, steps: set[int], state: ModelState) -> None:
    """An optimizer that is ahead of its model cannot be; behind it may be begun anew, which is only said."""
    if state.step is None or not steps:
        return
    counted = state.step - state.skipped
    if max(steps) > counted:
        raise BadInputError(
            f"{path} is of step {max(steps)}, the model state files are of step {counted}",
            "the folder holds files of two checkpoints: restore those of one",
        )
    if max(steps) < counted:
        cli.say(
            f"note: the optimizer made {max(steps)} steps, the model counts {counted}; was the optimizer begun anew?"
        )


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read the directory of every rank file, check that together they are one complete checkpoint.

    Memory: descriptors only, about 1 KiB per parameter plus 1 KiB per rank and sub-group.

    Raises:
        BadInputError: naming the missing, cut, refused or contradicting file.
    """
    found = RankFiles.find(folder)
    marker = read_marker(folder)
    load = Loader()
    start = min(found.optimizer)
    first = read_optimizer(found.optimizer[start], Loader())
    stage, world_size = first.stage, first.world_size
    found.check(stage, world_size, found.optimizer[start].name)
    if marker:
        marker.check(folder, world_size)
    model_paths = found.model_paths(stage, world_size)
    states = _read_model_states(model_paths, world_size, load)
    shapes = states[0].shapes
    ranks: list[tuple[Path, list[StoredTensor]]] = []
    parts: list[zero_stage_3.RankPart] = []
    for rank in range(world_size):
        path = found.optimizer[rank]
        state = read_optimizer(path, load)
        if (state.stage, state.world_size) != (stage, world_size):
            raise BadInputError(
                f"{path} is of stage {state.stage} with {state.world_size} ranks, not {stage} with {world_size}"
            )
        if stage == 3:
            own = states[rank].shapes
            zero_stage_3.check_groups(path, state.groups, own, state.sharing)
            parts.append(zero_stage_3.RankPart(path, state.groups, state.sharing, own))
        if state.steps != first.steps:
            raise BadInputError(f"{path} is of step {sorted(state.steps)}, rank {start} of step {sorted(first.steps)}")
        ranks.append((path, state.groups))
    _check_steps(ranks[0][0], first.steps, states[0])
    if stage == 3:
        parameters = zero_stage_3.trained(parts) | zero_stage_3.frozen(states, model_paths)
    else:
        parameters = zero_stages_1_2.trained(ranks, shapes) | zero_stages_1_2.frozen(states[0])
    step = marker.step if marker else states[0].step if states[0].step is not None else max(first.steps or {0})
    return Checkpoint(
        folder=folder,
        stage=stage,
        world_size=world_size,
        step=step,
        parameters=parameters,
        shared={alias: name for alias, name in states[0].shared.items() if name in parameters},
        buffers=states[0].buffers,
        fingerprint=f"zip:{load.hasher.hexdigest()}",
        marker=marker,
        frozen_unsaved=states[0].frozen_unsaved,
    )
