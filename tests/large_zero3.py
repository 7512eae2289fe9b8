"""Writes ZeRO-3 checkpoints and base models of any size filled or as holes, for tests and benchmarks.

The files have the names, headers and offsets of real ones. With holes a checkpoint of 671B parameters over 256 ranks
takes some megabytes of disk; the optimizer's moments are always holes.
"""

import io
import itertools
import math
import os
import shutil
import struct
import sys
import zlib
from collections import OrderedDict
from unittest import mock

import numpy as np
import synthetic_zero3
from synthetic_zero3 import Size, Tensor, ZeroStage

from deepseek_sft import files
from deepseek_sft.convert import tiny_model
from deepseek_sft.families import deepseek_v3
from deepseek_sft.tensors import checksums, safetensors_files

BLOCK = 1 << 22  # elements


class Archive:
    """A zip archive of stored records as ``torch.save`` writes it; records may be holes. Everything is zip64."""

    def __init__(self, path):
        self.stem, self.entries = path.stem, []
        self.stream = open(path, "wb")  # noqa: SIM115  closed by close()

    def add(self, name, size, content=None):
        """A record of ``size`` bytes: a hole, or the byte strings of ``content``."""
        name, start = f"{self.stem}/{name}".encode(), self.stream.tell()
        self.stream.write(b"\0" * (30 + len(name) + 20))
        if content is None:
            crc = checksums.zeros(size) if size else 0
            self.stream.seek(size, os.SEEK_CUR)
        else:
            crc = 0
            for data in content:
                crc = zlib.crc32(data, crc)
                self.stream.write(data)
        end = self.stream.tell()
        assert end == start + 50 + len(name) + size
        self.stream.seek(start)
        fields = (45, 0, 0, 0, 33, crc, 0xFFFFFFFF, 0xFFFFFFFF, len(name))
        sizes = struct.pack("<HHQQ", 1, 16, size, size)
        self.stream.write(struct.pack("<4s5H3L2H", b"PK\3\4", *fields, len(sizes)) + name + sizes)
        self.stream.seek(end)
        place = struct.pack("<HHQQQ", 1, 24, size, size, start)
        head = struct.pack("<4s6H3L5H2L", b"PK\1\2", 45, *fields, len(place), 0, 0, 0, 0, 0xFFFFFFFF)
        self.entries.append(head + name + place)

    def close(self):
        start, directory = self.stream.tell(), b"".join(self.entries)
        count = len(self.entries)
        place = self.stream.write(directory) + start
        self.stream.write(struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, len(directory), start))
        self.stream.write(struct.pack("<4sLQL", b"PK\6\7", 0, place, 1))
        self.stream.write(struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0))
        self.stream.close()


def hollow(elements, dtype=np.float32, shape=None):
    """A tensor that has a size and no content."""
    tensor = Tensor.__new__(Tensor)
    tensor.values, tensor.shape = np.broadcast_to(np.zeros(1, dtype), (elements,)), tuple(shape or (elements,))
    return tensor


def save(value, path, content=lambda values: None):
    """``torch.save``; ``content`` gives the byte strings of an array, or None for a hole."""
    stream = io.BytesIO()
    pickler = synthetic_zero3._Pickler(stream)
    with mock.patch.dict(sys.modules, synthetic_zero3.MODULES):
        pickler.dump(value)
    archive = Archive(path)
    archive.add("data.pkl", stream.tell(), [stream.getvalue()])
    archive.add("byteorder", 6, [b"little"])
    for key, values in enumerate(pickler.arrays):
        archive.add(f"data/{key}", values.nbytes, content(values))
    archive.close()


def fused_shapes(specs, experts_per_shard, prefix="llm."):
    """Shapes of the release's tensors as training holds them (see ``synthetic_zero3.fuse``), and of its buffers."""
    parameters, buffers = {}, {}
    for name, spec in specs.items():
        head, separator, rest = name.partition(".mlp.experts.")
        if separator and experts_per_shard > 1:
            expert, part, _ = rest.split(".")
            rows, columns = spec.shape
            place = f"{prefix}{head}.mlp.experts.{int(expert) // experts_per_shard}"
            if part == "down_proj":
                parameters[f"{place}.w2"] = (experts_per_shard, rows, columns)
            else:
                parameters[f"{place}.w1w3"] = (experts_per_shard, 2 * rows, columns)
        elif name.endswith(deepseek_v3.CORRECTION_BIAS):
            buffers[prefix + name] = spec.shape
        else:
            parameters[prefix + name] = spec.shape
    return parameters, buffers


def _groups(shapes, world_size, sub_group_size):
    groups, filled = [OrderedDict()], 0
    for name, shape in shapes.items():
        if filled >= sub_group_size:
            groups.append(OrderedDict())
            filled = 0
        groups[-1][name] = shape
        filled += -(-math.prod(shape) // world_size)
    return groups


def _values(elements, seed, block):
    """Byte strings of ``elements`` floats that look like weights: one random block, begun elsewhere each time."""
    places = np.random.default_rng(seed).integers(0, block.size, -(-elements // block.size))
    for place in places:
        count = min(elements, block.size)
        first = block[place : place + count]
        yield first.tobytes()
        yield block[: count - first.size].tobytes()
        elements -= count


def _rank_groups(shapes, world_size, sub_group_size, rank, parallel_size):
    """A rank's sub-groups, name → shape, and of each the ranks that share it: of its own experts after all others."""
    if parallel_size == 1:
        groups = _groups(shapes, world_size, sub_group_size)
        return groups, [list(range(world_size))] * len(groups)
    others = {name: shape for name, shape in shapes.items() if synthetic_zero3.EXPERTS not in name}
    experts = synthetic_zero3.of_rank({n: s for n, s in shapes.items() if n not in others}, rank, parallel_size)
    sharing = synthetic_zero3.sharing(world_size, rank, parallel_size)
    dense = _groups(others, world_size, sub_group_size)
    sparse = _groups(experts, len(sharing), sub_group_size)
    return dense + sparse, [list(range(world_size))] * len(dense) + [sharing] * len(sparse)


def write_checkpoint(
    folder,
    specs,
    world_size,
    experts_per_shard=8,
    sub_group_size=10**9,
    filled=True,
    step=7,
    prefix="llm.",
    expert_parallel_size=1,
):
    """A checkpoint of a model with the release's tensors ``specs``; returns the bytes of its FP32 weights."""
    folder.mkdir(parents=True)
    shapes, buffers = fused_shapes(specs, experts_per_shard, prefix)
    block = np.random.default_rng(3).standard_normal(BLOCK, np.float32) * np.float32(0.02)
    held = [
        _rank_groups(shapes, world_size, sub_group_size, place, expert_parallel_size)
        for place in range(expert_parallel_size)
    ]
    states = [_optimizer(*of_place, world_size, step, expert_parallel_size) for of_place in held]
    written = {}  # place in its expert-parallel group and number of digits → model state file
    for rank in range(world_size):
        place = rank % expert_parallel_size
        optimizer, masters = states[place]
        optimizer_name, model_name = synthetic_zero3.rank_names(rank)
        seeds = itertools.count(1000 * rank)

        def content(values, seeds=seeds, masters=masters):
            if values.size == 1 or values.dtype != np.float32:
                return [values.tobytes()]
            is_master = any(values is master.values for master in masters)
            return _values(values.size, next(seeds), block) if filled and is_master else None

        save(optimizer, folder / optimizer_name, content)
        first = written.setdefault((place, len(str(rank))), folder / model_name)
        if first.name == model_name:
            save(_model(held[place][0], buffers, world_size, step), first, lambda values: [values.tobytes()])
        else:  # the same but for the archive's own name, of equal length
            alike = first.read_bytes().replace(first.stem.encode(), model_name.removesuffix(".pt").encode())
            (folder / model_name).write_bytes(alike)
    return 4 * sum(math.prod(shape) for shape in shapes.values())


def _model(groups, buffers, world_size, step):
    names = [name for group in groups for name in group]
    return {
        "module": OrderedDict(
            [(name, hollow(0, np.uint16)) for name in names]
            + [(name, Tensor(np.zeros(shape, np.float32))) for name, shape in buffers.items()]
        ),
        "buffer_names": list(buffers),
        "param_shapes": [OrderedDict((name, Size(shape)) for name, shape in group.items()) for group in groups],
        "frozen_param_shapes": None,
        "frozen_param_fragments": None,
        "shared_params": [],
        "dp_world_size": world_size,
        "global_steps": step,
    }


def _optimizer(groups, sharing, world_size, step, parallel_size):
    """What a rank's optimizer file holds, and its flat master weights."""
    partitions = [
        [-(-math.prod(shape) // len(ranks)) for shape in group.values()]
        for group, ranks in zip(groups, sharing, strict=True)
    ]
    lengths = [sum(sizes) for sizes in partitions]
    moments = {
        i: {"step": Tensor(np.float32(step).reshape(()), ()), "exp_avg": hollow(n), "exp_avg_sq": hollow(n)}
        for i, n in enumerate(lengths)
    }
    masters = [hollow(length) for length in lengths]
    state = {
        "zero_stage": ZeroStage(3),
        "partition_count": world_size,
        "optimizer_state_dict": {"state": moments, "param_groups": [{"params": list(moments)}]},
        "fp32_flat_groups": masters,
    }
    if parallel_size > 1:
        state["ds_zero_partition_groups"] = synthetic_zero3.partition_groups(sharing, world_size)
    return {"optimizer_state_dict": state, "ds_version": "0.19.8" if parallel_size > 1 else "0.18.9"}, masters


def write_base(folder, shape, largest_shard=5_000_000_000):
    """A base model all of zeros, as holes; returns its tensors."""
    folder.mkdir(parents=True)
    config = tiny_model.config_of(shape)
    specs = deepseek_v3.tensor_specs(config)
    shards = safetensors_files.lay_out(specs.items(), largest_shard)
    for shard in shards:
        with open(folder / shard.name, "wb") as stream:
            stream.write(shard.header)
            stream.truncate(shard.size)
    if len(shards) > 1:
        files.write_json(folder / safetensors_files.INDEX_NAME, safetensors_files.index_of(shards))
    files.write_json(folder / "config.json", config)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_model.tokenizer_folder() / name, folder / name)
    return specs
