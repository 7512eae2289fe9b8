"""What one rank needs of a ZeRO-3 checkpoint to train on: where its bytes lie, described without unpickling anything.

Everything is read through ``torch_pickle``: of a file only the names that a checkpoint needs are known, nothing of it
is executed. What is read is remembered with its CRC-32 and compared with the archive's own, so that a damaged file is
known before the first step. Who reads which range is decided by the caller (``repartition`` for other topologies), and
the ranges of all ranks are joined per file (``check_ranges``).
"""

import threading
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import BadInputError
from ..tensors import checksums, torch_pickle
from ..tensors.byte_ranges import OpenFiles
from ..tensors.checksums import Range
from ..tensors.safetensors_files import StoredTensor
from . import zero_stage_3
from .zero_files import Loader, RankFiles, Shapes, read_model_state, read_optimizer

RESTORE = "restore this file, or let an older checkpoint be used"


@dataclass(frozen=True)
class RankState:
    """A rank's part of a checkpoint.

    Attributes:
        flat: its flat FP32 master weights, one tensor per sub-group.
        moments: of each sub-group, name of the optimizer's tensor (``exp_avg``, ``exp_avg_sq``) → where it lies.
        optimizer_steps: of each sub-group, the steps that the optimizer counts.
        step_is_tensor: whether the optimizer keeps that count as a tensor (torch's) or as a number (DeepSpeed's).
        hyperparameters: of each parameter group of the optimizer, betas, eps and the like (plain values only).
        shapes: names and shapes of the parameters in each sub-group, in their order.
        sharing: of each sub-group, the ranks that its parameters are split over, in the order of their parts.
        buffers: name → where the buffer lies.
        global_steps, global_samples, skipped_steps: DeepSpeed's own counts.
    """

    flat: list[StoredTensor]
    moments: list[dict[str, StoredTensor]]
    optimizer_steps: list[float]
    step_is_tensor: bool
    hyperparameters: list[dict[str, Any]]
    shapes: Shapes
    sharing: list[list[int]]
    buffers: dict[str, StoredTensor]
    global_steps: int
    global_samples: int | None
    skipped_steps: int


class RecordingFiles(OpenFiles):
    """Files of which everything that is read is remembered as ranges with CRC-32."""

    def __init__(self, limit: int | None = None) -> None:
        super().__init__(limit)
        self.bytes_read = 0
        self._ranges: dict[Path, list[Range]] = {}
        self._recording = threading.Lock()

    def read_into(self, path: Path, offset: int, target: NDArray) -> None:
        super().read_into(path, offset, target)
        crc = zlib.crc32(memoryview(target).cast("B"))
        with self._recording:
            self.bytes_read += target.nbytes
            self._ranges.setdefault(path, []).append((offset, offset + target.nbytes, crc))

    def ranges(self) -> dict[str, list[Range]]:
        """File name → joined ranges."""
        return {path.name: checksums.join(some) for path, some in self._ranges.items()}


def archive_digest(path: Path) -> str:
    """What identifies the content of a file of ``torch.save``: sha256 over names, sizes and CRC-32 of its records.

    Reads its directory and its pickle only; the records' bytes are bound by their CRC-32.

    Raises:
        BadInputError: cut, corrupt, or written as the file of another rank.
    """
    return _open(path)[1]


def _open(path: Path) -> tuple[torch_pickle.Archive, str]:
    """The archive of a rank's file, and its digest."""
    loader = Loader()
    archive = loader.open(path)
    return archive, f"zip:{loader.hasher.hexdigest()}"


def digests_of(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """``archive_digest`` of files of a checkpoint folder, by name."""
    return {name: archive_digest(folder / name) for name in names}


def read(folder: Path, rank: int, marker: Mapping[str, Any], alone: bool = False) -> RankState:
    """Describe a rank's part of a checkpoint, and check that its files are the ones that the marker speaks of.

    Args:
        marker: content of ``committed.json``: ``step`` and ``world_size``, and where the version that wrote it knew
            them ``checksums`` (file name → ``archive_digest``).
        alone: other ranks' files need not be there.

    Raises:
        BadInputError: naming the file that is missing, cut, refused, of another rank, step or size, or that has
            another content than was committed.
    """
    step, world_size = marker["step"], marker["world_size"]
    found = RankFiles.find(folder)
    if not alone or rank not in found.optimizer or rank not in found.model:
        found.check(3, world_size, f"{folder.name}/committed.json")
    optimizer, model = found.optimizer[rank], found.model[rank]
    archives = {}
    for path in (optimizer, model):
        archives[path], digest = _open(path)
        if marker.get("checksums", {}).get(path.name, digest) != digest:
            raise BadInputError(f"{path} is not the file that was committed: its records have other checksums", RESTORE)
    state = read_model_state(archives[model])
    if state.step != step:
        raise BadInputError(f"{model} is of step {state.step}, the checkpoint's marker says {step}", RESTORE)
    if state.world_size != world_size:
        raise BadInputError(
            f"{model} is of {state.world_size} ranks, the checkpoint's marker says {world_size}", RESTORE
        )
    if state.frozen_shapes:
        raise BadInputError(f"{model} holds parameters that were not trained; this workflow trains all")
    content = torch_pickle.load(archives[optimizer])
    master = read_optimizer(optimizer, lambda _: content)
    if (master.stage, master.world_size) != (3, world_size):
        raise BadInputError(
            f"{optimizer} is of stage {master.stage} with {master.world_size} ranks, not 3 with {world_size}"
        )
    zero_stage_3.check_groups(optimizer, master.groups, state.shapes, master.sharing)
    moments, steps, tensors, groups = _optimizer(optimizer, content, len(master.groups))
    for number, (flat, kept) in enumerate(zip(master.groups, moments, strict=True)):
        for name, tensor in kept.items():
            if tensor.spec.elements != flat.spec.elements:
                raise BadInputError(
                    f"{optimizer}: {name} of sub-group {number} has {tensor.spec.elements} elements, "
                    f"its master weights {flat.spec.elements}",
                    RESTORE,
                )
    if any(count != step - state.skipped for count in steps):
        raise BadInputError(
            f"{optimizer} is of step {max(steps):g}, {model.name} of step {step - state.skipped}",
            "the folder holds files of two checkpoints: restore those of one",
        )
    return RankState(
        flat=master.groups,
        moments=moments,
        optimizer_steps=steps,
        step_is_tensor=tensors,
        hyperparameters=groups,
        shapes=state.shapes,
        sharing=master.sharing,
        buffers=state.buffers,
        global_steps=step,
        global_samples=state.samples,
        skipped_steps=state.skipped,
    )


def _optimizer(
    path: Path, content: dict[str, Any], sub_groups: int
) -> tuple[list[dict[str, StoredTensor]], list[float], bool, list[dict[str, Any]]]:
    """Moments and steps by sub-group, whether steps are tensors, and the plain values of the parameter groups."""
    inner = content["optimizer_state_dict"].get("optimizer_state_dict")
    groups = inner.get("param_groups") if isinstance(inner, dict) else None
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        raise BadInputError(f"{path} holds no state of its optimizer", RESTORE)
    order = [index for group in groups for index in group.get("params", ())]
    states = inner.get("state")
    if not isinstance(states, dict) or len(order) != sub_groups or any(index not in states for index in order):
        raise BadInputError(f"{path} holds no state of its optimizer for each of {sub_groups} sub-groups", RESTORE)
    moments, steps, tensors = [], [], False
    with OpenFiles() as files:
        for index in order:
            state = states[index]
            kept = {n: v for n, v in state.items() if isinstance(v, StoredTensor) and n != "step"}
            step = state.get("step")
            if isinstance(step, StoredTensor) and step.spec.dtype == "F32" and step.spec.elements == 1:
                step, tensors = files.read(step.file, step.offset, np.float32, 1)[0], True
            if not kept or isinstance(step, bool) or not isinstance(step, (int, float, np.floating)):
                raise BadInputError(f"{path}: sub-group {index} has no moments or no step", RESTORE)
            moments.append(kept)
            steps.append(float(step))
    plain = [{n: v for n, v in group.items() if n != "params" and _is_plain(v)} for group in groups]
    return moments, steps, tensors, plain


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def check_ranges(
    folder: Path, ranges: Mapping[str, list[Range]], names: Iterable[str], largest_gap: int = 0
) -> tuple[int, int, list[str]]:
    """Compare what all ranks together read of some files with the checksums that the files were written with.

    Args:
        ranges: file name → ranges that were read, of all ranks.
        names: the files to judge.
        largest_gap: bytes of a record that no rank needed (padding), read here.

    Returns:
        records compared, records without a checksum or not read whole, one sentence for each damaged file.
    """
    checked = unchecked = 0
    problems = []
    with OpenFiles() as opened:
        for name in names:
            try:
                verdict = checksums.check(opened, folder / name, checksums.join(ranges.get(name, [])), largest_gap)
            except BadInputError as error:
                problems.append(error.problem)
                continue
            checked, unchecked = checked + verdict.checked, unchecked + verdict.unchecked
            if error := checksums.error_of(verdict.damaged):
                problems.append(error.problem)
    return checked, unchecked, problems
