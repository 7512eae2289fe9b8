"""Other settings and other numbers of nodes: which fit, which is best, how few nodes do."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable
from typing import Any

from ..errors import BadInputError
from . import plan as planning
from .plan import MISFIT, Plan

MOST_NODES = 4096
KEYS = {
    "nodes": int,
    "sequence_parallel": int,
    "micro_batch": int,
    "accumulation": int,
    "longest_row": int,
    "strategy": str,
    "expert_parallel": int,
}
FIELDS = {
    "sequence_parallel": "sequence_parallel_size",
    "micro_batch": "micro_batch_size",
    "accumulation": "gradient_accumulation_steps",
    "strategy": "strategy",
    "expert_parallel": "expert_parallel_size",
}
STRATEGIES = ("zero3", "zero3_offload")


def parse_sweep(words: Iterable[str]) -> dict[str, list[Any]]:
    """``nodes=16,32 strategy=zero3`` as lists of values.

    Raises:
        BadInputError: an unknown key or a value of the wrong kind.
    """
    sweep: dict[str, list[Any]] = {}
    for word in words:
        key, separator, values = word.partition("=")
        if not separator or key not in KEYS:
            raise BadInputError(f"--sweep {word}: unknown", f"write KEY=VALUE,VALUE with KEY of {', '.join(KEYS)}")
        try:
            sweep[key] = [KEYS[key](value) for value in values.split(",")]
        except ValueError:
            raise BadInputError(f"--sweep {word}: values must be whole numbers") from None
        wrong = [v for v in sweep[key] if (v not in STRATEGIES if key == "strategy" else v < 1)]
        if wrong:
            allowed = ", ".join(STRATEGIES) if key == "strategy" else "numbers of at least 1"
            raise BadInputError(f"--sweep {word}: {wrong[0]} is not allowed", f"allowed: {allowed}")
    return sweep


def change(plan: Plan, **values: Any) -> Plan:
    """The plan with other settings, by the keys of a sweep."""
    training = {FIELDS[key]: value for key, value in values.items() if key in FIELDS}
    samples, cluster = plan.samples, plan.cluster
    if "longest_row" in values:
        longest = values["longest_row"]
        samples = dataclasses.replace(samples, longest_row=longest, mean_length=min(longest, samples.mean_length))
    if "nodes" in values:
        cluster = dataclasses.replace(cluster, nodes=values["nodes"])
    return planning.make(
        plan.model, dataclasses.replace(plan.training, **training), samples, cluster, plan.served_dtype
    )


def possible(plan: Plan) -> bool:
    """Whether the sequence-parallel size divides the ranks of a node and the heads."""
    size = plan.training.sequence_parallel_size
    return plan.cluster.ranks_per_node % size == 0 and plan.model["num_attention_heads"] % size == 0


def sweep(plan: Plan, values: dict[str, list[Any]]) -> list[tuple[dict[str, Any], Plan]]:
    """Every possible combination, in the order given."""
    combinations = [dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())]
    changed = [(settings, change(plan, **settings)) for settings in combinations]
    return [(settings, found) for settings, found in changed if possible(found)]


def seconds_per_token(plan: Plan) -> float:
    """Rank seconds that a token costs, in the middle of the step's range; what a recommendation minimises."""
    if plan.duration.step is None:
        return plan.device_bytes
    middle = (plan.duration.step.fastest * plan.duration.step.slowest) ** 0.5
    return middle * plan.cluster.ranks / plan.duration.tokens_per_step


def recommend(plans: Iterable[Plan]) -> Plan | None:
    """Of those that fit, the one whose tokens cost the fewest GPU seconds; on equal terms the one with most room."""
    fitting = [found for found in plans if found.verdict != MISFIT]
    return min(fitting, key=lambda p: (round(seconds_per_token(p), 9), p.limits[0].share), default=None)


def _fits(plan: Plan) -> bool:
    return plan.verdict != MISFIT


def fewest_nodes(plan: Plan, judge: Callable[[Plan], bool] = _fits) -> Plan | None:
    """The same experiment on the fewest nodes on which it fits; None where none does up to ``MOST_NODES``."""
    high = 1
    while not judge(change(plan, nodes=high)):
        high *= 2
        if high > MOST_NODES:
            return None
    low = high // 2  # does not fit, or 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if judge(change(plan, nodes=middle)) else (middle, high)
    return change(plan, nodes=high)
