"""Settings of the smoke test: section ``smoke_test`` of the configuration, and training's template."""

from pathlib import Path

from .field_types import Text, section
from .smoke_test import SmokeTest


@section
class SmokeSettings(SmokeTest):
    """Settings of the smoke test; ``None`` switches a gate off."""

    template: Text | None = None
    """Template of training (data.template); null: prompts are not compared."""


def record_beside(transcript: Path) -> Path:
    """Where the record of the held-out samples lies, unless said otherwise."""
    return transcript.with_name("evaluation.jsonl")
