"""What the rest of the workflow must know of an engine that trains: one row for each.

An engine is a subpackage with three modules: ``config``, which needs no torch and whose ``of(run, node, accelerator)``
gives what all ranks of a start are told (``as_json``), ``worker``, which torchrun starts once for each rank, and
``imports``, which imports what the ranks do.
"""

import importlib
import re
from dataclasses import dataclass
from types import ModuleType
from typing import Any

GIB = 1 << 30
MARKER, MARKER_FORMAT = "committed.json", 1  # in a checkpoint folder, once it counts: ``convert/marker.py``
DEFAULT = "xtuner"  # begun runs and plans name no engine


@dataclass(frozen=True)
class CheckpointLayout:
    """What lies in a checkpoint folder; ``convert/`` reads it.

    Attributes:
        zero_stage: of DeepSpeed.
        parameter_prefix: before the names of the training model's parameters.
        experts: how experts are put together, see ``convert/marker.py``.
        files: expressions for the names of the files that each rank writes; the group is the rank.
    """

    zero_stage: int
    parameter_prefix: str
    experts: str
    files: tuple[str, ...]

    def of_rank(self, name: str, rank: int) -> bool:
        """Whether ``rank`` writes the file ``name``."""
        return any((found := re.search(kind, name)) and int(found[1]) == rank for kind in self.files)

    def complete(self, names: list[str], world_size: int) -> int:
        """Ranks of ``world_size`` that have a file of each kind; -1 where there is a file of a rank beyond them."""
        of_kinds = [{int(found[1]) for name in names if (found := re.search(kind, name))} for kind in self.files]
        ranks = set(range(world_size))
        return -1 if any(found - ranks for found in of_kinds) else len(ranks.intersection(*of_kinds))

    def marker(self, experts_per_shard: int, expert_parallel_size: int) -> dict[str, Any]:
        """The marker's keys that conversion and resume read the folder by."""
        spread = {} if expert_parallel_size == 1 else {"parallel_size": expert_parallel_size}
        return {
            "zero_stage": self.zero_stage,
            "parameter_prefix": self.parameter_prefix,
            "experts": {"layout": self.experts, "experts_per_shard": experts_per_shard} | spread,
        }


@dataclass(frozen=True)
class ProcessMemory:
    """Bytes of one rank's process beside model, optimizer and activations, which the plan adds up.

    Attributes:
        cuda_host: resident size of a rank with a GPU: libraries, driver mappings, NCCL's host side.
        cpu: before the model on CPU, measured by the run that docs/planning.md names.
        cpu_later: what the libraries take later: compiled kernels, buffers, objects; measured by the same run.
        cpu_kept: freed memory that glibc keeps, once it is flat: blocks below its 32 MiB threshold leave gaps.
    """

    cuda_host: float
    cpu: float
    cpu_later: float
    cpu_kept: float


@dataclass(frozen=True)
class Engine:
    """One row.

    Attributes:
        package: the engine's subpackage.
        environment: software environment that its ranks and ``train.py`` run in.
    """

    name: str
    package: str
    environment: str
    checkpoint: CheckpointLayout
    memory: ProcessMemory

    @property
    def worker(self) -> str:
        """Module that torchrun starts."""
        return f"{self.package}.worker"

    @property
    def imports(self) -> str:
        """Module that, run with the accelerator and further modules as words, imports all that its ranks do."""
        return f"{self.package}.imports"

    @property
    def config(self) -> ModuleType:
        """The module that makes what the ranks are told."""
        return importlib.import_module(f"{self.package}.config")


XTUNER = Engine(
    name="xtuner",
    package="deepseek_sft.training.xtuner_engine",
    environment="train",
    checkpoint=CheckpointLayout(
        zero_stage=3,
        parameter_prefix="llm.",
        experts="w1w3_w2",
        files=(r"zero_pp_rank_(\d+)_mp_rank_00_optim_states", r"zero_pp_rank_(\d+)_mp_rank_00_model_states"),
    ),
    memory=ProcessMemory(cuda_host=3.0 * GIB, cpu=0.53 * GIB, cpu_later=0.13 * GIB, cpu_kept=0.75 * GIB),
)
ENGINES = {engine.name: engine for engine in (XTUNER,)}
