"""Names of Slurm jobs: after the experiment, so that several ones are told apart in squeue.

Snakemake's Slurm plugin gives all jobs of one start the same name, by which it asks for them, and the rule in the
comment; a script by hand is named after experiment and stage. `squeue -o "%i %j %k"` shows both.
"""

import re
from typing import Any

LONGEST = 50  # letters of the experiment's name


def prefix(experiment: str) -> str:
    """What the names of an experiment's jobs begin with: letters, digits, ``_`` and ``-`` only."""
    return re.sub(r"[^A-Za-z0-9_-]", "-", experiment)[:LONGEST]


def by_hand(experiment: str, stage: str) -> str:
    """Name of the job of a script that is submitted by hand, or by the target ``serve``."""
    return f"{prefix(experiment)}_{stage}"


def name_jobs(workflow: Any, experiment: str) -> None:
    """Put the experiment in front of the name that the plugin has chosen for all jobs of this start.

    The plugin's own prefix (``slurm-jobname-prefix``) belongs to a profile, which experiments share; it stays in front.
    """
    executor = workflow.scheduler._executor
    name = getattr(executor, "run_uuid", None)
    if name and f"{prefix(experiment)}_" not in name:
        first, separator, rest = name.rpartition("_")
        executor.run_uuid = f"{first}{separator}{prefix(experiment)}_{rest}"
