"""Puts a committed checkpoint into DeepSpeed's engine: partitions, moments, buffers and counts.

DeepSpeed's own way unpickles the files, which runs whatever they ask for, believes every byte, and holds a second copy
of the rank's states in host memory. Here the restricted reader of the conversion fills the tensors in place, and the
checksums of all ranges that all ranks read are judged before anything is trained. DeepSpeed is pinned: what is set
here is what ``DeepSpeedZeroOptimizer_Stage3._rigid_load_state_dict`` sets (deepspeed/runtime/zero/stage3.py).
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ...cli import say
from ...convert import rank_state
from ...convert.rank_state import RankState, RecordingFiles
from ...errors import BadInputError
from ...tensors.safetensors_files import StoredTensor
from .. import checkpoints
from ..checkpoints import Checkpoint
from .memory import GIB, rank_device

BLOCK = 1 << 26  # bytes read at a time, where the target is not in host memory
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64, "I64": torch.int64}
# Hyperparameters that decide what a step does; the learning rate is set anew before each step.
COMPARED = ("betas", "eps", "weight_decay", "amsgrad", "maximize")


def resume_newest(engine: Any, candidates: Sequence[Checkpoint]) -> Checkpoint:
    """Fill the engine from the newest of ``candidates`` (oldest first) that is sound; a collective.

    Damaged ones are set aside by name (``step_<N>.damaged``).

    Raises:
        BadInputError: on all ranks alike, none is sound.
    """
    lost: list[str] = []
    for checkpoint in reversed(candidates):
        problems = fill(engine, checkpoint)
        if not problems:
            return checkpoint
        shown = "\n".join(f"  - {problem}" for problem in problems[:8])
        more = f"\n  - and {len(problems) - 8} more" if len(problems) > 8 else ""
        if dist.get_rank() == 0:
            place = checkpoints.set_aside_damaged(checkpoint.folder)
            say(f"warning: checkpoint {checkpoint.folder.name} is damaged, set aside as {place.name}:\n{shown}{more}")
        dist.barrier()
        lost.append(f"{checkpoint.folder.name}:\n{shown}{more}")
    folder = candidates[-1].folder.parent
    raise BadInputError(
        f"none of the {len(candidates)} checkpoints in {folder} is sound\n" + "\n".join(lost),
        "restore one (its folder is named step_<N>.damaged now; rename it back), or remove all of them to begin anew",
    )


def fill(engine: Any, checkpoint: Checkpoint) -> list[str]:
    """Read this rank's part of a checkpoint into the engine, and judge what all ranks read; a collective.

    Returns:
        what is wrong, the same on all ranks; empty where the engine is now as it was when the checkpoint was saved.
    """
    started = time.monotonic()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    engine.optimizer.checkpoint_event_prologue()
    state, problem = None, ""
    with RecordingFiles() as opened:
        try:
            state = rank_state.read(checkpoint.folder, rank, checkpoint.marker)
            _fits(engine, state, checkpoint.folder)
            _fill_optimizer(engine.optimizer, state, opened)
            _fill_buffers(engine.module, state, opened)
        except BadInputError as error:
            problem = error.problem
        told: list[Any] = [None] * world_size
        dist.all_gather_object(told, (problem, opened.ranges(), opened.bytes_read))
    problems = [text for text, _, _ in told if text]
    ranges: dict[str, list[rank_state.Range]] = {}
    for _, of_rank, _ in told:
        for name, some in of_rank.items():
            ranges.setdefault(name, []).extend(some)
    own = [name for number, name in enumerate(sorted(ranges)) if number % world_size == rank]
    verdicts: list[Any] = [None] * world_size
    dist.all_gather_object(verdicts, rank_state.check_ranges(checkpoint.folder, ranges, own))
    problems += [text for _, _, found in verdicts for text in found]
    if problems:
        return problems
    _finish(engine, state)
    if rank == 0:
        checked, unchecked = (sum(verdict[i] for verdict in verdicts) for i in (0, 1))
        size = sum(count for _, _, count in told) / GIB
        without = f", {unchecked} without a checksum" if unchecked else ""
        say(
            f"resumed from {checkpoint.folder.name}: {size:.2f} GiB in {time.monotonic() - started:.1f} s, "
            f"checksums of {checked} records are right{without}"
        )
    return []


def _fits(engine: Any, state: RankState, folder: Path) -> None:
    """
    Raises:
        BadInputError: the checkpoint is of another model, another order of parameters, or another optimizer.
    """
    wanted = [{name: tuple(shape) for name, shape in group.items()} for group in engine._get_zero_param_shapes()]
    found = [{str(name): tuple(shape) for name, shape in group.items()} for group in state.shapes]
    if [list(group.items()) for group in wanted] != [list(group.items()) for group in found]:
        names = {name for group in wanted for name in group} ^ {name for group in found for name in group}
        raise BadInputError(
            f"{folder} holds other parameters than this model"
            + (f", first {min(names)}" if names else ": their shapes, order or groups differ")
        )
    groups = engine.optimizer.optimizer.param_groups
    for number, (now, then) in enumerate(zip(groups, state.hyperparameters, strict=False)):
        for name in COMPARED:
            if name in then and name in now and _plain(then[name]) != _plain(now[name]):
                raise BadInputError(
                    f"{folder}: {name} of parameter group {number} is {then[name]!r} in the checkpoint, "
                    f"{now[name]!r} in this run"
                )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (tuple, list)) else value


def _fill_optimizer(zero: Any, state: RankState, opened: RecordingFiles) -> None:
    """Master weights and moments of DeepSpeed's ZeRO-3 optimizer."""
    zero._set_fp32_optimizer_param_groups()
    try:
        owners = [(p, group) for group in zero.optimizer.param_groups for p in group["params"]]
    finally:
        zero._clear_fp32_optimizer_param_groups()
    for number, (parameter, group) in enumerate(owners):
        _read(opened, state.flat[number], parameter.data)
        kept = zero.optimizer.state[parameter]
        for name, stored in state.moments[number].items():
            if name not in kept:  # torch and DeepSpeed make them at the first step
                kept[name] = torch.zeros_like(parameter.data)
            _read(opened, stored, kept[name])
        count = state.optimizer_steps[number]
        if state.step_is_tensor:
            # As torch's load_state_dict places it.
            on_device = group.get("fused") or group.get("capturable")
            device = parameter.device if on_device else torch.device("cpu")
            kept["step"] = torch.tensor(count, dtype=torch.float32, device=device)
        else:
            kept["step"] = int(count)


def _fill_buffers(module: torch.nn.Module, state: RankState, opened: RecordingFiles) -> None:
    kept = set(module.state_dict())  # without the buffers that are computed, such as rotary frequencies
    wanted = {name: buffer for name, buffer in module.named_buffers() if name in kept}
    if wanted.keys() != state.buffers.keys():
        raise BadInputError(
            f"the checkpoint has other buffers: {', '.join(sorted(wanted.keys() ^ state.buffers.keys()))}"
        )
    for name, stored in state.buffers.items():
        _read(opened, stored, wanted[name].data)


def _read(opened: RecordingFiles, stored: StoredTensor, target: torch.Tensor) -> None:
    """Fill ``target`` (contiguous) with a stored tensor's elements.

    Raises:
        BadInputError: it has another number of elements or another dtype, or the file cannot be read.
    """
    dtype = DTYPES.get(stored.spec.dtype)
    if stored.spec.elements != target.numel() or dtype != target.dtype:
        raise BadInputError(
            f"{stored.file}: a tensor of {stored.spec.elements} elements of {stored.spec.dtype} where this run has "
            f"{target.numel()} of {target.dtype}"
        )
    flat = target.view(-1)
    at_once = max(1, BLOCK // flat.element_size())
    in_place = flat.device.type == "cpu"
    buffer = None if in_place else torch.empty(min(at_once, flat.numel()), dtype=dtype)
    for start in range(0, flat.numel(), at_once):
        part = flat[start : start + at_once]
        block = part if in_place else buffer[: part.numel()]
        opened.read_into(stored.file, stored.offset + start * flat.element_size(), block.view(torch.uint8).numpy())
        if not in_place:
            part.copy_(block)


def _finish(engine: Any, state: RankState) -> None:
    """Have DeepSpeed take the weights over from the master weights, and set its counts."""
    zero = engine.optimizer
    same = {
        "loss_scaler": zero.loss_scaler,
        "dynamic_loss_scale": zero.dynamic_loss_scale,
        "overflow": False,
        "fp32_flat_groups": zero.fp32_partitioned_groups_flat,  # filled already: copied onto themselves
    }
    zero.load_state_dict({dist.get_rank(zero.dp_process_group): same}, load_optimizer_states=False)
    zero.checkpoint_event_epilogue()
    engine.global_steps = state.global_steps
    engine.skipped_steps = state.skipped_steps
    engine.global_samples = state.global_samples or state.global_steps * engine.train_batch_size()
    engine.loaded_checkpoint_dp_world_size = dist.get_world_size()


def candidates_of(run: Path, run_id: str) -> list[Checkpoint]:
    """The committed checkpoints of a run, oldest first, as rank 0 sees them; a collective."""
    box: list[Any] = [None]
    if dist.get_rank() == 0:
        box[0] = [(str(c.folder), c.marker) for c in checkpoints.committed(run, run_id)]
    dist.broadcast_object_list(box, device=rank_device())
    return [Checkpoint(Path(folder), marker) for folder, marker in box[0]]
