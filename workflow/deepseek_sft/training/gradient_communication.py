"""In what dtype gradients are summed over the ranks.

`train.gradient_communication_dtype: null` is settled when a run begins and written into its ``settings.json``: float32
for new runs. A run that was begun before the key existed goes on as DeepSpeed does by itself: in the model's dtype.
"""

import dataclasses
from pathlib import Path

from .. import json_files
from ..errors import BadInputError
from . import checkpoints
from .settings import Settings

NEW = "float32"
NAMES = {"float32": "fp32", "bfloat16": "bf16"}  # ours → DeepSpeed's
KEY = "gradient_communication_dtype"


def settle(chosen: Settings, run: Path, run_id: str) -> Settings:
    """``chosen`` with the dtype of this run, the same on every node and at every start.

    Raises:
        BadInputError: the run's ``settings.json`` cannot be read, so that its dtype is not known.
    """
    if chosen.gradient_communication_dtype is not None:
        return chosen
    path = run / "settings.json"
    try:
        kept = json_files.load(path)["settings"].get(KEY) or chosen.dtype
        if kept not in NAMES:
            raise ValueError(f"{KEY} is {kept!r}")
    except FileNotFoundError:
        kept = NEW if checkpoints.newest(run, run_id) is None else chosen.dtype
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInputError(
            f"{path} cannot be read: {error}; in what dtype this run sums gradients over its ranks is not known",
            f"restore it, or set train.{KEY} (which begins a new run)",
        ) from None
    return dataclasses.replace(chosen, **{KEY: kept})


def of_deepspeed(settings: Settings) -> dict[str, str]:
    """DeepSpeed's key; none where it would say the model's dtype, which is its default."""
    if settings.gradient_communication_dtype in (None, settings.dtype):
        return {}
    return {"communication_data_type": NAMES[settings.gradient_communication_dtype]}
