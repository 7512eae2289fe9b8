"""sbatch scripts from templates, rendered from the very resources of the job that runs them."""

import dataclasses
import re
import shlex
import subprocess
from typing import Any

import jinja2

from . import templates
from .errors import BadInputError


def _field(default: Any, meaning: str) -> Any:
    return dataclasses.field(default=default, metadata={"meaning": meaning})


@dataclasses.dataclass(frozen=True)
class Allocation:
    """What Slurm gives to one job; each field is an option of render_sbatch.py as well."""

    nodes: int = _field(1, "number of nodes; one task runs on each")
    cpus_per_task: int = _field(1, "CPUs of each node's task")
    mem_mb: int = _field(1000, "memory per node in MB")
    runtime: int = _field(60, "time limit in minutes")
    partition: str = _field("", "partition, empty for the cluster's default")
    gres: str = _field("", "generic resources per node, such as gpu:8")
    extra: str = _field("", "further sbatch options, such as --signal=USR1@3600")
    account: str = _field("", "account to charge, empty for the user's default")

    def __post_init__(self) -> None:
        for name in ("nodes", "cpus_per_task", "mem_mb", "runtime"):
            if getattr(self, name) < 1:
                raise BadInputError(f"allocation: {name} is {getattr(self, name)}, expected at least 1")
        warning = re.search(r"--signal[= ]\S*@(\d+)", self.extra)
        if warning and int(warning[1]) >= self.runtime * 60:
            raise BadInputError(
                f"allocation: {warning[0]} comes {warning[1]} s before the end, but the job has only "
                f"{self.runtime} minutes: it would be told to stop as soon as it starts",
                "raise runtime or lower the seconds of --signal (profile, set-resources)",
            )

    def gpus_per_node(self) -> int | None:
        """GPUs that ``gres`` gives to each node; None where it asks for none."""
        for item in self.gres.split(","):
            kind, *rest = item.split(":")
            if kind == "gpu":
                return int(rest[-1]) if rest and rest[-1].isdigit() else 1
        return None

    def arguments(self) -> str:
        """The allocation as arguments of render_sbatch.py."""
        return shlex.join(f"{option(name)}={value}" for name, value in dataclasses.asdict(self).items())


def option(field: str) -> str:
    """Option of render_sbatch.py for a field of Allocation."""
    return f"--{field.replace('_', '-')}"


def render(stage: str, allocation: Allocation, context: dict[str, Any]) -> str:
    """The sbatch script of ``stage`` (template ``<stage>.sbatch.j2``).

    Args:
        stage: the rule's name.
        allocation: nodes, CPUs, memory, time of the job.
        context: what the template names: project, experiment, results, logs, python, activate, environment, ….

    Raises:
        BadInputError: the template names something that the context lacks.
    """
    template = templates.load(f"{stage}.sbatch.j2", sh=_quoted)
    try:
        return template.render(stage=stage, job=allocation, **context)
    except jinja2.UndefinedError as error:
        raise BadInputError(f"template {stage}.sbatch.j2: {error}") from None


def _quoted(value: Any) -> str:
    return shlex.quote(str(value))


def partition_nodes(partition: str) -> int | None:
    """Nodes of a partition as ``sinfo`` counts them; None where sinfo does not answer or the partition is unknown."""
    command = ["sinfo", "--noheader", "--format=%D", *(["--partition", partition] if partition else [])]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    counts = [int(word) for word in answer.stdout.split() if word.isdigit()]
    return sum(counts) if answer.returncode == 0 and counts else None


def node_memory_mb(partition: str, nodes: int = 1) -> int | None:
    """Memory that each of ``nodes`` nodes of a partition has for jobs, in MB; None where sinfo does not say it."""
    command = ["sinfo", "--noheader", "--Node", "--format=%N %m", *(["--partition", partition] if partition else [])]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    pairs = [line.split() for line in answer.stdout.splitlines() if len(line.split()) == 2]
    found = sorted({name: int(size) for name, size in pairs if size.isdigit()}.values(), reverse=True)
    return found[nodes - 1] if answer.returncode == 0 and len(found) >= nodes else None


def check_memory(rule: str, allocation: Allocation) -> str | None:
    """A sentence on what is wrong when a rule asks for more memory than its nodes have, else None."""
    available = node_memory_mb(allocation.partition, allocation.nodes)
    if available is None or available < 1000 or allocation.mem_mb <= available:  # Slurm says 1 where it was not told
        return None
    where = f"partition {allocation.partition}" if allocation.partition else "the cluster"
    several = f"{allocation.nodes} nodes" if allocation.nodes > 1 else "a node"
    return (
        f"rule {rule} asks for mem_mb: {allocation.mem_mb}, but {several} of {where} have at most {available}: no node "
        f"could ever run it\n"
        f"  fix: in the profile's config.yaml write\n"
        f"    set-resources:\n      {rule}:\n        mem_mb: {available}   # or less"
    )


def check_nodes(rule: str, allocation: Allocation) -> str | None:
    """A sentence on what is wrong when a rule asks for more nodes than its partition has, else None."""
    available = partition_nodes(allocation.partition)
    if available is None or allocation.nodes <= available:
        return None
    where = f"partition {allocation.partition}" if allocation.partition else "the cluster"
    return (
        f"rule {rule} asks for nodes: {allocation.nodes}, but {where} has {available}\n"
        f"  fix: in the profile's config.yaml write\n"
        f"    set-resources:\n      {rule}:\n        nodes: {available}   # or less"
    )
