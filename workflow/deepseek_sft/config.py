"""The configuration of an experiment: merged, filled in and checked, and what each rule sees of it.

Keys, types, bounds, defaults and meanings stand in ``settings/``, one class a section.
"""

import copy
from typing import Any

from .errors import BadInputError
from .planning import gpu_models
from .settings import field_types, reading
from .settings.configuration import Configuration


def resolve(config: dict[str, Any]) -> dict[str, Any]:
    """Fill defaults in and validate.

    Args:
        config: the merged configuration files.

    Returns:
        A new dictionary with every key.

    Raises:
        BadInputError: every problem found, each with the key's path, its value, what is allowed and what to write.
    """
    given = reading.filled(Configuration, copy.deepcopy(config))
    settings, problems = reading.check(Configuration, given | {"plan": gpu_models.fill_in(given["plan"])})
    if problems:
        raise BadInputError("the configuration is not valid\n" + "\n".join(f"  - {p}" for p in problems))
    return field_types.plain(settings)


def merge(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """``second`` over ``first``, key by key, as Snakemake merges configuration files."""
    merged = dict(first)
    for key, value in second.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def operational(section: str, config: dict[str, Any]) -> dict[str, Any]:
    """The operational keys of a section."""
    marked = field_types.marked(_section(section), "operational")
    return {key: value for key, value in settled(section, config).items() if key in marked}


def shaping(section: str, config: dict[str, Any]) -> dict[str, Any]:
    """The keys of a section that decide its result."""
    marked = field_types.marked(_section(section), "operational")
    return {key: value for key, value in settled(section, config).items() if key not in marked}


def settled(section: str, config: dict[str, Any]) -> dict[str, Any]:
    """A section without the keys that came later and are at their defaults; see ``field_types.settled``."""
    return field_types.settled(_section(section), config[section])


def _section(name: str) -> Any:
    return field_types.keys(Configuration)[name].section
