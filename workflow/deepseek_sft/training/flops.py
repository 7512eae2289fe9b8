"""Floating-point operations of a training step, counted from the model's ``config.json`` and the step's samples."""

import dataclasses
from typing import Any

from ..planning import counting

BACKWARD = 2  # gradients of inputs and of weights: two products for each one of the forward pass
TERA = 1e12


@dataclasses.dataclass(frozen=True)
class StepFlops:
    """Operations of the model itself; what activation checkpointing computes again is not counted.

    Attributes:
        per_token: of a forward pass, per token: the matrix products that it passes through.
        per_pair: of a forward pass, per pair of a query and a key before it.
    """

    per_token: float
    per_pair: float

    @classmethod
    def of(cls, config: dict[str, Any]) -> "StepFlops":
        """From a checked ``config.json``: of the routed experts only those chosen for a token count."""
        # In a sequence of one token the one query sees one key.
        products, attention = counting.count(config).forward_flops(1)
        return cls(products.value, attention.value)

    @property
    def pairs_per_token(self) -> int:
        """Pairs whose attention takes as many operations as one token's matrix products."""
        return round(self.per_token / self.per_pair)

    def step(self, tokens: int, pairs: int) -> float:
        """Forward and backward pass over ``tokens`` tokens with ``pairs`` query-key pairs inside their samples."""
        return (1 + BACKWARD) * (tokens * self.per_token + pairs * self.per_pair)


def utilisation(flops: float, seconds: float, ranks: int, peak_tflops: float | None) -> tuple[float, float | None]:
    """TFLOP/s of each rank, and its share of the GPU's peak (MFU); None where no peak is known."""
    rate = flops / seconds / ranks / TERA
    return rate, rate / peak_tflops if peak_tflops else None
