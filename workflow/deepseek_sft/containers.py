"""Containers that run the stages of an environment: how each runtime is started, and what it must be shown.

Pyxis is a plugin of srun, so its container is options of srun; Apptainer and podman are words before the Python. What a
stage needs of Slurm is asked outside, by the batch script (workflow/templates/macros.sbatch.j2): in the container there
need be neither Slurm's programs nor munge's socket. Pure but for looking at paths.
"""

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

IMAGE, MOUNTS, FOLDER, VARIABLES = (
    f"--container-{word}=" for word in ("image", "mounts", "workdir", "env")
)  # of Pyxis
OWN_VARIABLES = ("PYTHONPATH", "DEEPSEEK_SFT_ENDED_JOBS", "DEEPSEEK_SFT_NODE_ADDRESSES")
ELSEWHERE = re.compile(r"^(?:[a-z][a-z0-9+.-]*:|containers-storage)|[#@]")  # docker://…, oci-archive:…, nvcr.io#…


@dataclass(frozen=True)
class Mount:
    """A folder of the node, and where it is seen in the container."""

    source: str
    target: str
    read_only: bool = False

    @classmethod
    def read(cls, text: str) -> "Mount":
        """``SOURCE[:TARGET[:FLAGS]]``, as Pyxis, Apptainer and podman write it."""
        source, _, rest = text.partition(":")
        target, _, flags = rest.partition(":")
        return cls(source, target or source, "ro" in re.split(r"[,+]", flags))

    def text(self) -> str:
        return f"{self.source}:{self.target}" + (":ro" if self.read_only else "")


@dataclass(frozen=True)
class Container:
    """A container as the configuration describes it.

    Attributes:
        runtime: ``pyxis``, ``apptainer`` or ``podman``.
        image: file, folder, or a name that the runtime knows.
        mounts: what it is shown of the node.
        options: further options of the runtime; of srun for Pyxis.
        key: configuration key of the image, for messages.
        mounts_key: and of the mounts.
    """

    runtime: str
    image: str
    mounts: tuple[Mount, ...]
    options: tuple[str, ...]
    key: str
    mounts_key: str

    def image_path(self) -> Path | None:
        """The image where it is a file or folder; None where its name says nothing here, such as one of a registry."""
        text = self.image
        if text.startswith(("/", "./", "../")):
            return Path(text)
        if self.runtime != "apptainer" or ELSEWHERE.search(text):
            return None
        return Path(text)

    def unseen(self, paths: Iterable[tuple[str, str, bool]]) -> list[str]:
        """What is wrong with the mounts, one sentence for each path that the container would not see as it is outside.

        Args:
            paths: key, path, and whether something is written there.
        """
        found = []
        for key, path, written in paths:
            for place in dict.fromkeys((os.path.abspath(path), os.path.realpath(path))):  # noqa: PTH100  links stay
                if why := self._unseen(place, written):
                    link = "" if place == os.path.abspath(path) else f", where {path} leads,"  # noqa: PTH100
                    found.append(f"{self.mounts_key}: {key}: {place}{link} {why}")
                    break
        return found

    def _unseen(self, place: str, written: bool) -> str:
        over = [mount for mount in self.mounts if Path(place).is_relative_to(os.path.normpath(mount.target))]
        if not over:
            return "is not seen in the container"
        nearest = max(over, key=lambda mount: len(Path(mount.target).parts))
        source = Path(nearest.source, Path(place).relative_to(os.path.normpath(nearest.target)))
        if os.path.realpath(source) != os.path.realpath(place):
            return f"would be {source} in the container ({nearest.text()})"
        return f"is written, and {nearest.text()} is read-only" if written and nearest.read_only else ""


def of(kind: str, own: dict[str, Any] | None) -> Container | None:
    """The container of the stages of one kind, from ``envs.<kind>``; None where they run on the nodes as they are."""
    own = own or {}
    srun = tuple(own.get("srun") or ())
    if given := own.get("container"):
        mounts = tuple(Mount.read(text) for text in given["mounts"])
        key = f"envs.{kind}.container"
        return Container(
            given["runtime"], given["image"], mounts, tuple(given["options"]), f"{key}.image", f"{key}.mounts"
        )
    if image := _value(srun, IMAGE):
        mounts = tuple(Mount.read(text) for text in (_value(srun, MOUNTS) or "").split(",") if text)
        key = f"envs.{kind}.srun"
        return Container("pyxis", image, mounts, srun, key, f"{key}: --container-mounts")
    return None


def unjudged(envs: dict[str, Any]) -> list[str]:
    """A sentence for each image that is no file or folder: nothing here can say whether it is there."""
    found = [one for kind in ("train", "serve") if (one := of(kind, envs.get(kind)))]
    return [
        f"{one.key}: whether {one.image} is there cannot be told here: every node must have it or be able to fetch it"
        for one in found
        if one.image_path() is None
    ]


def srun_options(own: dict[str, Any] | None, project: str, variables: Iterable[str]) -> list[str]:
    """Options of srun for the steps of a stage; for Pyxis with what our commands need: their folder, their variables.

    Args:
        own: ``envs.<kind>``.
        project: folder in which the commands run.
        variables: names that a stage exports; an image that sets one of them must not win.
    """
    srun = list((own or {}).get("srun") or ())
    if not _value(srun, IMAGE):
        return srun
    names = dict.fromkeys([*(_value(srun, VARIABLES) or "").split(","), *OWN_VARIABLES, *sorted(variables)])
    srun = [option for option in srun if not option.startswith(VARIABLES)]
    if not _value(srun, FOLDER):
        srun.append(FOLDER + project)
    return [*srun, VARIABLES + ",".join(name for name in names if name)]


def launcher(own: dict[str, Any] | None, project: str, accelerator: str) -> list[str]:
    """Words before the Python of a stage whose container Apptainer or podman starts; none otherwise."""
    container = of("", own)
    if container is None or container.runtime == "pyxis":
        return []
    if container.runtime == "apptainer":
        gpus = ["--nv"] if accelerator == "cuda" else []
        bind = ["--bind", ",".join(mount.text() for mount in container.mounts)] if container.mounts else []
        return ["apptainer", "exec", *gpus, *bind, "--pwd", project, *container.options, container.image]
    # Shared memory, network and host name are the node's: NCCL, addresses and locks count on it. Without cgroups
    # of its own the container stays in those of its Slurm step, which end it with the job; podman wants its processes
    # numbered apart then, and --init hands signals on and takes up orphans.
    host = [f"--{space}=host" for space in ("ipc", "network", "uts")]
    words = [
        "podman",
        "run",
        "--rm",
        "--init",
        "--env-host",
        *host,
        "--cgroups=disabled",
        "--security-opt=label=disable",
    ]
    if accelerator == "cuda":
        words.append("--device=nvidia.com/gpu=all")
    words += [f"--volume={mount.text()}" for mount in container.mounts]
    words += [f"--workdir={project}", *container.options]
    path = container.image_path()
    words += ["--rootfs", f"{container.image}:O"] if path and path.is_dir() else [container.image]
    # podman starts it with the default action for USR1, which is death until Python listens.
    return [*words, "sh", "-c", "trap '' USR1; exec \"$@\"", "container"]


def _value(options: Sequence[str], name: str) -> str | None:
    return next((option.removeprefix(name) for option in reversed(options) if option.startswith(name)), None)
