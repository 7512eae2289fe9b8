"""Puts a committed checkpoint into DeepSpeed's engine: partitions, moments, buffers and counts.

DeepSpeed's own way unpickles the files, which runs whatever they ask for, believes every byte, and holds a second copy
of the rank's states in host memory. Here the restricted reader of the conversion fills the tensors in place, and the
checksums of all ranges that all ranks read are judged before anything is trained. A checkpoint of as many ranks and
fused experts is read here, each rank its own files; another one by ``other_topology``.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ...cli import say
from ...convert import rank_state
from ...convert.rank_state import RankState, RecordingFiles
from ...errors import BadInputError
from .. import checkpoints
from ..checkpoints import Checkpoint
from ..local_tier import Choice
from . import engine_states, node_local_resume, other_topology
from .memory import GIB, rank_device
from .node_local_resume import OnNodes

ON_NO_NODES = OnNodes()


def resume_newest(engine: Any, candidates: Sequence[Checkpoint], on_nodes: OnNodes = ON_NO_NODES) -> Checkpoint:
    """Fill the engine from the newest checkpoint that is sound, of ``candidates`` (oldest first) and of those that lie
    on the nodes' own disks; a collective.

    Damaged ones are set aside by name (``step_<N>.damaged``; on the nodes, files).

    Raises:
        BadInputError: on all ranks alike, none is sound.
        OtherModelError: on all ranks alike, one is of another model or optimizer; it stays where it is.
    """
    left, lost = list(candidates), []
    while left or on_nodes.choices:
        choice = on_nodes.choices[-1] if on_nodes.choices else None
        if choice and (not left or choice.step > left[-1].step):
            node_local_resume.tell_refused(on_nodes, after=choice.step)
            found = _from_nodes(engine, on_nodes, choice)
            if isinstance(found, Checkpoint):
                return found
            lost.append(f"step_{choice.step} on the nodes' own disks:\n{_listed(found)}")
            continue
        checkpoint = left.pop()
        node_local_resume.tell_refused(on_nodes, after=checkpoint.step)
        written_alike = other_topology.is_same(engine, checkpoint.marker)
        problems = (fill if written_alike else other_topology.fill)(engine, checkpoint)
        if not problems:
            return checkpoint
        shown = _listed(problems)
        if dist.get_rank() == 0:
            place = checkpoints.set_aside_damaged(checkpoint.folder)
            say(f"warning: checkpoint {checkpoint.folder.name} is damaged, set aside as {place.name}:\n{shown}")
        dist.barrier()
        lost.append(f"{checkpoint.folder.name}:\n{shown}")
    if not candidates:
        raise BadInputError(
            "no checkpoint on the nodes' own disks is sound, and the shared storage has none\n" + "\n".join(lost),
            "the same command begins anew from the base; what is damaged lies beside the checkpoints on the nodes",
        )
    folder = candidates[-1].folder.parent
    raise BadInputError(
        f"none of the {len(candidates)} checkpoints in {folder} is sound\n" + "\n".join(lost),
        "restore one (its folder is named step_<N>.damaged now; rename it back), or remove all of them to begin anew",
    )


def _listed(problems: Sequence[str]) -> str:
    shown = "\n".join(f"  - {problem}" for problem in problems[:8])
    return shown + (f"\n  - and {len(problems) - 8} more" if len(problems) > 8 else "")


def _from_nodes(engine: Any, on_nodes: OnNodes, choice: Choice) -> Checkpoint | list[str]:
    """Have a checkpoint's files together on the nodes and read them; what is wrong with them is not chosen again."""
    found = node_local_resume.fetch(on_nodes, choice)
    if isinstance(found, Checkpoint):
        problems = fill(engine, found, alone=True)
        if not problems:
            node_local_resume.keep_whole(on_nodes, found)
            return found
        node_local_resume.blame(on_nodes, choice, found, problems)
        found = problems
    if dist.get_rank() == 0:
        say(f"warning: node-local checkpoint step_{choice.step} is damaged:\n{_listed(found)}")
    return found


def fill(engine: Any, checkpoint: Checkpoint, alone: bool = False) -> list[str]:
    """Read this rank's part of a checkpoint into the engine, and judge what all ranks read; a collective.

    Args:
        alone: the folder is this node's own and need not hold other ranks' files: each rank judges its own.

    Returns:
        what is wrong, the same on all ranks; empty where the engine is now as it was when the checkpoint was saved.

    Raises:
        OtherModelError: see ``resume_newest``.
    """
    started = time.monotonic()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    engine.optimizer.checkpoint_event_prologue()
    state, met = None, None
    with RecordingFiles() as opened:
        try:
            state = rank_state.read(checkpoint.folder, rank, checkpoint.marker, alone)
            _fits(engine, state, checkpoint.folder)
            engine_states.fill_optimizer(engine.optimizer, state, opened)
            engine_states.fill_buffers(engine.module, state, opened)
        except BadInputError as error:
            met = error
        told: list[Any] = [None] * world_size
        dist.all_gather_object(told, (met, opened.ranges(), opened.bytes_read))
    problems = [error.problem for error, _, _ in told if error]
    ranges: dict[str, list[rank_state.Range]] = {}
    for _, of_rank, _ in told:
        for name, some in of_rank.items():
            ranges.setdefault(name, []).extend(some)
    own = [name for number, name in enumerate(sorted(ranges)) if number % world_size == rank]
    if alone:
        own = sorted(opened.ranges())
    damaged, compared = engine_states.judge(checkpoint.folder, ranges, own)
    engine_states.refuse_other_model(checkpoint.folder, [error for error, _, _ in told], damaged)
    if problems := problems + damaged:
        return problems
    engine_states.finish(engine, state)
    if rank == 0:
        size = sum(count for _, _, count in told) / GIB
        say(f"resumed from {checkpoint.folder.name}: {size:.2f} GiB in {time.monotonic() - started:.1f} s, {compared}")
    return []


def _fits(engine: Any, state: RankState, folder: Path) -> None:
    """
    Raises:
        OtherModelError: the checkpoint is of another model, another order of parameters, or another optimizer.
    """
    wanted = [{name: tuple(shape) for name, shape in group.items()} for group in engine._get_zero_param_shapes()]
    found = [{str(name): tuple(shape) for name, shape in group.items()} for group in state.shapes]
    if [list(group.items()) for group in wanted] != [list(group.items()) for group in found]:
        names = {name for group in wanted for name in group} ^ {name for group in found for name in group}
        raise engine_states.OtherModelError(
            f"{folder} holds other parameters than this model"
            + (f", first {min(names)}" if names else ": their shapes, order or groups differ")
        )
    engine_states.check_hyperparameters(engine, state, folder)


def candidates_of(run: Path, run_id: str) -> list[Checkpoint]:
    """The committed checkpoints of a run, oldest first, as rank 0 sees them; a collective."""
    box: list[Any] = [None]
    if dist.get_rank() == 0:
        box[0] = [(str(c.folder), c.marker) for c in checkpoints.committed(run, run_id)]
    dist.broadcast_object_list(box, device=rank_device())
    return [Checkpoint(Path(folder), marker) for folder, marker in box[0]]
