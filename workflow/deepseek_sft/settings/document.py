"""config/README.md: every key with its meaning, unit and default."""

import typing
from collections.abc import Iterator
from typing import Any

import yaml

from . import field_types
from .configuration import Configuration

HEAD = """# Configuration

Generated from `workflow/deepseek_sft/settings/` by `workflow/scripts/document_config.py`.
Each further `--configfile` is merged over the earlier ones, key by key.
Changing an *operational* key re-runs nothing. A key of *topology* says how work is spread over the ranks.

| key | default | meaning |
|---|---|---|
"""


def documentation() -> str:
    return HEAD + "".join(f"| `{path}` | {default} | {text} |\n" for path, default, text in _rows(Configuration, ""))


def _rows(kind: Any, prefix: str) -> Iterator[tuple[str, str, str]]:
    for name, key in field_types.keys(kind).items():
        if key.meaning:
            absent = key.default is field_types.MISSING or (key.section and not key.nullable)
            default = "`{}`" if key.section and absent else "required" if absent else f"`{_yaml(key.default)}`"
            choices = ", ".join(f"`{'null' if one is None else one}`" for one in key.choices if len(key.choices) > 1)
            several = typing.get_origin(key.hint) is tuple
            said = [f"{'Any' if several else 'One'} of {choices}."] if choices else []
            marks = [mark for mark in ("operational", "topology") if mark in key.marks]
            text = " ".join([*said, key.meaning, *([f"*{', '.join(marks)}*"] if marks else [])])
            yield f"{prefix}{name}", default, text.replace("|", "\\|")
        if key.section:
            yield from _rows(key.section, f"{prefix}{name}.")


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip() if value != "" else '""'
