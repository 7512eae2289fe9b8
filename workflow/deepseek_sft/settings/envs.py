"""Environments of one's own, and copies of the locked ones on the nodes."""

from collections.abc import Iterator
from typing import Literal

from .field_types import Text, matching, section, setting

Absolute = matching("^/", "a path that begins with /")


@section
class Own:
    python: Text
    """Interpreter to run."""
    cuda_compat: Text | None = setting(None, later=True)
    """Folder with NVIDIA's forward-compatibility libcuda.so.1 (package cuda-compat-13-0), put first in LD_LIBRARY_PATH:
    for data-centre GPUs whose driver is older than the environment's CUDA wants. Preflight checks its version. With the
    locked environment write `python: .envs/train-cuda/bin/python`."""
    activate: Text = ""
    """Shell line run before it, such as `module load cuda/12.6`."""


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
    """Environment with lm-eval; only its `python` is used."""
    local: Local = setting(Local())
    """Training's locked environment and our code on the nodes' own disks, brought there by each job: a start then asks
    the shared folder for little more than data (docs/cluster.md). No key of it re-runs anything."""

    def problems(self) -> Iterator[str]:
        if self.local.train and self.train:
            yield "local.train: copies the locked environment; with one of your own in `envs.train` leave it null"
