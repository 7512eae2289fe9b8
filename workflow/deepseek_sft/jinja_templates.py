"""Templates of text that a program reads: scripts and configurations, where nothing is escaped."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2

TEMPLATES = Path(__file__).resolve().parents[1] / "templates"


def load(name: str, **filters: Callable[[Any], str]) -> jinja2.Template:
    """The template ``name`` of workflow/templates with further filters.

    Rendering raises ``jinja2.UndefinedError`` where the template names something that it is not given.
    """
    return _environment(tuple(sorted(filters.items()))).get_template(name)


@functools.cache
def _environment(filters: tuple[tuple[str, Callable[[Any], str]], ...]) -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= dict(filters)
    return environment
