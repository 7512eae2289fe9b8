"""Writes checkpoints of ZeRO stages 1 and 2 as DeepSpeed and torch.save would; see synthetic_zero3."""

from collections import OrderedDict
from pathlib import Path

import numpy as np
from synthetic_zero3 import Size, Tensor, ZeroStage, rank_names, save


def parts_of(values, world_size, alignment=2, padded=False):
    """Each rank's part of a group's flat tensor: equal cuts of what is padded to a multiple of alignment · W."""
    length = alignment * -(-values.size // (alignment * world_size))
    whole = np.full(length * world_size, 7e7, values.dtype)  # padding must never be read
    whole[: values.size] = values
    parts = [whole[rank * length : (rank + 1) * length] for rank in range(world_size)]
    if padded:
        return parts
    return [part[: max(0, values.size - rank * length)] for rank, part in enumerate(parts)]


def write_checkpoint(
    folder, groups, world_size, stage=2, buffers=None, frozen=None, shared=None, step=7, alignment=2, padded=False
):
    """Write a whole checkpoint.

    Args:
        groups: one dict per parameter group, name → float32 array (master weights).
        stage: 1, 2, or None for DeepSpeed's BF16 optimizer, which names no stage and keeps the padding.
        buffers, frozen: name → array, whole in the model state; uint16 stands for BF16.
        shared: name → the name that holds the same parameter.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    buffers, frozen = buffers or {}, frozen or {}
    flats = [np.concatenate([np.zeros(0, np.float32), *(v.reshape(-1) for v in group.values())]) for group in groups]
    cut = [parts_of(flat, world_size, alignment, padded or stage is None) for flat in flats]
    for rank in range(world_size):
        moments = {i: {"step": Tensor(np.float32(step).reshape(()), ())} for i in range(len(groups))}
        optimizer = {
            "optimizer_state_dict": {
                "single_partition_of_fp32_groups": [Tensor(parts[rank]) for parts in cut],
                "optimizer_state_dict": {"state": moments, "param_groups": []},
                "partition_count": [world_size] * len(groups),
            }
        }
        if stage is not None:
            optimizer["optimizer_state_dict"]["zero_stage"] = ZeroStage(stage)
        save(optimizer, folder / rank_names(rank)[0])
    zeros = {name: np.zeros(values.shape, np.uint16) for group in groups for name, values in group.items()}
    tensors = zeros | {alias: zeros[name] for alias, name in (shared or {}).items()} | buffers | frozen
    model = {
        "module": OrderedDict((name, Tensor(values)) for name, values in tensors.items()),
        "buffer_names": list(buffers),
        "param_shapes": [OrderedDict((n, Size(v.shape)) for n, v in group.items()) for group in groups],
        "frozen_param_shapes": OrderedDict((n, Size(v.shape)) for n, v in frozen.items()) if stage == 2 else None,
        "frozen_param_fragments": OrderedDict((n, Tensor(v)) for n, v in frozen.items()) if stage == 2 else None,
        "shared_params": dict(shared or {}),
        "dp_world_size": world_size,
        "global_steps": step,
    }
    save(model, folder / "mp_rank_00_model_states.pt")
    return folder
