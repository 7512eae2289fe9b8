"""A profile's resources as people and sinfo write them: understood, or refused with the spelling that works."""

import re
import shlex
from types import SimpleNamespace
from typing import Any

from ..errors import BadInputError
from ..site import notation

# Keys that nothing here reads, or that mean something else than they seem to → what to write, and why.
INSTEAD = {
    "gpu": ("gres", "it counts for the whole job; gres counts on each node, such as gres: gpu:8"),
    "gpus": ("gres", "nothing reads it; gres counts on each node, such as gres: gpu:8"),
    "gpus_per_node": ("gres", "nothing reads it; write for instance gres: gpu:8"),
    "gpu_model": ("gres", "the type stands in gres, such as gpu:h100:8"),
    "cpus_per_gpu": ("cpus_per_task", "one task runs on each node and gets all of its CPUs"),
    "cpus": ("cpus_per_task", "nothing reads it"),
    "partition": ("slurm_partition", "nothing reads it"),
    "account": ("slurm_account", "nothing reads it"),
    "slurm_qos": ("qos", "nothing reads it"),
    "slurm_constraint": ("constraint", "nothing reads it"),
    "features": ("constraint", "nothing reads it"),
    "time": ("runtime", "nothing reads it"),
    "walltime": ("runtime", "nothing reads it"),
    "time_min": ("runtime", "nothing reads it"),
    "extra": ("slurm_extra", "nothing reads it"),
}
# What the Slurm plugin calls an option that it sets itself → the resource for it.
MANAGED = {
    "account": "slurm_account",
    "partition": "slurm_partition",
    "memory": "mem_mb",
    "memory per CPU": "mem_mb",
    "CPUs per task": "cpus_per_task",
    "CPUs per GPU": "cpus_per_task",
    "runtime/time limit": "runtime",
    "node constraints": "constraint",
    "quality of service": "qos",
    "number of nodes": "nodes",
    "cluster specification": "clusters",
    "generic resources (GRES)": "gres",
    "GPU allocation": "gres",
}
OWN_KEY = {
    "--exclude": "exclude",
    "-x": "exclude",
    "--nodelist": "nodelist",
    "-w": "nodelist",
    "--reservation": "reservation",
}


class _Resources(dict):
    """As the plugin reads a job's resources, by key and by attribute."""

    __getattr__ = dict.__getitem__


def understood(name: str, raw: Any, key: str) -> Any:
    """The value of a resource in the form that Snakemake and its plugin take; None where it is one already.

    Args:
        name: the resource, such as ``runtime``.
        raw: as it is written.
        key: where it is written, for messages.

    Raises:
        BadInputError: it means nothing, or nothing that the plugin can pass on.
    """
    if name == "runtime" and isinstance(raw, str):
        if re.fullmatch(r"\d+-\d+(:\d+){0,2}|\d+:\d+:\d+", raw.strip("'\" ")):
            return notation.minutes(raw.strip("'\" "))
        if re.search(r"\d\s*[a-z]+\s*\d", raw) or raw.strip("'\" ").lower() in ("unlimited", "infinite"):
            raise BadInputError(f"{key}: {raw} is no time", "write minutes (90), one unit (24h, 4d), or d-hh:mm:ss")
    if name == "gres" and isinstance(raw, str) and (plain := notation.gres_without_sockets(raw)) != raw:
        raw = plain
        _check_gres(raw, key)
        return raw
    if name == "gres" and isinstance(raw, str):
        _check_gres(raw, key)
    if name == "mem_mb" and raw in (0, "0"):
        raise BadInputError(
            f"{key}: 0 is all memory of a node to Slurm, but the plugin leaves it out, and the plan needs a number",
            "write the memory of a node in MB: `sinfo -o '%P %m'` prints it",
        )
    return None


def _check_gres(gres: str, key: str) -> None:
    """Refuse what the plugin would refuse, hours later."""
    from snakemake_executor_plugin_slurm.utils import set_gres_string
    from snakemake_interface_common.exceptions import WorkflowError

    if not gres:
        return
    try:
        set_gres_string(SimpleNamespace(resources=_Resources(gres=gres)))
    except WorkflowError:
        gpus = [item for item in notation.split(gres) if item.startswith("gpu")]
        if len(notation.split(gres)) > 1:
            fix = f"write one kind, {gpus[0]!r}" if gpus else "write one kind"
            raise BadInputError(f"{key}: {gres}: Snakemake's Slurm plugin passes on one kind only", fix) from None
        count = re.search(r":(\d+)$", gres)
        fix = "write gpu:8 or gpu:h100:8; letters, digits, _ and . make a type"
        if count and gpus:
            fix = f"write gpu:{count[1]}, and choose the kind of node by constraint (`sinfo -o '%P %f'`)"
        raise BadInputError(f"{key}: {gres}: Snakemake's Slurm plugin does not pass this on", fix) from None


def options(extra: str) -> list[str]:
    """The options in a line, each with its value: ``--signal USR1@60`` is one, quotes are resolved.

    Raises:
        BadInputError: a quote is not closed.
    """
    try:
        words = shlex.split(extra)
    except ValueError as error:
        raise BadInputError(f"slurm_extra: {extra}: {error}", "close the quote") from None
    found: list[str] = []
    for word in words:
        if word.startswith("-") or not found:
            found.append(word)
        else:
            found[-1] += f" {word}"
    return found


def name_of(option: str) -> str:
    return re.split(r"[=\s]", option, maxsplit=1)[0]


def value_of(option: str) -> str:
    parts = re.split(r"[=\s]", option, maxsplit=1)
    return parts[1] if len(parts) > 1 else ""


def from_extra(extra: str, *names: str) -> str:
    """Value of the last of these options in a line; empty without one."""
    values = [value_of(option) for option in options(extra) if name_of(option) in names]
    return values[-1] if values else ""


def with_option(extra: str, name: str, value: str) -> str:
    """A line with this option and no other of its name; without it where ``value`` is empty."""
    kept = [option for option in options(extra) if name_of(option) != name]
    return " ".join(_passable(option) for option in [*kept, *([f"{name}={value}"] if value else [])])


def quoted(option: str) -> str:
    """An option for a shell, with its name and value apart where they were apart."""
    name, value = name_of(option), value_of(option)
    if not value:
        return shlex.quote(option)
    return f"{name}={shlex.quote(value)}" if option.startswith(f"{name}=") else f"{name} {shlex.quote(value)}"


def _passable(option: str) -> str:
    """An option whose value the plugin does not mistake for one of its own: the ``-n`` of ``gpu-n``."""
    plain = quoted(option)
    if not refusals(f"{plain} "):
        return plain
    name, value = name_of(option), value_of(option)
    return f"{name}=" + "".join("'-'" if letter == "-" else shlex.quote(letter) for letter in value)


def refusals(extra: str) -> list[tuple[str, str]]:
    """(the plugin's word for it, matched text) for what the plugin refuses in a line, by its own patterns."""
    from snakemake_executor_plugin_slurm.validation import get_forbidden_slurm_options

    found = []
    for pattern, word in get_forbidden_slurm_options().items():
        if match := re.search(pattern, extra):
            found.append((word, match[0].strip()))
    return found


def check_extra(extra: str, key: str) -> None:
    """Refuse at start what the plugin refuses at submission, with the key to write instead.

    Raises:
        BadInputError: an option that has a key of its own, or a value that the plugin takes for such an option.
    """
    for word, matched in refusals(extra):
        by_name = [option for option in options(extra) if name_of(option) == matched.rstrip("=")]
        if by_name:
            value = value_of(by_name[0])
            resource = MANAGED.get(word)
            fix = f"write {resource}: {value or '…'} in its place" if resource else "leave it out"
            raise BadInputError(f"{key}: {by_name[0]}: Snakemake's Slurm plugin sets this itself", fix)
        inside = next((option for option in options(f"{extra} ") if matched.strip() in value_of(option)), extra)
        own = OWN_KEY.get(name_of(inside))
        fix = f"write {own}: {value_of(inside)} beside slurm_extra" if own else f"write '-'{matched.strip()[1:]} there"
        raise BadInputError(f"{key}: {inside}: Snakemake's Slurm plugin takes the {matched} in it for an option", fix)
