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
        new: for new runs, from their settings, the model's ``config.json``, and over how many ranks the plan spreads
            experts, None without a plan.
        before: likewise for runs that are older than the key.
        what: it decides, for an error.
        open: the value under which it is open.
    """

    new: Callable[[Settings, dict[str, Any], int | None], Any]
    before: Callable[[Settings, dict[str, Any], int | None], Any]
    what: str
    open: str | None = None


def _spread(chosen: Settings, config: dict[str, Any], planned: int | None) -> int:
    """No run is older than the word ``auto``, which is in its id."""
    if planned is None:
        raise BadInputError(
            "train.expert_parallel_size auto is the plan's choice, and there is no plan that says it",
            "give --plan-receipt with the receipt of a plan of these settings, or set a number",
        )
    return planned


def _of_size(chosen: Settings, config: dict[str, Any], _: int | None) -> int:
    """Likewise."""
    return experts_per_shard(config, AUTO, chosen.expert_parallel_size)


DEFAULTS = {
    "expert_parallel_size": Default(_spread, _spread, "over how many ranks it spreads experts", AUTO),
    # DeepSpeed's own choice was the model's dtype.
    "gradient_communication_dtype": Default(
        lambda *_: "float32", lambda chosen, *_: chosen.dtype, "in what dtype it sums gradients over its ranks"
    ),
    "deal_rows": Default(lambda *_: "cost", lambda *_: "order", "how it deals the rows of a step"),
    "zero_thresholds": Default(lambda *_: "shard", lambda *_: "deepspeed", "how much it gathers ahead"),
    "async_save": Default(lambda *_: "auto", lambda *_: "off", "when its checkpoints are written"),
    "experts_per_shard": Default(_of_size, _of_size, "how many experts share a parameter", AUTO),
}


def settle(chosen: Settings, run: Path, run_id: str, config: dict[str, Any], planned: int | None = None) -> Settings:
    """``chosen`` with the values of this run, the same on every node and at every start.

    Args:
        config: the model's ``config.json``.
        planned: ranks over which the plan spreads experts; None without a plan.

    Raises:
        BadInputError: the run's ``settings.json`` cannot be read, so that they are not known; or the plan is asked for
            and there is none.
    """
    open_keys = {key: default for key, default in DEFAULTS.items() if getattr(chosen, key) == default.open}
    if not open_keys:
        return chosen
    path = run / "settings.json"
    values, begun = {}, True
    try:
        kept = json_files.load(path)["settings"]
        for key in open_keys:
            if kept.get(key) is not None:
                values[key] = reading.value(field_types.keys(Settings)[key].hint, kept[key])
    except FileNotFoundError:
        begun = checkpoints.newest(run, run_id) is not None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        unknown = " and ".join(default.what for default in open_keys.values())
        names = " and ".join(f"train.{key}" for key in open_keys)
        raise BadInputError(
            f"{path} cannot be read: {error}; this run has begun, and {unknown} is not known",
            f"restore it, or set {names} (which begins a new run)",
        ) from None
    for key, default in open_keys.items():  # in the order of ``DEFAULTS``: what comes later may follow from it
        value = values[key] if key in values else (default.before if begun else default.new)(chosen, config, planned)
        chosen = dataclasses.replace(chosen, **{key: value})
    return chosen
