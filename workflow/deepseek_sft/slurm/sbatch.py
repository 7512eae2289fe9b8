"""sbatch scripts from templates, rendered from the very resources of the job that runs them."""

import dataclasses
import re
import shlex
from typing import Any

import jinja2

from .. import jinja_templates
from ..errors import BadInputError
from ..site import notation
from ..site.answers import Wanted
from . import job_names, profile_values

SIGNAL_S = 60  # of `--signal` without a time (sbatch(1))
LATER = ("constraint", "qos")  # fields that params of begun experiments do not have


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
    constraint: str = _field("", "features that the nodes must have, such as h100")
    qos: str = _field("", "quality of service, empty for the user's default")

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
        flags, colon, rest = profile_values.from_extra(self.extra, "--signal").partition(":")
        if colon and "B" in flags.upper():
            raise BadInputError(
                f"allocation: --signal={flags}:{rest} reaches the batch shell alone and ends it: nothing is saved",
                f"write --signal={rest} (profile, set-resources)",
            )

    def gpus_per_node(self) -> int | None:
        """GPUs that ``gres`` gives to each node; None where it asks for none."""
        return sum(count for (name, _), count in notation.gres(self.gres).items() if name == "gpu") or None

    def warning_s(self) -> int | None:
        """Seconds before the time limit at which Slurm sends USR1 to the job's steps; None where it does not."""
        asked = profile_values.from_extra(self.extra, "--signal")
        found = re.fullmatch(r"(?:R:)?(?:SIG)?(?:USR1|10)(?:@(\d+))?", asked, re.IGNORECASE)
        return int(found[1] or SIGNAL_S) if found else None

    def options(self) -> list[str]:
        """What ``extra`` holds, one option each, as lines of a script take them."""
        return [profile_values.quoted(option) for option in profile_values.options(self.extra)]

    def wanted(self) -> Wanted:
        """The same as what a site is asked for."""
        return Wanted(
            nodes=self.nodes,
            cpus=self.cpus_per_task,
            mem_mb=self.mem_mb,
            runtime=self.runtime,
            gres=self.gres,
            partition=self.partition,
            account=self.account,
            qos=self.qos or profile_values.from_extra(self.extra, "--qos", "-q"),
            constraint=self.constraint,
            reservation=profile_values.from_extra(self.extra, "--reservation"),
            exclude=profile_values.from_extra(self.extra, "--exclude", "-x"),
            nodelist=profile_values.from_extra(self.extra, "--nodelist", "-w"),
        )

    def arguments(self) -> str:
        """The allocation as arguments of render_sbatch.py; without ``LATER`` fields that say nothing."""
        values = dataclasses.asdict(self).items()
        return shlex.join(f"{option(name)}={value}" for name, value in values if value or name not in LATER)


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
    template = jinja_templates.load(f"{stage}.sbatch.j2", sh=_quoted)
    try:
        name = job_names.by_hand(context.get("experiment", ""), stage)
        defaults = {"local": None, "spare_nodes": 0, "srun": [], "launcher": [], "contained": False, "evaluated": False}
        found = defaults | context
        if "python" in found:
            found = {"host_python": found["python"]} | found | {"python": [*found["launcher"], found["python"]]}
        return template.render(stage=stage, job=allocation, job_name=name, **found)
    except jinja2.UndefinedError as error:
        raise BadInputError(f"template {stage}.sbatch.j2: {error}") from None


def _quoted(value: Any) -> str:
    """A word for the shell, or several."""
    return shlex.join(map(str, value)) if isinstance(value, list) else shlex.quote(str(value))
