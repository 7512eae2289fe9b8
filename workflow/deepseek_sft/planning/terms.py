"""Planned quantities that carry the formula they came from, so that ``--explain`` can show it."""

from collections.abc import Iterable
from dataclasses import dataclass

from .. import formatting


@dataclass(frozen=True)
class Term:
    """One planned quantity.

    Attributes:
        name: what it is.
        value: in ``unit``.
        formula: the formula with its numbers; docs/planning.md has the reasons.
        unit: ``B`` bytes, ``s`` seconds, or what is counted.
    """

    name: str
    value: float
    formula: str
    unit: str = "B"

    def show(self) -> str:
        """The value with its unit."""
        return show(self.value, self.unit)


def show(value: float, unit: str) -> str:
    """A number as people read it: bytes in binary units, seconds in the two largest units."""
    if unit == "B":
        return formatting.byte_size(value)
    if unit == "s":
        return formatting.duration(value)
    if unit == "FLOP":
        return f"{value / 1e9:,.1f} GFLOP"
    return f"{formatting.plain(value)} {unit}".strip()


def total(terms: Iterable[Term]) -> float:
    """Sum of the terms' values."""
    return sum(term.value for term in terms)
