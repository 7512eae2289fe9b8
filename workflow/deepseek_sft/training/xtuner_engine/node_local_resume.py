"""Going on from the nodes' own disks: which checkpoint all nodes together have whole, and what is fetched for it.

Ranks read their own files back. Where a node lacks them, being new or having lost its disk, the node that keeps the
copy hands them over, and they are compared with the marker before they are read. What is damaged is moved aside by
name; then the copy is taken, or an older checkpoint. Parts of two checkpoints never come together.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ... import engines, environment_faults
from ...cli import say
from ...engines import MARKER
from ...errors import BadInputError
from .. import checkpoints, local_tier
from ..checkpoints import Checkpoint
from ..local_tier import Choice, Damaged, Held, Move
from . import node_local
from .config import Attempt, EngineConfig
from .memory import GIB
from .neighbours import HandedOver
from .node_local import NodeLocal, gather


@dataclass
class OnNodes:
    """What the nodes hold, as all ranks know it.

    Attributes:
        tier: None where this start has none.
        choices: checkpoints that can be loaded, oldest first.
    """

    tier: NodeLocal | None = None
    run_id: str = ""
    told: list[list[Held]] = field(default_factory=list)
    topology: str = ""
    damaged: set[Damaged] = field(default_factory=set)

    @property
    def choices(self) -> list[Choice]:
        if self.tier is None:
            return []
        return local_tier.choices(self.told, self.tier.neighbours.ranks_per_node, self.topology, self.damaged)

    def refused(self) -> dict[int, str]:
        """Step → why a checkpoint is not read."""
        return local_tier.refused(self.told, self.topology, dist.get_world_size(), self.damaged)


def look(config: EngineConfig, attempt: Attempt, alone: bool) -> OnNodes:
    """Open the tier, and ask every node what it holds; a collective.

    Args:
        alone: the shared storage has no checkpoint.

    Raises:
        BadInputError: on all ranks alike: see ``node_local.open_tier``; or this start would begin anew where ranks of
            another kind have left the only checkpoints.
    """
    tier = node_local.open_tier(config, attempt)
    if tier is None:
        return OnNodes()
    own = local_tier.held(tier.root, config.run_id) if tier.neighbours.leads else []
    told = gather(own)[:: tier.neighbours.ranks_per_node]
    layout = engines.XTUNER.checkpoint
    kind = layout.marker(config.settings.experts_per_shard, config.settings.expert_parallel_size)
    topology = local_tier.topology_of({"world_size": dist.get_world_size(), **kind})
    found = OnNodes(tier, config.run_id, told, topology)
    if alone and not found.choices:
        others = [one for node in told for one in node if one.topology != topology]
        if others:
            raise BadInputError(
                f"{found.refused()[max(one.step for one in others)]}; there is none, so that all steps would be lost",
                "start once more as it was begun, and stop it (it saves there), or give another train.run_name to "
                "begin a new run",
            )
        tell_refused(found)
    return found


def tell_refused(found: OnNodes, after: int = -1) -> None:
    """Say which checkpoints later than step ``after``, which is gone on from, are not read, and why."""
    if dist.get_rank() == 0:
        for step, why in sorted(found.refused().items()):
            if step > after:
                say(f"warning: {why}")


def fetch(found: OnNodes, choice: Choice) -> Checkpoint | list[str]:
    """Have every rank's files of a checkpoint on its own node; or what went wrong, the same on all ranks."""
    tier = found.tier
    near = tier.neighbours
    folder = checkpoints.folder_of(tier.root, choice.step)
    marker = _marker(found, choice, folder)
    if isinstance(marker, str):
        return [marker]
    problem = None
    if near.leads:
        try:
            folder.mkdir(exist_ok=True)
        except OSError as error:
            problem = environment_faults.in_words(error)
    if problems := _said(tier, gather(problem)):
        found.damaged |= {Damaged(node, choice.digest, rank) for node, rank in _everywhere(found)}  # of this step alone
        return problems
    bad: list[tuple[Damaged, str]] = []
    for move in choice.moves:
        if move.rank % near.ranks_per_node == dist.get_rank() % near.ranks_per_node:
            bad += _move(tier, move, folder, marker, choice.digest)
    if all_bad := [one for some in gather(bad) for one in some]:
        _set_aside(found, folder, marker, all_bad)
        return [f"{tier.names[one.node]}: {text}" for one, text in all_bad]
    if choice.moves and dist.get_rank() == 0:
        size = sum(sum(local_tier.files_of(marker, move.rank).values()) for move in choice.moves)
        takers = ", ".join(dict.fromkeys(tier.names[move.taker] for move in choice.moves))
        givers = ", ".join(dict.fromkeys(tier.names[move.giver] for move in choice.moves))
        say(f"{folder.name}: {size / GIB:.2f} GiB for {takers} fetched from {givers}, checksums are right")
    return Checkpoint(folder, marker)


def keep_whole(found: OnNodes, checkpoint: Checkpoint) -> None:
    """It was loaded: nodes that were new have it from now on, too."""
    near = found.tier.neighbours
    if not near.leads or (checkpoint.folder / MARKER).exists():
        return
    try:
        local_tier.commit(checkpoint.folder, checkpoint.marker)
    except OSError as error:
        say(f"warning: {found.tier.names[near.node]}: {environment_faults.in_words(error)}")


def blame(found: OnNodes, choice: Choice, checkpoint: Checkpoint, problems: list[str]) -> None:
    """Move the files aside that ``problems`` name; where they name none, nothing of this checkpoint is read again.

    Of a rank whose files were fetched also those that they came from, whose checksum was that of damaged bytes.
    """
    each = found.tier.neighbours.ranks_per_node
    givers = {move.rank: move.giver for move in choice.moves}
    blamed = []
    for rank in range(checkpoint.marker["world_size"]):
        names = local_tier.files_of(checkpoint.marker, rank)
        texts = [text for text in problems if any(name in text for name in names)]
        nodes = dict.fromkeys((rank // each, givers.get(rank, rank // each)))
        blamed += [(Damaged(node, choice.digest, rank), text) for text in texts[:1] for node in nodes]
    if blamed:
        _set_aside(found, checkpoint.folder, checkpoint.marker, blamed)
    else:
        found.damaged |= {Damaged(node, choice.digest, rank) for node, rank in _everywhere(found)}


def _everywhere(found: OnNodes) -> Iterable[tuple[int, int]]:
    world = dist.get_world_size()
    return [(node, rank) for node in range(found.tier.neighbours.nodes) for rank in range(world)]


def _marker(found: OnNodes, choice: Choice, folder: Path) -> dict[str, Any] | str:
    """The marker of a checkpoint, as the first node that has it tells all."""
    own: Any = None
    if found.tier.neighbours.leads and found.tier.neighbours.node == choice.marked:
        own = checkpoints.marker_in(folder, found.run_id)
    told = gather(own)[choice.marked * found.tier.neighbours.ranks_per_node]
    if isinstance(told, dict) and local_tier.digest_of(told) == choice.digest:
        return told
    found.damaged |= {Damaged(node, choice.digest, rank) for node, rank in _everywhere(found)}
    return f"{found.tier.names[choice.marked]}: the marker of {folder.name} is not what it was a moment ago"


def _move(tier: NodeLocal, move: Move, folder: Path, marker: dict[str, Any], digest: str) -> list[tuple[Damaged, str]]:
    """This rank's part in handing a rank's files over; what is not as it was committed."""
    near, files = tier.neighbours, local_tier.files_of(marker, move.rank)
    if near.node == move.giver:
        near.hand_over(move.taker, [folder / name for name in files])
    elif near.node == move.taker:
        done = near.hand_over(source=move.giver, folder=folder)
        if text := _differs(done, files, marker):
            for name in files:
                (folder / name).unlink(missing_ok=True)
            return [(Damaged(move.giver, digest, move.rank), text)]
    return []


def _differs(done: HandedOver, files: dict[str, int], marker: dict[str, Any]) -> str | None:
    sums = marker.get("crc32")
    # One that a single node wrote has none: its records are judged later.
    known = sums if isinstance(sums, dict) else {}
    for name, size in files.items():
        came = done.received.get(name)
        if came and came != (size, known.get(name, came[1])):
            return f"{name} is not what was committed: its checksum is another"
    if done.failure or done.received.keys() != files.keys():
        return f"{min(files)} could not be fetched: {done.failure or 'it is not there'}"
    return None


def _set_aside(found: OnNodes, folder: Path, marker: dict[str, Any], bad: list[tuple[Damaged, str]]) -> None:
    """Move damaged files out of the checkpoint on their nodes; a collective."""
    near = found.tier.neighbours
    for one, _ in bad:
        if near.leads and near.node == one.node:
            try:
                place = local_tier.set_aside(folder, local_tier.files_of(marker, one.rank))
                say(f"warning: {found.tier.names[one.node]}: what is damaged of rank {one.rank} is now in {place}")
            except OSError as error:
                say(f"warning: {found.tier.names[one.node]}: {environment_faults.in_words(error)}")
    found.damaged |= {one for one, _ in bad}
    dist.barrier()


def _said(tier: NodeLocal, failures: list[str | None]) -> list[str]:
    each = tier.neighbours.ranks_per_node
    return [f"{tier.names[rank // each]}: {text}" for rank, text in enumerate(failures) if text]
