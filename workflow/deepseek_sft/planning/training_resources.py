"""What a profile gives to training, from the resources of its rule."""

import re
from typing import Any

from ..errors import BadInputError
from ..slurm.sbatch import Allocation

KEYS = ("nodes", "gres", "gpus_per_node", "mem_mb", "runtime", "slurm_extra")


def read_resources(stated: dict[str, Any]) -> dict[str, Any]:
    """Nodes, GPUs per node, memory, time limit and signal lead from Snakemake's names for them.

    Args:
        stated: resources that the profile or the command line gives; what is absent is not known and not judged.

    Raises:
        BadInputError: an unknown name, or no positive whole number where one belongs.
    """
    if unknown := sorted(set(stated) - set(KEYS)):
        raise BadInputError(f"--resources: unknown {', '.join(unknown)}", f"known: {', '.join(KEYS)}")
    found = {}
    for key in ("nodes", "gpus_per_node", "mem_mb", "runtime"):
        if (value := stated.get(key)) is not None:
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise BadInputError(f"--resources: {key} must be a positive whole number, found {value!r}")
            found[key] = value
    if gpus := Allocation(gres=stated.get("gres") or "").gpus_per_node():
        found.setdefault("gpus_per_node", gpus)
    for key in ("gres", "slurm_extra"):  # to name the GPU's type, and to keep the other options beside a new signal
        if stated.get(key):
            found[key] = str(stated[key])
    if match := re.search(r"--signal[= ]\S*@(\d+)", stated.get("slurm_extra") or ""):
        found["signal_lead_s"] = int(match[1])
    return found
