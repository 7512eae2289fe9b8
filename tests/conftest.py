"""Fixtures shared by all layers of tests."""

from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest

PROJECT = Path(__file__).resolve().parents[1]

# An example may take as long as a busy machine makes it take: time is no promise of a unit test.
hypothesis.settings.register_profile("any-machine", deadline=None)
hypothesis.settings.load_profile("any-machine")


@pytest.fixture(scope="session")
def project() -> Path:
    """The checkout under test."""
    return PROJECT


@pytest.fixture(scope="session")
def environment() -> Callable[[str], Path]:
    """Interpreter of a locked environment by name; fails (never skips) where it is not built."""

    def python(name: str) -> Path:
        path = PROJECT / ".envs" / name / "bin" / "python"
        if not path.exists():
            pytest.fail(f"environment {name} is not built: run `make envs`")
        return path

    return python
