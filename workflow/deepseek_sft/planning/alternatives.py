"""Other settings and other numbers of nodes: which fit, which is best, how few nodes do."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

from .. import expert_shards
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
SHARD = "experts_per_shard"  # follows from ``expert_parallel``
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
    """The plan with other settings, by the keys of a sweep, and ``experts_per_shard``."""
    training = {FIELDS.get(key, key): value for key, value in values.items() if key in (*FIELDS, SHARD)}
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
    """Whether sizes divide what they must: ranks of a node, heads, all ranks, experts."""
    return not any(problems(plan))


def problems(plan: Plan) -> Iterator[tuple[str, str]]:
    """Sizes that do not divide what they must: problem and fix."""
    training, cluster = plan.training, plan.cluster
    sizes = (training.experts_per_shard, training.expert_parallel_size, cluster.ranks, cluster.ranks_per_node)
    yield from expert_shards.problems(plan.model.config, *sizes, training.recompute)
    size = training.sequence_parallel_size
    if cluster.ranks_per_node % size or plan.model["num_attention_heads"] % size:
        yield (
            f"train.sequence_parallel_size {size} does not divide the {cluster.ranks_per_node} ranks of a node "
            f"and the {plan.model['num_attention_heads']} heads",
            "set it to a divisor of both",
        )


def sweep(
    plan: Plan, values: dict[str, list[Any]], stated_shard: int | Literal["auto"]
) -> tuple[list[tuple[dict[str, Any], Plan]], list[tuple[dict[str, Any], str]]]:
    """Every combination, in the order given: those that are possible, and why the others are not.

    Args:
        stated_shard: ``train.experts_per_shard``, which fits the plan's own ``expert_parallel_size``; for others it is
            told with the settings.
    """
    found, left_out = [], []
    for chosen in itertools.product(*values.values()):
        settings = dict(zip(values, chosen, strict=True))
        if (size := settings.get("expert_parallel")) is not None:
            ranks = plan.cluster.ranks_per_node
            settings[SHARD] = expert_shards.adapted(plan.model.config, stated_shard, size, ranks)
        changed = change(plan, **settings)
        problem, _ = next(problems(changed), ("", ""))
        if problem:
            left_out.append((settings, problem))
        else:
            found.append((settings, changed))
    return found, left_out


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
    """The same experiment on the fewest nodes on which it fits; None where none does up to ``MOST_NODES``.

    Of numbers of nodes whose ranks the groups of expert parallelism divide.
    """
    ranks = plan.cluster.ranks_per_node
    of_group = math.lcm(plan.training.expert_parallel_size, ranks) // ranks
    high = 1
    while not judge(change(plan, nodes=high * of_group)):
        high *= 2
        if high * of_group > MOST_NODES:
            return None
    low = high // 2  # does not fit, or 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if judge(change(plan, nodes=middle * of_group)) else (middle, high)
    return change(plan, nodes=high * of_group)
