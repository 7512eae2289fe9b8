"""The model that is trained."""

from collections.abc import Iterator
from typing import Annotated

from annotated_types import Ge, MultipleOf

from .field_types import Count, Positive, Text, Whole, section, setting


@section
class Tiny:
    hidden_size: Annotated[Whole, Ge(32), MultipleOf(32)] = 64
    """Hidden size."""
    layers: Annotated[Whole, Ge(2)] = 3
    """Transformer layers; the first is dense, the others are mixtures of experts."""
    seed: Count = 0
    """Seed of the random weights."""


@section
class Model:
    base: Text | None = None
    """Folder of the base model in DeepSeek's release format, BF16 or FP8 (dequantised by prepare_model)."""
    layers: Positive | None = setting(None, later=True)
    """Take the first so many layers of `base` alone, as a model of their own (4 of DeepSeek-V3: three dense ones and
    one with its 256 experts): the whole chain with real vocabulary, widths and experts on one node. null takes all."""
    tiny: Tiny | None = None
    """Make a small random model of the same architecture instead of `base` (demo and tests)."""

    def problems(self) -> Iterator[str]:
        if (self.base is None) == (self.tiny is None):
            yield "give exactly one of `base` (a folder) and `tiny` (make a small random model)"
        if self.layers and self.tiny is not None:
            yield "layers: cuts `model.base`; the tiny model has its own `tiny.layers`"
