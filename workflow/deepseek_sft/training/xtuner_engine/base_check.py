"""Before the base is loaded: its files are those that prepare_model found, each read by one rank."""

import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ...cli import say
from ...convert import base_sums
from ...errors import BadInputError
from .memory import GIB


def check(base: Path, sums_file: str | None, mode: str) -> None:
    """Compare the base's files with their sums; a collective, the same on all ranks.

    Args:
        sums_file: written by prepare_model; None of bases that were prepared before there were sums.
        mode: ``auto`` (where it takes little beside loading), ``always`` or ``never``.

    Raises:
        BadInputError: a file is not what it was, or the sums cannot be read.
    """
    started, rank, world_size = time.monotonic(), dist.get_rank(), dist.get_world_size()
    if mode == "never" or sums_file is None:
        if rank == 0 and mode != "never":
            say("base: without checksums (prepare_model of an earlier version)")
        return
    try:
        sums, problem = base_sums.read(Path(sums_file)), None
    except BadInputError as error:
        sums, problem = {}, error
    cheap = problem is None and (mode == "always" or base_sums.is_cheap(sums, world_size))
    own = base_sums.shares(sums, world_size)[rank] if cheap else []
    found = base_sums.problems(base, sums, own) if problem is None else [problem.problem]
    told: list[Any] = [None] * world_size
    dist.all_gather_object(told, found)
    if everything := list(dict.fromkeys(text for texts in told for text in texts)):
        raise BadInputError("\n".join(everything[:8]), problem.fix if problem else base_sums.AGAIN)
    if rank == 0:
        size = sum(entry["bytes"] for entry in sums.values()) / GIB
        seconds = time.monotonic() - started
        said = f"{len(sums)} files, {size:.2f} GiB as prepare_model found them, in {seconds:.1f} s"
        say(f"base: {said}" if cheap else f"base: {size:.0f} GiB not compared (train.check_base: always does)")
