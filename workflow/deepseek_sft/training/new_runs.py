"""Defaults of keys that came after runs had begun: new runs get them, a begun one goes on as it was.

Such a key is ``null`` in the configuration, is settled when a run begins, and stands in its ``settings.json`` from then
on. A run without it there did what was done before the key existed.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .. import json_files
from ..errors import BadInputError
from ..settings import field_types, reading
from . import checkpoints
from .settings import Settings


@dataclasses.dataclass(frozen=True)
class Default:
    """What ``null`` means.

    Attributes:
        new: for new runs.
        before: for runs that are older than the key, from their settings.
        what: it decides, for an error.
    """

    new: Any
    before: Callable[[Settings], Any]
    what: str


DEFAULTS = {
    # DeepSpeed's own choice was the model's dtype.
    "gradient_communication_dtype": Default(
        "float32", lambda chosen: chosen.dtype, "in what dtype it sums gradients over its ranks"
    ),
    "deal_rows": Default("cost", lambda _: "order", "how it deals the rows of a step"),
    "zero_thresholds": Default("shard", lambda _: "deepspeed", "how much it gathers ahead"),
}


def settle(chosen: Settings, run: Path, run_id: str) -> Settings:
    """``chosen`` with the values of this run, the same on every node and at every start.

    Raises:
        BadInputError: the run's ``settings.json`` cannot be read, so that they are not known.
    """
    open_keys = {key: default for key, default in DEFAULTS.items() if getattr(chosen, key) is None}
    if not open_keys:
        return chosen
    path = run / "settings.json"
    values = {key: default.before(chosen) for key, default in open_keys.items()}
    try:
        kept = json_files.load(path)["settings"]
        for key in open_keys:
            if kept.get(key) is not None:
                values[key] = reading.value(field_types.keys(Settings)[key].hint, kept[key])
    except FileNotFoundError:
        if checkpoints.newest(run, run_id) is None:
            values = {key: default.new for key, default in open_keys.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        unknown = " and ".join(default.what for default in open_keys.values())
        names = " and ".join(f"train.{key}" for key in open_keys)
        raise BadInputError(
            f"{path} cannot be read: {error}; this run has begun, and {unknown} is not known",
            f"restore it, or set {names} (which begins a new run)",
        ) from None
    return dataclasses.replace(chosen, **values)
