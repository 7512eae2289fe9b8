"""Environments of one's own, and copies of the locked ones on the nodes."""

from collections.abc import Iterator
from typing import Literal

from .field_types import Named, Text, matching, section, setting

Absolute = matching("^/", "a path that begins with /")
Seen = matching(
    "^/[^:,]*(:/[^:,]*(:(ro|rw))?)?$", "SOURCE, SOURCE:TARGET or SOURCE:TARGET:ro, of paths that begin with /"
)
Option = matching("^--?[A-Za-z]", "an option such as --name=value")
# Of srun, and the workflow's own: they follow from the profile.
DECIDED = {"nodes", "ntasks", "ntasks-per-node", "nodelist", "exclude", "overlap", "exclusive", "cpus-per-task", "gres"}
DECIDED |= {"gpus", "gpus-per-node", "mem", "jobid", "kill-on-bad-exit", "label", "chdir", "output", "error", "time"}


@section
class Container:
    runtime: Literal["apptainer", "podman"]
    """What starts it. For Pyxis see `srun`."""
    image: Named
    """Apptainer: a .sif file, a folder, or a name such as `docker://…`. podman: a name that every node's podman knows,
    or the folder of an unpacked image."""
    mounts: tuple[Seen, ...] = ()
    """Folders of the node that it sees, `SOURCE[:TARGET[:ro]]`: the project, results, the base, all under the paths
    that they have outside."""
    options: tuple[Option, ...] = ()
    """Further options of `apptainer exec` or `podman run`."""


@section
class Own:
    python: Text
    """Interpreter to run; with a container, the one inside."""
    cuda_compat: Text | None = setting(None, later=True)
    """Folder with NVIDIA's forward-compatibility libcuda.so.1 (package cuda-compat-13-0), put first in LD_LIBRARY_PATH:
    for data-centre GPUs whose driver is older than the environment's CUDA wants. Preflight checks its version. With the
    locked environment write `python: .envs/train-cuda/bin/python`."""
    activate: Text = ""
    """Shell line run before it, such as `module load cuda/12.6`; with a container, outside of it."""
    srun: tuple[Option, ...] = setting((), later=True)
    """Options of srun for each step of the stage, one word each: `--mpi=pmix`, `--network=…`; with Pyxis
    `--container-image=…` and `--container-mounts=…` (docs/containers.md)."""
    container: Container | None = setting(None, later=True)
    """A container that Apptainer or podman starts (docs/containers.md)."""

    def problems(self) -> Iterator[str]:
        for option in self.srun:
            name, _, value = option.lstrip("-").partition("=")
            if not option.startswith("--") or any(letter.isspace() for letter in name):
                yield f"srun: {option!r} is not one word --name or --name=value"
            elif name in DECIDED:
                yield f"srun: --{name} is the workflow's: it follows from the profile's resources"
            elif name in ("container-image", "container-mounts", "container-workdir") and not value:
                yield f"srun: {option}: write --{name}=…"
            elif name == "container-mounts":
                yield from (f"srun: --{name}: {text!r}: give a path that begins with /" for text in _relative(value))
        images = self._images()
        if len(images) > 1:
            yield "srun: --container-image stands there twice"
        if images and self.container:
            yield "container: srun starts one already (--container-image)"
        if (images or self.container) and self.cuda_compat:
            yield "cuda_compat: is set outside of the container; put those libraries into the image"

    def _images(self) -> list[str]:
        return [option for option in self.srun if option.startswith("--container-image=")]

    @property
    def contained(self) -> bool:
        """Whether it runs in a container."""
        return self.container is not None or bool(self._images())


@section
class Local:
    train: Literal["tar", "squashfs"] | None = None
    """One archive of the environment: `tar` is unpacked, `squashfs` mounted where the nodes can, else unpacked; null
    runs it where it was built."""
    folder: Absolute = "/tmp"
    """Folder on the nodes' own disks."""


@section
class Envs:
    train: Own | None = None
    """Environment of this stage: `python` and, where needed, a line that activates it."""
    serve: Own | None = None
    """Environment of this stage: `python` and, where needed, a line that activates it."""
    evaluate: Own | None = setting(None, later=True)
    """Environment with lm-eval; only its `python` is used: where `serve` runs in a container, one inside it."""
    local: Local = setting(Local())
    """Training's locked environment and our code on the nodes' own disks, brought there by each job: a start then asks
    the shared folder for little more than data (docs/cluster.md). No key of it re-runs anything."""

    def problems(self) -> Iterator[str]:
        if self.evaluate and (self.evaluate.container or self.evaluate.srun or self.evaluate.activate):
            yield "evaluate: lm-eval is started by what serves, in its container; only `python` counts here"
        if self.local.train and self.train:
            yield "local.train: copies the locked environment; with one of your own in `envs.train` leave it null"


def _relative(mounts: str) -> list[str]:
    return [text for text in mounts.split(",") if not text.startswith("/")]
