"""Writes ZeRO-3 checkpoints as DeepSpeed and torch.save would, in pure Python: for tests that have no torch.

``save`` pickles descriptors of numpy arrays under the names that torch uses; stand-ins for those modules exist only
while pickling.
"""

import io
import json
import math
import pickle
import sys
import types
import zipfile
from collections import OrderedDict
from pathlib import Path
from unittest import mock

import numpy as np

EXPERTS = ".mlp.experts."
STORAGE_NAMES = {"float32": "FloatStorage", "uint16": "BFloat16Storage", "int64": "LongStorage"}


class Tensor:
    """An array to be written as a torch tensor; uint16 stands for BF16."""

    def __init__(self, values, shape=None):
        self.values = np.ascontiguousarray(values)
        self.shape = tuple(self.values.shape if shape is None else shape)


def _fake_modules():
    modules = {}

    def add(module, name, value=None):
        for part in range(1, module.count(".") + 2):
            parent = ".".join(module.split(".")[:part])
            modules.setdefault(parent, types.ModuleType(parent))
        value = value or type(name, (), {"__init__": lambda self, *a: self.__dict__.update(args=a)})
        value.__module__, value.__qualname__ = module, name
        setattr(modules[module], name, value)
        return value

    for name in STORAGE_NAMES.values():
        add("torch", name)
    add("torch", "Size")
    add("torch._utils", "_rebuild_tensor_v2", lambda *a: None)
    add("deepspeed.runtime.zero.config", "ZeroStageEnum")
    return modules


MODULES = _fake_modules()
REBUILD = MODULES["torch._utils"]._rebuild_tensor_v2


class Size(tuple):
    """Pickled as torch.Size."""


class ZeroStage(int):
    """Pickled as DeepSpeed's enumeration of stages."""


class _Storage:
    def __init__(self, dtype, key, elements):
        self.dtype, self.key, self.elements = dtype, key, elements


class _Pickler(pickle.Pickler):
    def __init__(self, stream):
        super().__init__(stream, protocol=2)
        self.arrays = []

    def persistent_id(self, obj):
        if isinstance(obj, _Storage):
            return "storage", getattr(MODULES["torch"], STORAGE_NAMES[obj.dtype]), obj.key, "cpu", obj.elements
        return None

    def reducer_override(self, obj):
        if isinstance(obj, Tensor):
            key = str(len(self.arrays))
            self.arrays.append(obj.values)
            storage = _Storage(obj.values.dtype.name, key, obj.values.size)
            strides = tuple(math.prod(obj.shape[i + 1 :]) for i in range(len(obj.shape)))
            return REBUILD, (storage, 0, obj.shape, strides, False, OrderedDict())
        if isinstance(obj, Size):
            return MODULES["torch"].Size, (tuple(obj),)
        if isinstance(obj, ZeroStage):
            return MODULES["deepspeed.runtime.zero.config"].ZeroStageEnum, (int(obj),)
        return NotImplemented


def save(value, path):
    """``torch.save(value, path)``."""
    stream = io.BytesIO()
    pickler = _Pickler(stream)
    with mock.patch.dict(sys.modules, MODULES):
        pickler.dump(value)
    write_archive(path, stream.getvalue(), pickler.arrays)


def write_archive(path, content, arrays=()):
    """The zip file around a pickle."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(f"{path.stem}/data.pkl", content)
        archive.writestr(f"{path.stem}/byteorder", "little")
        for key, values in enumerate(arrays):
            archive.writestr(f"{path.stem}/data/{key}", values.tobytes())


def rank_names(rank):
    middle = f"zero_pp_rank_{rank}_mp_rank_00"
    return f"bf16_{middle}_optim_states.pt", f"{middle}_model_states.pt"


def sharing(world_size, rank, parallel_size):
    """Ranks that hold the same experts as ``rank``: one of each expert-parallel group."""
    return list(range(rank % parallel_size, world_size, parallel_size))


def of_rank(experts, rank, parallel_size):
    """Of name → value of shards, those that a rank holds: the first rank of a group the first of every layer."""

    def shard(name):
        return int(name.partition(EXPERTS)[2].split(".")[0])

    shards = {name: shard(name) for name in experts}
    each = (1 + max(shards.values())) // parallel_size
    return {name: value for name, value in experts.items() if shards[name] // each == rank % parallel_size}


def partition_groups(shared, world_size):
    """What DeepSpeed's optimizer file says of sub-groups, each of which some ranks share."""
    return [
        {
            "sub_group": number,
            "partition_count": len(ranks),
            "partition_ranks": ranks,
            "families": ["replicated" if len(ranks) == world_size else "autoep_expert"],
        }
        for number, ranks in enumerate(shared)
    ]


def write_checkpoint(
    folder,
    groups,
    world_size,
    buffers=None,
    frozen=None,
    step=7,
    rng=None,
    shared=None,
    expert_parallel_size=1,
):
    """Write a whole checkpoint.

    Args:
        groups: one dict per sub-group, name → float32 array (master weights); with expert parallelism those of experts
            hold nothing else.
        buffers: name → array in rank 0's and every other rank's model state.
        frozen: name → array that is not trained.
        shared: name → the name that holds the same parameter.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rng = rng or np.random.default_rng(0)
    frozen = frozen or {}

    def partition(values, rank, ranks=range(world_size)):
        length = -(-values.size // len(ranks))
        padded = np.full(length * len(ranks), 7e7, values.dtype)  # padding must never be read
        padded[: values.size] = values.reshape(-1)
        place = ranks.index(rank)
        return padded[place * length : (place + 1) * length]

    everything, told = groups, {}
    for rank in range(world_size):
        spread = [expert_parallel_size > 1 and all(EXPERTS in name for name in group) for group in everything]
        among = [sharing(world_size, rank, expert_parallel_size) if one else list(range(world_size)) for one in spread]
        groups = [
            of_rank(group, rank, expert_parallel_size) if one else group
            for group, one in zip(everything, spread, strict=True)
        ]
        if expert_parallel_size > 1:
            told = {"ds_zero_partition_groups": partition_groups(among, world_size)}
        flats = [
            np.concatenate([partition(values, rank, ranks) for values in group.values()])
            for group, ranks in zip(groups, among, strict=True)
        ]
        moments = {
            i: {
                "step": Tensor(np.float32(step).reshape(()), ()),
                "exp_avg": Tensor(rng.random(flat.shape, np.float32)),
                "exp_avg_sq": Tensor(rng.random(flat.shape, np.float32)),
            }
            for i, flat in enumerate(flats)
        }
        optimizer = {
            "optimizer_state_dict": {
                "zero_stage": ZeroStage(3),
                "partition_count": world_size,
                "optimizer_state_dict": {"state": moments, "param_groups": []},
                "fp32_flat_groups": [Tensor(flat) for flat in flats],
                **told,
            },
            "ds_version": "0.18.9",
        }
        model = {
            "module": OrderedDict(
                [(name, Tensor(np.zeros(0, np.uint16), (0,))) for group in groups for name in group]
                + [(name, Tensor(values)) for name, values in (buffers or {}).items()]
            ),
            "buffer_names": list(buffers or {}),
            "param_shapes": [OrderedDict((n, Size(v.shape)) for n, v in group.items()) for group in groups],
            "frozen_param_shapes": OrderedDict((n, Size(v.shape)) for n, v in frozen.items()) or None,
            "frozen_param_fragments": {n: Tensor(partition(v, rank)) for n, v in frozen.items()} or None,
            "shared_params": dict(shared or {}),
            "dp_world_size": world_size,
            "global_steps": step,
            "meta": {"iter": step},
        }
        optimizer_name, model_name = rank_names(rank)
        save(optimizer, folder / optimizer_name)
        save(model, folder / model_name)
    return folder


def write_marker(folder, world_size, step=7, prefix="llm.", layout="w1w3_w2", experts_per_shard=2, **changes):
    """The commit marker that training writes."""
    files = {path.name: path.stat().st_size for path in sorted(Path(folder).glob("*.pt"))}
    marker = {
        "format": 1,
        "run_id": "0123456789ab",
        "step": step,
        "world_size": world_size,
        "zero_stage": 3,
        "parameter_prefix": prefix,
        "experts": {"layout": layout, "experts_per_shard": experts_per_shard},
        "files": files,
        "dtype": "bfloat16",
    } | changes
    (Path(folder) / "committed.json").write_text(json.dumps(marker))


def fuse(tensors, experts_per_shard, prefix="llm."):
    """Release tensors (name → float32 array) as training holds them: prefixed, experts in fused shards."""
    fused, pending = {}, {}
    for name, values in tensors.items():
        head, separator, rest = name.partition(".mlp.experts.")
        if not separator:
            fused[prefix + name] = values
            continue
        expert, part, _ = rest.split(".")
        pending.setdefault((head, int(expert) // experts_per_shard), {})[int(expert), part] = values
    for (head, shard), parts in pending.items():
        experts = sorted({expert for expert, _ in parts})
        w1w3 = [np.concatenate([parts[e, "gate_proj"], parts[e, "up_proj"]]) for e in experts]
        fused[f"{prefix}{head}.mlp.experts.{shard}.w1w3"] = np.stack(w1w3)
        fused[f"{prefix}{head}.mlp.experts.{shard}.w2"] = np.stack([parts[e, "down_proj"] for e in experts])
    return fused


def split_groups(tensors, largest):
    """Distribute over sub-groups at whole parameters, as DeepSpeed does once ``largest`` elements are passed."""
    groups, filled = [{}], 0
    for name, values in tensors.items():
        groups[-1][name] = values
        filled += values.size
        if filled >= largest:
            groups.append({})
            filled = 0
    return [group for group in groups if group]


def write_malicious(path, function, *args):
    """An archive whose pickle calls ``function(*args)`` when loaded by an ordinary unpickler."""

    class Attack:
        def __reduce__(self):
            return function, args

    write_archive(path, pickle.dumps({"optimizer_state_dict": Attack()}, protocol=2))
