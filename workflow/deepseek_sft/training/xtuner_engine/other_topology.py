"""A checkpoint of other ranks, or of other shards of experts, put into this engine; nothing is converted on disk.

Each rank fills its partitions with byte ranges of the old ranks' files (``convert/repartition.py``). Which file a rank
judges follows from the file's old rank; the CRC-32 of what each rank read of it come to that rank and are joined there.
Reading every file whole by one rank instead would move all bytes a second time, 8 TB for 671B.
"""

import pickle
import time
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from ...cli import say
from ...convert import repartition
from ...convert.rank_state import RankState, RecordingFiles
from ...convert.repartition import Copy, Layout, Source
from ...errors import BadInputError
from ...tensors.checksums import Range
from ...tensors.safetensors_files import ITEM_SIZES
from ..checkpoints import Checkpoint
from . import engine_states
from .memory import GIB, rank_device


def is_same(engine: Any, marker: dict[str, Any]) -> bool:
    """Whether each rank finds its own partitions in its own files; the same on all ranks."""
    kept = marker.get("experts", {})
    if marker["world_size"] != dist.get_world_size() or kept.get("parallel_size", 1) != _parallel_size(engine):
        return False
    return kept.get("experts_per_shard") in (None, engine.module.llm.config.experts_per_shard)


def _parallel_size(engine: Any) -> int:
    """Ranks over which a layer's experts are spread."""
    parallel = engine.module.llm.parallel
    return parallel.size if parallel else 1


def layout_of(engine: Any) -> Layout:
    """Where this run's ranks hold the parameters."""
    shapes = [{name: tuple(shape) for name, shape in group.items()} for group in engine._get_zero_param_shapes()]
    zero = engine.optimizer
    sharing = [zero._get_sub_group_partition_ranks(index) for index in range(len(shapes))]
    return repartition.spread_over(shapes, sharing, dist.get_world_size(), _parallel_size(engine))


def fill(engine: Any, checkpoint: Checkpoint) -> list[str]:
    """Read this rank's partitions out of other ranks' files, and judge what all ranks read; a collective.

    Returns:
        what is wrong, the same on all ranks; empty where the engine is now as it was when the checkpoint was saved.

    Raises:
        OtherModelError: on all ranks alike, the checkpoint is of another model or optimizer.
    """
    started, rank, world_size = time.monotonic(), dist.get_rank(), dist.get_world_size()
    engine.optimizer.checkpoint_event_prologue()
    source, state, met, padding = Source(checkpoint.folder, checkpoint.marker), None, None, 0
    with RecordingFiles() as opened:
        try:
            state, padding = _read(engine, source, opened)
        except BadInputError as error:
            met = error
        told: list[Any] = [None] * world_size
        dist.all_gather_object(told, (met, opened.bytes_read))
        ranges = exchange(opened.ranges())
    problems = list(dict.fromkeys(error.problem for error, _ in told if error))
    damaged, compared = engine_states.judge(checkpoint.folder, ranges, sorted(ranges), padding)
    engine_states.refuse_other_model(checkpoint.folder, [error for error, _ in told], damaged)
    if problems := problems + damaged:
        return problems
    engine_states.finish(engine, state)
    if rank == 0:
        say(
            f"resumed from {checkpoint.folder.name}, which {source.world_size} ranks wrote, on {world_size}: "
            f"{sum(count for _, count in told) / GIB:.2f} GiB in {time.monotonic() - started:.1f} s, {compared}"
        )
    return []


def _read(engine: Any, source: Source, opened: RecordingFiles) -> tuple[RankState, int]:
    """Fill this rank's states and buffers.

    Returns:
        what an old rank's files say, with the counts that all share, and most bytes of padding in one of their tensors.

    Raises:
        BadInputError: naming the file that is not sound, or what does not fit this model.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    first, *others = repartition.old_ranks_of(rank, world_size, source.world_size)
    state, old, new = source.state(first), source.layout(first), layout_of(engine)
    if name := old.difference(new):
        raise engine_states.OtherModelError(f"{source.folder} holds other parameters than this model, first {name}")
    engine_states.check_hyperparameters(engine, state, source.folder)
    engine_states.fill_buffers(engine.module, state, opened)
    for other in others:  # nobody needs their buffers, but their files are judged like the others
        for stored in source.state(other).buffers.values():
            opened.read(stored.file, stored.offset, np.uint8, stored.bytes)
    _fill_optimizer(engine.optimizer, source, list(repartition.copies(old, new, rank)), opened, state)
    return state, old.padding * max(ITEM_SIZES[flat.spec.dtype] for flat in state.flat)


def _fill_optimizer(zero: Any, source: Source, wanted: list[Copy], opened: RecordingFiles, state: RankState) -> None:
    owners = engine_states.owners(zero)
    gaps = list(repartition.sub_group_gaps(wanted, [parameter.numel() for parameter, _ in owners]))
    names = [None, *state.moments[0]]  # None: the master weights
    for name in names:
        targets = []
        for parameter, _ in owners:
            kept = zero.optimizer.state[parameter]
            targets.append(parameter.data if name is None else engine_states.moment(kept, name, parameter))
        for index, start, end in gaps:
            targets[index].view(-1)[start:end].zero_()
        for copy in wanted:
            target = targets[copy.index].view(-1)[copy.offset : copy.offset + copy.count]
            stored, offset = source.place(copy, name)
            engine_states.check_dtype(stored, target)
            engine_states.fill_part(opened, stored.file, offset, target)
    for parameter, group in owners:
        engine_states.set_step(zero.optimizer.state[parameter], parameter, group, state)


def exchange(own: dict[str, list[Range]]) -> dict[str, list[Range]]:
    """Hand each file's ranges to the rank that judges it; a collective.

    Some ten thousand ranges a rank where the old ranks do not divide the new ones: too many for all ranks to hold all.

    Args:
        own: file name → what this rank read of it.

    Returns:
        the same of the files that this rank judges, of all ranks.
    """
    world_size, device = dist.get_world_size(), rank_device()
    sent: list[dict[str, Any]] = [{} for _ in range(world_size)]
    for name, ranges in own.items():
        sent[repartition.rank_of_file(name) % world_size][name] = np.array(ranges, np.int64)
    packed = [pickle.dumps(part) for part in sent]
    sizes = torch.tensor([len(part) for part in packed], device=device)
    coming = torch.empty_like(sizes)
    dist.all_to_all_single(coming, sizes)
    outgoing = torch.frombuffer(bytearray(b"".join(packed)), dtype=torch.uint8).to(device)
    incoming = torch.empty(int(coming.sum()), dtype=torch.uint8, device=device)
    dist.all_to_all_single(incoming, outgoing, coming.tolist(), sizes.tolist())
    content, found, position = incoming.cpu().numpy().tobytes(), {}, 0
    for size in coming.tolist():
        for name, ranges in pickle.loads(content[position : position + size]).items():
            found.setdefault(name, []).extend(map(tuple, ranges.tolist()))
        position += size
    return found
