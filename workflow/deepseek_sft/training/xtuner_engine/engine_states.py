"""What a resume sets in DeepSpeed's engine, however the states lie on disk.

DeepSpeed is pinned: what is set here is what ``DeepSpeedZeroOptimizer_Stage3._rigid_load_state_dict`` sets
(deepspeed/runtime/zero/stage3.py).
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ...convert import rank_state
from ...convert.rank_state import RankState, RecordingFiles
from ...errors import BadInputError
from ...tensors.safetensors_files import StoredTensor

BLOCK = 1 << 26  # bytes read at a time, where the target is not in host memory
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64, "I64": torch.int64}
# Hyperparameters that decide what a step does; the learning rate is set anew before each step.
COMPARED = ("betas", "eps", "weight_decay", "amsgrad", "maximize")


class OtherModelError(BadInputError):
    """A checkpoint is sound for all that can be told, and of another model or optimizer than this run's."""


def refuse_other_model(folder: Path, told: list[BadInputError | None], damaged: list[str]) -> None:
    """Refuse a checkpoint that fits on no rank, its files being sound: it is nobody's to set aside.

    Where it fits some ranks, a file is not the one that was committed.

    Args:
        told: what each rank met; the same list on all ranks.

    Raises:
        OtherModelError: on all ranks alike.
    """
    if damaged or not all(isinstance(error, OtherModelError) for error in told):
        return
    raise OtherModelError(
        f"checkpoint {folder.name} does not fit: {told[0].problem}",
        f"{folder} is left in place. Train on the base and with the settings that it was begun with, "
        "or begin another run: another name as experiment",
    )


def judge(
    folder: Path, ranges: dict[str, list[rank_state.Range]], names: Iterable[str], largest_gap: int = 0
) -> tuple[list[str], str]:
    """Compare what all ranks read of a checkpoint with its checksums; a collective.

    Args:
        ranges, names, largest_gap: of the files that this rank judges, see ``rank_state.check_ranges``.

    Returns:
        what is damaged, the same on all ranks; words for how much was compared.
    """
    verdicts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(verdicts, rank_state.check_ranges(folder, ranges, names, largest_gap))
    checked, unchecked = (sum(verdict[i] for verdict in verdicts) for i in (0, 1))
    without = f", {unchecked} without a checksum" if unchecked else ""
    return [text for _, _, found in verdicts for text in found], f"checksums of {checked} records are right{without}"


def check_hyperparameters(engine: Any, state: RankState, folder: Path) -> None:
    """
    Raises:
        OtherModelError: the checkpoint is of another optimizer.
    """
    groups = engine.optimizer.optimizer.param_groups
    for number, (now, then) in enumerate(zip(groups, state.hyperparameters, strict=False)):
        for name in COMPARED:
            if name in then and name in now and _plain(then[name]) != _plain(now[name]):
                raise OtherModelError(
                    f"{folder}: {name} of parameter group {number} is {then[name]!r} in the checkpoint, "
                    f"{now[name]!r} in this run"
                )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (tuple, list)) else value


def owners(zero: Any) -> list[tuple[torch.nn.Parameter, dict[str, Any]]]:
    """The flat FP32 master weights of each sub-group, and the parameter group of the optimizer that they are in."""
    zero._set_fp32_optimizer_param_groups()
    try:
        return [(p, group) for group in zero.optimizer.param_groups for p in group["params"]]
    finally:
        zero._clear_fp32_optimizer_param_groups()


def set_step(kept: dict[str, Any], parameter: torch.nn.Parameter, group: dict[str, Any], state: RankState) -> None:
    """The steps that the optimizer counts, the same in every sub-group."""
    count = state.optimizer_steps[0]
    if state.step_is_tensor:
        # As torch's load_state_dict places it.
        on_device = group.get("fused") or group.get("capturable")
        device = parameter.device if on_device else torch.device("cpu")
        kept["step"] = torch.tensor(count, dtype=torch.float32, device=device)
    else:
        kept["step"] = int(count)


def moment(kept: dict[str, Any], name: str, parameter: torch.nn.Parameter) -> torch.Tensor:
    """A moment of a sub-group's master weights; torch and DeepSpeed make them at the first step."""
    if name not in kept:
        kept[name] = torch.zeros_like(parameter.data)
    return kept[name]


def fill_optimizer(zero: Any, state: RankState, opened: RecordingFiles) -> None:
    """Master weights and moments of DeepSpeed's ZeRO-3 optimizer, as this rank wrote them."""
    for number, (parameter, group) in enumerate(owners(zero)):
        _read(opened, state.flat[number], parameter.data)
        kept = zero.optimizer.state[parameter]
        for name, stored in state.moments[number].items():
            _read(opened, stored, moment(kept, name, parameter))
        set_step(kept, parameter, group, state)


def fill_buffers(module: torch.nn.Module, state: RankState, opened: RecordingFiles) -> None:
    """Buffers, which are the same in all ranks' files.

    Raises:
        OtherModelError: the checkpoint has others than the model.
    """
    kept = set(module.state_dict())  # without the buffers that are computed, such as rotary frequencies
    wanted = {name: buffer for name, buffer in module.named_buffers() if name in kept}
    if wanted.keys() != state.buffers.keys():
        raise OtherModelError(
            f"the checkpoint has other buffers: {', '.join(sorted(wanted.keys() ^ state.buffers.keys()))}"
        )
    for name, stored in state.buffers.items():
        _read(opened, stored, wanted[name].data)


def check_dtype(stored: StoredTensor, target: torch.Tensor) -> None:
    """
    Raises:
        BadInputError: the stored elements are of another dtype than those that they fill.
    """
    if DTYPES.get(stored.spec.dtype) != target.dtype:
        raise BadInputError(f"{stored.file}: elements of {stored.spec.dtype} where this run has {target.dtype}")


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
    fill_part(opened, stored.file, stored.offset, target.view(-1))


def blocks(part: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """First element and view of pieces of a flat tensor that a buffer of ``BLOCK`` bytes holds."""
    at_once = max(1, BLOCK // part.element_size())
    return ((start, part[start : start + at_once]) for start in range(0, part.numel(), at_once))


def fill_part(opened: RecordingFiles, file: Path, offset: int, target: torch.Tensor) -> None:
    """Fill ``target``, a part of a flat tensor, with the bytes of a file from ``offset`` on."""
    in_place = target.device.type == "cpu"
    buffer = None if in_place else torch.empty(min(BLOCK // target.element_size(), target.numel()), dtype=target.dtype)
    for start, part in blocks(target):
        block = part if in_place else buffer[: part.numel()]
        opened.read_into(file, offset + start * target.element_size(), block.view(torch.uint8).numpy())
        if not in_place:
            part.copy_(block)


def finish(engine: Any, state: RankState) -> None:
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
