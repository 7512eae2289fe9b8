"""Shares of a conversion: several nodes write different files of one model, and one of them completes it."""

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from .. import cli
from ..errors import BadInputError, CrashError, GateError, StageError, StoppedError
from .safetensors_files import Shard

SLURM = "slurm"  # in place of K/N: this task's number as srun or a job array gives it
# An outer step leaves variables that make srun think it is inside a one-task step; with these alone it sees the job.
KEPT_VARIABLES = ("SLURM_JOB_ID", "SLURM_CONF")
ERRORS: dict[int, type[StageError]] = {2: BadInputError, 3: GateError, 4: StoppedError}


@dataclass(frozen=True)
class Part:
    """Share ``number`` (from 1) of ``count``."""

    number: int
    count: int

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"


def parse_part(text: str) -> Part:
    """``K/N``, or ``slurm``: from the environment of a task of srun, or of a job array.

    Raises:
        BadInputError: anything else, or no such environment.
    """
    if text == SLURM:
        return _slurm_part()
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise BadInputError(f"--part {text!r} is no share", "write it as 1/4, 2/4, … 4/4, or slurm")
    return Part(int(match[1]), int(match[2]))


def _slurm_part() -> Part:
    environment = os.environ
    if "SLURM_ARRAY_TASK_ID" in environment and environment.get("SLURM_NTASKS", "1") == "1":
        first, count = int(environment["SLURM_ARRAY_TASK_MIN"]), int(environment["SLURM_ARRAY_TASK_COUNT"])
        if int(environment["SLURM_ARRAY_TASK_MAX"]) - first + 1 != count:
            raise BadInputError("the job array has gaps, so that its shares are not known", "use --array=1-N")
        return Part(int(environment["SLURM_ARRAY_TASK_ID"]) - first + 1, count)
    try:
        return Part(int(environment["SLURM_PROCID"]) + 1, int(environment["SLURM_NTASKS"]))
    except KeyError as missing:
        raise BadInputError(f"--part slurm, but {missing} is not set", "run it with srun or sbatch --array") from None


def share(shards: Sequence[Shard], part: Part) -> list[Shard]:
    """The files of one share: a range of neighbours, its bytes within one file of an equal share.

    Every file is in exactly one share, and neighbours stay together, so that a node reads the ranks' files in order.
    """
    total = sum(shard.size for shard in shards)
    position, chosen = 0, []
    for shard in shards:
        middle = 2 * position + shard.size
        if middle * part.count // (2 * total) == part.number - 1:
            chosen.append(shard)
        position += shard.size
    return chosen


def cpus_of_node() -> int:
    """CPUs that this job has on a node; where Slurm binds no processes they see all of the node's."""
    stated = [os.environ.get(name) for name in ("SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE")]
    return min([len(os.sched_getaffinity(0)), *(int(count) for count in stated if count)])


def run_on_nodes(nodes: int, command: list[str]) -> None:
    """Run a command once on each of the allocation's nodes; with ``--part slurm`` each knows its share.

    A node that fails does not stop the others: what they finish need not be done again.

    Raises:
        StageError: not in a Slurm job, or the kind that the worst of the commands ended with.
    """
    if not os.environ.get("SLURM_JOB_ID"):
        raise BadInputError(
            f"{nodes} nodes are wanted, but this is not a Slurm job", "leave --nodes out, or use sbatch"
        )
    environment = {
        name: value
        for name, value in os.environ.items()
        if name in KEPT_VARIABLES or not name.startswith(("SLURM_", "SRUN_", "SBATCH_"))
    }
    launcher = ["srun", "--overlap", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1"]
    launcher += [f"--cpus-per-task={cpus_of_node()}", "--kill-on-bad-exit=0", "--wait=0", "--label"]
    cli.say(f"{nodes} nodes, one share each")
    try:
        code = subprocess.run([*launcher, sys.executable, *command], env=environment, stdout=sys.stderr).returncode
    except OSError as error:
        raise CrashError(f"srun cannot be started: {error.strerror}") from None
    if code:
        raise ERRORS.get(code, CrashError)(
            f"a node ended with exit code {code}, see its lines above", "the same command goes on with what is missing"
        )
