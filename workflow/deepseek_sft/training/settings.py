"""Settings of one training run, read from ``train/settings.json``; each key stands in ``settings/train.py``."""

import dataclasses
from pathlib import Path
from typing import Any

from .. import files
from ..settings import field_types, reading
from ..settings.field_types import AboveZero, section, setting
from ..settings.train import Training

# Part of the run id: raise it when a change of the training code changes what the same settings train.
CODE_VERSION = 2


@section
class Settings(Training):
    """What the configuration says about training, and the GPU's peak of the plan."""

    gpu_tflops: AboveZero | None = setting(None, operational=True)
    """Peak of dense BF16 matrix products of one GPU, in TFLOP/s; null on CPU."""

    @property
    def max_seconds(self) -> float | None:
        return None if self.max_hours is None else self.max_hours * 3600

    @property
    def stated_minutes(self) -> dict[str, float | None]:
        """Limit of each phase that the configuration gives; empty where it gives none."""
        return {} if self.hang_minutes is None else dataclasses.asdict(self.hang_minutes)

    def shaping(self) -> dict[str, Any]:
        """The settings that decide what is trained, without the operational ones and the early end."""
        values = field_types.settled(Settings, field_types.plain(self))
        return {key: value for key, value in values.items() if key not in SAME_RUN}


# Not part of the run id: the same run goes on when they change.
SAME_RUN = field_types.marked(Settings, "operational", "same_run")


def read(path: str | Path) -> Settings:
    """Read and check a settings file; what came after a run was begun may be absent from it.

    Raises:
        BadInputError: unreadable, a key missing or unknown, or a value that is not allowed.
    """
    return reading.read(Settings, path, complete=True)


def run_id(settings: Settings, base: dict[str, Any], tokens: dict[str, Any]) -> str:
    """Name of the run that these settings and inputs make.

    Args:
        base: receipt of prepare_model.
        tokens: receipt of tokenize_data.

    The inputs are known by what they were made from: rule, input fingerprints and settings of their receipts.
    Keys of topology are part of it, the world size is not; ``same_training`` finds a run that was begun under others.
    """
    return files.digest(
        {
            "code": CODE_VERSION,
            "settings": settings.shaping(),
            "base": identity(base),
            "tokens": identity(tokens),
        }
    )


def identity(receipt: dict[str, Any]) -> str:
    """Digest of what determines a receipt's result, whatever its paths, times and hosts."""
    inputs = {name: entry["fingerprint"] for name, entry in receipt["inputs"].items()}
    fingerprints = {k: v for k, v in receipt["figures"].items() if "fingerprint" in k}
    return files.digest([receipt["rule"], inputs, receipt["settings"], fingerprints], 64)
