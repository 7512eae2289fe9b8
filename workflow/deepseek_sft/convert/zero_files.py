"""The files of a ZeRO checkpoint folder: which there must be, and what each says about itself."""

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import BadInputError, looked_for
from ..tensors import torch_pickle
from ..tensors.byte_ranges import OpenFiles
from ..tensors.safetensors_files import StoredTensor

RANK_FILE = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_(optim|model)_states\.pt")
WHOLE_MODEL_FILE = "mp_rank_00_model_states.pt"  # stages 1 and 2: one for all ranks
PARTITION_GROUPS = "ds_zero_partition_groups"
STAGES = {"optimizer_states": 1, "gradients": 2, "weights": 3}  # DeepSpeed's ZeroStageEnum
FLAT_GROUPS = {3: "fp32_flat_groups", 2: "single_partition_of_fp32_groups", 1: "single_partition_of_fp32_groups"}


@dataclass(frozen=True)
class RankFiles:
    """The state files of a folder: by rank, and the one of all ranks (stages 1 and 2)."""

    folder: Path
    optimizer: dict[int, Path]
    model: dict[int, Path]

    @staticmethod
    def find(folder: Path) -> "RankFiles":
        """
        Raises:
            BadInputError: no such folder, no such files, files of other kinds of parallelism, or two of one rank.
        """
        if not folder.is_dir():
            raise BadInputError(f"checkpoint folder {folder} does not exist", looked_for(folder))
        found: dict[str, dict[int, Path]] = {"optim": {}, "model": {}}
        for path in sorted(folder.iterdir()):
            if re.fullmatch(r"(layer_\d+_)?expert_\d+_mp_rank_\d+_(model|optim)_states\.pt", path.name):
                raise BadInputError(f"{path}: checkpoints of DeepSpeed's expert parallelism are not supported")
            if not (match := RANK_FILE.fullmatch(path.name)):
                continue
            rank, model_parallel_rank, kind = int(match[1]), int(match[2]), match[3]
            if model_parallel_rank:
                raise BadInputError(f"{path}: checkpoints with model parallelism are not supported")
            if rank in found[kind]:
                other = found[kind][rank].name
                raise BadInputError(f"{path} and {other} are both of rank {rank}", "remove the stale one")
            found[kind][rank] = path
        if not found["optim"]:
            raise _no_checkpoint(folder)
        return RankFiles(folder, found["optim"], found["model"])

    def check(self, stage: int, world_size: int, said_by: str) -> None:
        """
        Args:
            said_by: name of the file that gave stage and world size, which may itself be what is wrong.

        Raises:
            BadInputError: naming the missing or left-over files of ``world_size`` ranks.
        """
        kinds = [("optim_states", self.optimizer)]
        if stage == 3:
            kinds.append(("model_states", self.model))
        elif self.model:
            name = next(iter(self.model.values())).name
            raise BadInputError(f"{self.folder} holds {name}, but {said_by} says that it is of stage {stage}")
        elif not (self.folder / WHOLE_MODEL_FILE).is_file():
            raise BadInputError(
                f"{self.folder / WHOLE_MODEL_FILE} is missing, which stage {stage} has ({said_by})",
                "restore it, or use an older checkpoint",
            )
        for kind, files in kinds:
            missing = [rank for rank in range(world_size) if rank not in files]
            extra = [files[rank].name for rank in files if rank >= world_size]
            if missing:
                shown = ", ".join(map(str, missing[:8])) + (", …" if len(missing) > 8 else "")
                raise BadInputError(
                    f"{self.folder} is incomplete: of {world_size} ranks the {kind} file of {len(missing)} is missing: "
                    f"zero_pp_rank_[{shown}]_mp_rank_00_{kind}.pt ({said_by} gives the number of ranks)",
                    "restore the missing files, or use an older checkpoint",
                )
            if extra:
                raise BadInputError(
                    f"{self.folder} holds files of more than the {world_size} ranks of {said_by}: {extra[0]}",
                    "remove them",
                )

    def model_paths(self, stage: int, world_size: int) -> list[Path]:
        return [self.model[rank] for rank in range(world_size)] if stage == 3 else [self.folder / WHOLE_MODEL_FILE]


def _no_checkpoint(folder: Path) -> BadInputError:
    """What a folder without optimizer files is instead."""
    if (folder / "zero").is_dir() and any((folder / "zero").glob("*/fp32*")):
        return BadInputError(
            f"{folder} is a universal checkpoint (ds_to_universal: zero/<parameter>/fp32.pt), which is not read",
            "give the ZeRO checkpoint that it was made from (zero_pp_rank_*_optim_states.pt), or load it with "
            'DeepSpeed ("checkpoint": {"load_universal": true}) and save it again',
        )
    found = "holds no ZeRO checkpoint (zero_pp_rank_*_optim_states.pt)"
    if any(folder.glob("*_model_states.pt")):
        found = "holds model states, but no optimizer states (zero_pp_rank_*_optim_states.pt), where the weights are"
    inside = [p.name for p in sorted(folder.iterdir()) if p.is_dir() and any(p.glob("*zero_pp_rank_*"))]
    hint = f"give one of its folders: {', '.join(inside)}" if inside else "give the folder with *_optim_states.pt"
    return BadInputError(f"{folder} {found}", hint)


class Loader:
    """Unpickles files and hashes name, size and CRC-32 of all their records."""

    def __init__(self) -> None:
        self.hasher = hashlib.sha256()

    def open(self, path: Path) -> torch_pickle.Archive:
        """
        Raises:
            BadInputError: cut, corrupt, or written as the file of another rank.
        """
        archive = torch_pickle.open_archive(path)
        written, named = RANK_FILE.fullmatch(f"{archive.name}.pt"), RANK_FILE.fullmatch(path.name)
        if written and named and written.groups() != named.groups():
            raise BadInputError(
                f"{path} was written as {archive.name}.pt, so it is of another rank",
                "files were swapped or renamed: restore their names",
            )
        self.hasher.update(f"{path.name}\0{archive.directory}\n".encode())
        self.hasher.update(archive.sampled())
        return archive

    def __call__(self, path: Path) -> Any:
        """
        Raises:
            BadInputError: see ``open`` and ``torch_pickle.load``.
        """
        return torch_pickle.load(self.open(path))


@dataclass(frozen=True)
class OptimizerState:
    """What a rank's optimizer file says.

    Attributes:
        stage: 1, 2 or 3. DeepSpeed's BF16 optimizer names none; its layout is that of stage 1.
        world_size: ranks that share the parameters.
        groups: the rank's flat master weights, one tensor per parameter group (stage 3: per sub-group).
        steps: optimizer steps recorded in it.
        sharing: of each of ``groups``, the ranks that its parameters are split over, in the order of their parts: with
            expert parallelism (DeepSpeed 0.19) those that hold the same experts, else all.
    """

    stage: int
    world_size: int
    groups: list[StoredTensor]
    steps: set[int] = field(default_factory=set)
    sharing: list[list[int]] = field(default_factory=list)


def _stage(value: Any) -> Any:
    """ZeRO's stage: a number, or a ZeroStageEnum, which older 3.11 of Python (Debian 12's 3.11.2) pickle by name."""
    if not isinstance(value, torch_pickle.Inert) or not value.args:
        return value
    return STAGES.get(value.args[-1], value.args[0]) if isinstance(value.args[-1], str) else value.args[0]


def read_optimizer(path: Path, load: Callable[[Path], Any]) -> OptimizerState:
    """
    Raises:
        BadInputError: it is no optimizer state of ZeRO, or of a kind that is not supported.
    """
    content = load(path)
    state = content.get("optimizer_state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict) or not ("zero_stage" in state or FLAT_GROUPS[1] in state):
        raise BadInputError(f"{path} holds no ZeRO optimizer state")
    stage = _stage(state.get("zero_stage", 1))
    if stage not in (1, 2, 3):
        raise BadInputError(f"{path} was written by ZeRO stage {stage}; stages 1, 2 and 3 are supported")
    counts = state.get("partition_count")
    counts = counts if isinstance(counts, list) and counts else [counts]
    if not all(isinstance(count, int) and count >= 1 for count in counts):
        raise BadInputError(f"{path}: partition_count {state.get('partition_count')!r} is no number of ranks")
    if len(set(counts)) > 1:
        raise BadInputError(f"{path}: its parameter groups are spread over {counts} ranks; they must be equal")
    groups = state.get(FLAT_GROUPS[stage])
    if not isinstance(groups, list) or not all(isinstance(g, StoredTensor) for g in groups):
        raise BadInputError(f"{path} holds no flat master weights ({FLAT_GROUPS[stage]})")
    dtypes = {group.spec.dtype for group in groups}
    if len(dtypes) > 1 or not dtypes <= {"F32", "BF16"}:
        raise BadInputError(f"{path}: its master weights are {', '.join(sorted(dtypes))}; needed is F32 or BF16")
    sharing = _sharing(path, state.get(PARTITION_GROUPS), len(groups), counts[0])
    return OptimizerState(stage, counts[0], groups, _steps(state.get("optimizer_state_dict")), sharing)


def _sharing(path: Path, told: Any, groups: int, world_size: int) -> list[list[int]]:
    """Ranks over which each flat tensor's parameters are split; all of them where nothing is told (before 0.19)."""
    everyone = list(range(world_size))
    if told is None:
        return [everyone] * groups
    found = [entry.get("partition_ranks") if isinstance(entry, dict) else None for entry in told]
    numbered = [entry.get("sub_group") if isinstance(entry, dict) else None for entry in told]
    if numbered != list(range(groups)) or not all(
        isinstance(ranks, list) and ranks and set(ranks) <= set(everyone) and len(set(ranks)) == len(ranks)
        for ranks in found
    ):
        raise BadInputError(
            f"{path}: {PARTITION_GROUPS} does not say over which of {world_size} ranks each of {groups} flat tensors "
            "is split",
            "restore this file, or use an older checkpoint",
        )
    return found


def _steps(inner: Any) -> set[int]:
    """Steps in a torch optimizer's state: a number or a one-element tensor for each tensor, or in its groups."""
    if not isinstance(inner, dict):
        return set()
    states, groups = inner.get("state"), inner.get("param_groups")
    holders = [*(states.values() if isinstance(states, dict) else ()), *(groups if isinstance(groups, list) else ())]
    steps = set()
    with OpenFiles() as files:
        for holder in holders:
            step = holder.get("step") if isinstance(holder, dict) else None
            if isinstance(step, StoredTensor) and step.spec.dtype == "F32" and step.spec.elements == 1:
                step = files.read(step.file, step.offset, np.float32, 1)[0]
            if isinstance(step, (int, float, np.floating)) and np.isfinite(step):
                steps.add(int(step))
    return steps


Shapes = list[dict[str, tuple[int, ...]]]  # one mapping of name to shape per flat tensor


@dataclass
class ModelState:
    """What a model state file says.

    Attributes:
        shapes: of the trained parameters, in the order of the flat tensors.
        frozen_shapes, frozen: of parameters that are not trained; this file's part of each (stage 3).
        shared: name → the name under which the same parameter is stored.
        tensors: everything in the module's state.
        buffers: those of ``tensors`` that are buffers.
        world_size: number of ranks it speaks of, if any.
        step: steps by DeepSpeed's count, if any.
        skipped: those of them that the optimizer left out (overflows of FP16).
        samples: rows trained on by DeepSpeed's count, if any.
        frozen_unsaved: whether parameters that were not trained may have been left out (exclude_frozen_parameters).
    """

    shapes: Shapes
    frozen_shapes: dict[str, tuple[int, ...]]
    frozen: dict[str, StoredTensor]
    shared: dict[str, str]
    tensors: dict[str, StoredTensor]
    buffers: dict[str, StoredTensor]
    world_size: int | None
    step: int | None
    skipped: int
    frozen_unsaved: bool
    samples: int | None = None


def read_model_state(archive: torch_pickle.Archive) -> ModelState:
    """
    Raises:
        BadInputError: it is no model state of ZeRO.
    """
    path, state = archive.path, torch_pickle.load(archive)
    if not isinstance(state, dict):
        raise BadInputError(f"{path} holds no model state")
    shapes = state.get("param_shapes")
    if not isinstance(shapes, list) or not all(isinstance(group, dict) for group in shapes):
        raise BadInputError(f"{path} holds no param_shapes")
    module, shared = state.get("module") or {}, state.get("shared_params") or {}
    frozen_shapes, frozen = state.get("frozen_param_shapes") or {}, state.get("frozen_param_fragments") or {}
    if not all(isinstance(part, dict) for part in (module, shared, frozen_shapes, frozen)):
        raise BadInputError(f"{path}: module, shared_params or frozen parameters are no mappings of names")
    tensors = {name: tensor for name, tensor in module.items() if isinstance(tensor, StoredTensor)}
    names = set(state.get("buffer_names") or ())
    return ModelState(
        shapes=[{name: _shape(path, name, shape) for name, shape in group.items()} for group in shapes],
        frozen_shapes={name: _shape(path, name, shape) for name, shape in frozen_shapes.items()},
        frozen={name: part for name, part in frozen.items() if isinstance(part, StoredTensor)},
        shared={str(alias): str(name) for alias, name in shared.items()},
        tensors=tensors,
        buffers={name: tensor for name, tensor in tensors.items() if name in names},
        world_size=_number(state.get("dp_world_size")),
        step=_number(state.get("global_steps")),
        skipped=_number(state.get("skipped_steps")) or 0,
        samples=_number(state.get("global_samples")),
        frozen_unsaved=state.get("frozen_param_shapes") is None,
    )


def _shape(path: Path, name: str, shape: Any) -> tuple[int, ...]:
    if not isinstance(shape, tuple) or not all(isinstance(size, int) and size >= 0 for size in shape):
        raise BadInputError(f"{path}: the shape of {name} is {shape!r}")
    return shape


def _number(value: Any) -> int | None:
    return value if isinstance(value, int) else None
