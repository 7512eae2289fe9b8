"""Defaults of keys that came after runs had begun: new runs get them, a begun one goes on as it was.

Such a key is open in the configuration (``null`` or ``auto``), is settled when a run begins, and stands in its
``settings.json`` from then on. A run without it there did what was done before the key existed.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .. import json_files
from ..errors import BadInputError
from ..expert_shards import AUTO, experts_per_shard
from ..settings import field_types, reading
from . import checkpoints
from .settings import Settings


@dataclasses.dataclass(frozen=True)
class Default:
    """What an open key means.

    Attributes:
        new: for new runs, from their settings and the model's ``config.json``.
        before: likewise for runs that are older than the key.
        what: it decides, for an error.
        open: the value under which it is open.
    """

    new: Callable[[Settings, dict[str, Any]], Any]
    before: Callable[[Settings, dict[str, Any]], Any]
    what: str
    open: str | None = None


def _of_size(chosen: Settings, config: dict[str, Any]) -> int:
    """No run is older than the word ``auto``, which is in its id."""
    return experts_per_shard(config, AUTO, chosen.expert_parallel_size)


DEFAULTS = {
    # DeepSpeed's own choice was the model's dtype.
    "gradient_communication_dtype": Default(
        lambda *_: "float32", lambda chosen, _: chosen.dtype, "in what dtype it sums gradients over its ranks"
    ),
    "deal_rows": Default(lambda *_: "cost", lambda *_: "order", "how it deals the rows of a step"),
    "zero_thresholds": Default(lambda *_: "shard", lambda *_: "deepspeed", "how much it gathers ahead"),
    "async_save": Default(lambda *_: "auto", lambda *_: "off", "when its checkpoints are written"),
    "experts_per_shard": Default(_of_size, _of_size, "how many experts share a parameter", AUTO),
}


def settle(chosen: Settings, run: Path, run_id: str, config: dict[str, Any]) -> Settings:
    """``chosen`` with the values of this run, the same on every node and at every start.

    Args:
        config: the model's ``config.json``.

    Raises:
        BadInputError: the run's ``settings.json`` cannot be read, so that they are not known.
    """
    open_keys = {key: default for key, default in DEFAULTS.items() if getattr(chosen, key) == default.open}
    if not open_keys:
        return chosen
    path = run / "settings.json"
    values = {key: default.before(chosen, config) for key, default in open_keys.items()}
    try:
        kept = json_files.load(path)["settings"]
        for key in open_keys:
            if kept.get(key) is not None:
                values[key] = reading.value(field_types.keys(Settings)[key].hint, kept[key])
    except FileNotFoundError:
        if checkpoints.newest(run, run_id) is None:
            values = {key: default.new(chosen, config) for key, default in open_keys.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        unknown = " and ".join(default.what for default in open_keys.values())
        names = " and ".join(f"train.{key}" for key in open_keys)
        raise BadInputError(
            f"{path} cannot be read: {error}; this run has begun, and {unknown} is not known",
            f"restore it, or set {names} (which begins a new run)",
        ) from None
    return dataclasses.replace(chosen, **values)
