"""What was planned beside what was measured, after a training run: memory, disk, time."""

from dataclasses import dataclass
from typing import Any

from .. import formatting
from .collect import Stage, mapping

GIB = 1 << 30
# PyTorch's peak counts none of these.
NOT_MEASURED = ("allocator slack_bytes", "CUDA context_bytes", "NCCL buffers_bytes")


@dataclass(frozen=True)
class Comparison:
    """One quantity.

    Attributes:
        unit: ``B``, ``s``, or ``%`` of a share.
        planned: a number, or the fastest and the slowest of a range.
        what: how it was measured.
    """

    name: str
    unit: str
    planned: float | tuple[float, float]
    measured: float
    what: str

    @property
    def difference_share(self) -> float:
        """Measured over planned, less one; of a range 0 inside and the distance to the nearer end outside."""
        if not isinstance(self.planned, tuple):
            return self.measured / self.planned - 1
        low, high = self.planned
        return self.measured / min(max(self.measured, low), high) - 1

    def text(self) -> str:
        show = {"B": formatting.byte_size, "s": formatting.duration, "%": "{:.1%}".format}[self.unit]
        ends = self.planned if isinstance(self.planned, tuple) else (self.planned,)
        share = self.difference_share
        if isinstance(self.planned, tuple) and share == 0:
            verdict = "inside"
        else:
            verdict = f"{abs(share):.1%} {'more' if share >= 0 else 'less'}"
        return (
            f"planned {' to '.join(show(end) for end in ends)}, measured {show(self.measured)}: {verdict} ({self.what})"
        )


def compare(plan: Stage, train: Stage, metrics: list[dict[str, Any]]) -> list[Comparison]:
    """Everything that both the plan's receipt and the run speak of; what one of them lacks is left out."""
    planned, run = plan.figures, train.figures
    parts, host_parts = mapping(planned.get("rank_memory")), mapping(planned.get("host_memory"))
    on_cpu = "process_bytes" in parts
    ranks = _ratio(planned.get("ranks"), planned.get("nodes"))
    peak = _times(run.get("peak_memory_gib"), GIB)
    resident = [line["host_memory_gib"] for line in metrics if _is_number(line.get("host_memory_gib"))]
    resident_bytes = peak if on_cpu else _times(max(resident, default=None), GIB)
    allocated = planned.get("rank_memory_bytes")
    if not on_cpu and _is_number(allocated):
        allocated -= sum(parts[name] for name in NOT_MEASURED if _is_number(parts.get(name)))
    node = host_parts["node_bytes"] if _is_number(host_parts.get("node_bytes")) else 0
    host = planned.get("host_memory_bytes")
    process = parts.get("process_bytes") if on_cpu else _ratio(host_parts.get("processes_bytes"), ranks)
    rows = [
        ("one checkpoint", "B", planned.get("checkpoint_bytes"), run.get("checkpoint_bytes"), "sum of its files"),
        (
            "memory of a rank",
            "B",
            allocated,
            peak,
            "largest resident size" if on_cpu else "PyTorch's peak; slack, context and NCCL left out of both",
        ),
        (
            "a rank's process",
            "B",
            process,
            _times(run.get("memory_before_model_gib"), GIB),
            "resident size before the model is built; part of the rank's memory",
        ),
        (
            "freed memory that the C library keeps",
            "B",
            parts.get("freed memory that glibc keeps_bytes"),
            _times(run.get("kept_by_allocator_gib"), GIB),
            "mallinfo2; part of the rank's memory",
        ),
        (
            "host memory of a node",
            "B",
            host - node if _is_number(host) else None,
            _times(resident_bytes, ranks),
            "ranks × the largest one's resident size; launchers left out of both",
        ),
        (
            "useful token slots",
            "%",
            planned.get("useful_slots_share"),
            run.get("useful_slots_share"),
            "tokens over slots, padding and waiting counted",
        ),
        (
            "one step",
            "s",
            _range(planned, "step_fastest_s", "step_slowest_s"),
            _ratio(run.get("seconds"), run.get("steps")),
            "mean over the run",
        ),
        (
            "whole run",
            "s",
            _range(planned, "run_fastest_s", "run_slowest_s"),
            run.get("wall_seconds"),
            "all starts",
        ),
    ]
    return [
        Comparison(name, unit, value, measured, what)
        for name, unit, value, measured, what in rows
        if _is_positive(value) and _is_positive(measured) and not (unit == "s" and on_cpu)
    ]


def _range(figures: dict[str, Any], low: str, high: str) -> tuple[float, float] | None:
    ends = figures.get(low), figures.get(high)
    return ends if all(map(_is_positive, ends)) else None  # type: ignore[return-value]


def _is_number(item: Any) -> bool:
    return isinstance(item, int | float) and not isinstance(item, bool)


def _is_positive(item: Any) -> bool:
    return all(map(_is_positive, item)) if isinstance(item, tuple) else _is_number(item) and item > 0


def _times(item: Any, factor: Any) -> float | None:
    return item * factor if _is_number(item) and _is_number(factor) else None


def _ratio(item: Any, divisor: Any) -> float | None:
    return item / divisor if _is_number(item) and _is_positive(divisor) else None
