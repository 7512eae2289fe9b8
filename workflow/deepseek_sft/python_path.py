"""Python processes that import this library without being installed with it."""

import os
from collections.abc import Mapping
from pathlib import Path

WORKFLOW = Path(__file__).resolve().parents[1]


def with_library(environment: Mapping[str, str]) -> str:
    """Value of ``PYTHONPATH`` for a child: this library first, then what ``environment`` has there."""
    return os.pathsep.join(filter(None, [str(WORKFLOW), environment.get("PYTHONPATH")]))
