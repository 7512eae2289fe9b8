"""A run's checkpoints on the nodes' own disks: each rank's files on its node, a copy of them on the next one.

Where a disk refuses, this is said, the checkpoint is given up on all nodes, and training goes on: the shared storage
has its own cadence.
All methods but ``write``, ``copy`` and ``forget`` are collectives, and decide the same on all ranks.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ... import environment_faults, saving_tiers
from ...cli import say
from ...convert import rank_state
from ...engines import MARKER_FORMAT
from ...errors import BadInputError, StageError
from ...slurm.nodes import own_name
from .. import checkpoints, local_tier, lock
from ..local_tier import NotUsableError
from .config import Attempt, EngineConfig
from .deferred_files import DeferredFile
from .neighbours import Neighbours


@dataclass(frozen=True)
class Written:
    """What a rank tells of a checkpoint on its node.

    Attributes:
        sizes, digests: of its files, by name.
        sums: CRC-32 of each whole file, as it was sent; empty without a neighbour.
        copies: CRC-32 of each file that it keeps for the node before.
        failure: why it could not write or copy; None where it could.
    """

    sizes: dict[str, int]
    digests: dict[str, str]
    sums: dict[str, int]
    copies: dict[str, int]
    failure: str | None = None


class NodeLocal:
    """The tier of one start.

    Attributes:
        root: the run's folder on this node.
        names: of all nodes, in the order of their ranks.
    """

    def __init__(self, config: EngineConfig, attempt: Attempt, root: Path, neighbours: Neighbours, names: list[str]):
        self.root, self.neighbours, self.names = root, neighbours, names
        self._attempt = attempt
        self._keep = saving_tiers.local_keep(config.settings)
        self._last_bytes = 0

    def begin(self, step: int) -> Path | None:
        """An empty folder for step ``step`` on each node; None where one node has none, which is said."""
        folder, failure = checkpoints.folder_of(self.root, step), None
        if self.neighbours.leads:
            try:
                local_tier.begin(folder, self._last_bytes)
            except NotUsableError as error:
                failure = str(error)
        return folder if self._agreed(folder, gather(failure)) else None

    def write(
        self, folder: Path, put: Callable[[Path, list[DeferredFile]], None], files: list[DeferredFile]
    ) -> Written:
        """Write this rank's files; in the checkpoint's thread, beside the next step, whose update must wait for it.

        Args:
            put: writes and syncs files.
        """
        sizes, digests, failure = {}, {}, None
        try:
            put(folder, files)
            sizes = checkpoints.files_of_rank(folder, dist.get_rank())
            digests = rank_state.digests_of(folder, sizes)
        except (OSError, RuntimeError, BadInputError) as error:
            # torch's writer does not say what the file system told it.
            told = error if isinstance(error, OSError) else environment_faults.refusal(folder) or error
            failure = environment_faults.in_words(told)
        return Written(sizes, digests, {}, {}, failure)

    def copy(self, folder: Path, own: "Future[Written]") -> Written:
        """Hand a copy of what ``write`` has written to the next node; by the same thread, beside whatever steps."""
        written, near = own.result(), self.neighbours
        if near.nodes == 1:
            return written
        done = near.hand_over(
            near.next, [folder / name for name in written.sizes], near.before, folder, written.failure
        )
        copies = {name: crc for name, (_, crc) in done.received.items()}
        return replace(written, sums=done.sent, copies=copies, failure=done.failure)

    def commit(self, folder: Path, marker: dict[str, Any], written: Written, biases: Any) -> int | None:
        """Commit on all nodes once all ranks have written and copied.

        Args:
            marker: as of the shared storage, without its files; rank 0's counts, since ranks' clocks differ.
            biases: checksum of this rank's routers' biases.

        Returns:
            bytes of all ranks' files; None where it was not committed, which is said.

        Raises:
            RuntimeError: on all ranks alike: biases differ, or the run belongs to another start by now.
        """
        told: list[tuple[Written, Any, Any]] = gather((written, biases, None if dist.get_rank() else marker))
        self._check(folder, [biases for _, biases, _ in told])
        parts, marker = [part for part, _, _ in told], told[0][2]
        if not self._agreed(folder, [part.failure for part in parts]) or not self._agreed(folder, self._copied(parts)):
            return None
        files = {name: size for part in parts for name, size in part.sizes.items()}
        failure = None
        if self.neighbours.leads:
            more = {"files": files, "saved_by": self._attempt.name}  # so that no two of one step are alike
            more |= {"checksums": {name: digest for part in parts for name, digest in part.digests.items()}}
            more |= {"crc32": {name: crc for part in parts for name, crc in part.sums.items()}}
            try:
                local_tier.commit(folder, {"format": MARKER_FORMAT} | marker | more)
            except OSError as error:
                failure = environment_faults.in_words(error)
        if not self._agreed(folder, gather(failure)):
            return None
        near = self.neighbours
        self._last_bytes = sum(self._bytes(parts, node) for node in {near.node, near.before})
        return sum(files.values())

    def note(self, step: int, size: int, seconds: float) -> None:
        """Leave word of a committed checkpoint in the run's folder; on rank 0."""
        if dist.get_rank() == 0:
            local_tier.note(self._attempt.run, step, size, seconds, time.time())

    def forget(self, step: int) -> None:
        """Remove what is not kept on this node, now that step ``step`` is committed, here or on the shared storage."""
        if not self.neighbours.leads:
            return
        try:
            local_tier.prune(self.root, step, self._keep)
        except OSError as error:
            node = self.names[self.neighbours.node]
            say(f"warning: {node}: old checkpoints stay: {environment_faults.in_words(error)}")

    def close(self, finished: bool) -> None:
        """Training has ended.

        Args:
            finished: nothing of the run is left to train, and its results are on the shared storage.
        """
        if self.neighbours.leads:
            local_tier.close_root(self.root, self.neighbours.node, self._attempt.name, remove=finished)

    def _check(self, folder: Path, biases: Sequence[Any]) -> None:
        problem = None
        if dist.get_rank() == 0:
            if other := [rank for rank, one in enumerate(biases) if one != biases[0]]:
                problem = f"the routers' correction biases of rank {other[0]} differ from rank 0's"
            try:
                # A start that Slurm took for dead must not commit beside the one that goes on elsewhere.
                lock.check_attempt(self._attempt.run, self._attempt.name)
            except StageError as error:
                problem = str(error)
        if problem := gather(problem)[0]:
            raise RuntimeError(f"node-local checkpoint {folder.name} was not committed: {problem}")

    def _copied(self, parts: list[Written]) -> list[str | None]:
        """By rank, whether its files are on the next node as it sent them."""
        if self.neighbours.nodes == 1:
            return [None] * len(parts)
        world, each = len(parts), self.neighbours.ranks_per_node
        found = []
        for rank, part in enumerate(parts):
            whole = part.sums.keys() == part.sizes.keys() and parts[(rank + each) % world].copies == part.sums
            found.append(None if whole else "the copy of its files on the next node is not what it sent")
        return found

    def _agreed(self, folder: Path, failures: Sequence[str | None]) -> bool:
        """Whether no rank failed; else the checkpoint is given up on all nodes and rank 0 says why."""
        each = self.neighbours.ranks_per_node
        named = [f"{self.names[rank // each]} (rank {rank}): {text}" for rank, text in enumerate(failures) if text]
        if not named:
            return True
        if self.neighbours.leads:
            local_tier.discard(folder)
        if dist.get_rank() == 0:
            more = f"\n  - and {len(named) - 4} more ranks" if len(named) > 4 else ""
            listed = "".join(f"\n  - {text}" for text in named[:4])
            say(
                f"warning: node-local checkpoint {folder.name} is given up, training goes on and saves to the shared "
                f"storage as ever:{listed}{more}"
            )
        dist.barrier()
        return False

    def _bytes(self, parts: list[Written], node: int) -> int:
        each = self.neighbours.ranks_per_node
        return sum(sum(part.sizes.values()) for part in parts[node * each : (node + 1) * each])


def open_tier(config: EngineConfig, attempt: Attempt) -> NodeLocal | None:
    """The tier that the settings ask for, ready on all nodes; a collective.

    Returns:
        None where they ask for none, or where a node cannot have it, which is said: training does without then.

    Raises:
        BadInputError: on all ranks alike: nodes see each other's files there.
    """
    chosen = saving_tiers.local(config.settings)
    if chosen is None:
        return None
    neighbours = Neighbours(config.nodes)
    names = gather(own_name())[:: neighbours.ranks_per_node]
    told: tuple[str | None, str | None] = (None, None)
    if dist.get_rank() == 0:
        try:
            told = (local_tier.key_of(attempt.run), None)
        except OSError as error:
            told = (None, environment_faults.in_words(error))
    key, failure = gather(told)[0]
    root = None
    try:
        if failure is None:
            root = local_tier.root_of(chosen.path, config.run_id, key)
            if neighbours.leads:
                local_tier.open_root(root, neighbours.node, attempt.name)
    except NotUsableError as error:
        failure = str(error)
    failures = [f"{names[rank // neighbours.ranks_per_node]}: {one}" for rank, one in enumerate(gather(failure)) if one]
    if failures:
        if dist.get_rank() == 0:
            listed = "".join(f"\n  - {text}" for text in dict.fromkeys(failures))
            say(f"warning: no node-local checkpoints in this start, the shared storage is saved to as ever:{listed}")
        return None
    seen = gather(local_tier.others_seen(root, neighbours.node, attempt.name))
    for rank, others in enumerate(seen):
        if others:
            place, other = names[rank // neighbours.ranks_per_node], names[others[0]]
            raise BadInputError(
                f"train.checkpoints: {chosen.path} is no disk of the nodes' own: {place} sees there what {other} wrote",
                "name a folder on each node's own disk, or leave that entry out",
            )
    if neighbours.nodes == 1 and dist.get_rank() == 0:
        say("node-local checkpoints: a single node has no neighbour to keep a copy; what is lost with its disk is lost")
    return NodeLocal(config, attempt, root, neighbours, names)


def gather(own: Any) -> list[Any]:
    """What each rank says; a collective."""
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, own)
    return told
