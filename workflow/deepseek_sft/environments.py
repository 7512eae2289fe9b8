"""The software environment of each stage: which one it is, its Python, what activates it, what of it lies on the nodes.

What differs between a locked environment, one of the user's and its copy on a node's disk is said here; rules,
``render_sbatch.py`` and the templates take it as it comes.
"""

import json
import shlex
import sys
from dataclasses import dataclass, field
from typing import Any

from . import containers, stages
from .containers import Container
from .engines import ENGINES
from .local_copies import LocalCopies, copies_of

# Kinds beside the workflow's own: built when jobs start, or the user's (``envs.<kind>``).
CHOSEN = tuple(dict.fromkeys(stage.environment for stage in stages.ROWS if stage.environment != "workflow"))

EVALUATE = "evaluate"  # beside them: lm-eval, started by what runs in `serve`


@dataclass(frozen=True)
class Environment:
    """What runs the stages of one kind.

    Attributes:
        locked: name of the locked environment that does unless the user has one: ``train-cuda``, ``serve-cpu``.
        python: interpreter.
        activate: shell line to run before it, or nothing.
        own: whether it is the user's.
        copies: what runs from the nodes' own disks; None where nothing does.
        archive: the form in which it is brought there.
        container: the container in which the user's runs; None where it runs on the nodes as they are.
        step: what starts it there, keys ``srun`` and ``container`` of ``envs.<kind>``; empty where nothing is said.
    """

    locked: str
    python: str
    activate: str = ""
    own: bool = False
    copies: LocalCopies | None = None
    archive: str | None = None
    container: Container | None = None
    step: dict[str, Any] = field(default_factory=dict)

    @property
    def built(self) -> list[str]:
        """Files that say that the locked environment is built; none where the user's is taken."""
        return [] if self.own else [f".envs/{self.locked}.json"]

    @property
    def files(self) -> list[str]:
        """All that is made where the network is, before nodes are asked for."""
        return [*self.built, *([self.copies.archive] if self.copies else [])]

    def words(self) -> list[str]:
        """What render_sbatch.py is told."""
        words = ["--python", self.python, f"--activate={self.activate}"]
        if self.step:
            words.append(f"--step={json.dumps(self.step)}")
        if self.copies:
            copies = self.copies
            words += ["--archive", copies.archive, "--environment", copies.environment, "--code", copies.code]
        return words


def of(kind: str, config: dict[str, Any]) -> Environment:
    """The environment of the stages of one kind: ``workflow``, one of ``CHOSEN``, or ``EVALUATE``."""
    if kind == "workflow":
        return Environment(kind, sys.executable)
    accelerator, local = config["accelerator"], config["envs"]["local"]
    if kind == "train":
        name = ENGINES[config["train"]["engine"]].environment
        locked = f"{name}-cuda" if accelerator == "cuda" else name
    elif kind == EVALUATE:
        locked = kind
    else:
        locked = f"{kind}-{accelerator}"
    own = config["envs"].get(kind) or {}
    python, archive = own.get("python", f".envs/{locked}/bin/python"), local.get(kind)
    copies = copies_of(locked, archive, local["folder"]) if archive else None
    step = {key: own[key] for key in ("srun", "container") if own.get(key)}
    activate, container = _activate(own), containers.of(kind, own)
    return Environment(
        locked, copies.python if copies else python, activate, bool(own), copies, archive, container, step
    )


def _activate(own: dict[str, Any]) -> str:
    line, folder = own.get("activate", ""), own.get("cuda_compat")
    if not folder:
        return line
    first = f"export LD_LIBRARY_PATH={shlex.quote(folder)}${{LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}}"
    return f"{line} && {first}" if line else first
