"""What would make a step faster in the memory there is: one decision at a time, the one that gains most first.

Which rows a step trains on stays, and so does what it computes; only where work and states lie changes.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .. import expert_shards
from . import plan as planning
from .plan import TIGHT_SHARE, Plan
from .terms import show

LEAST_GAIN = 0.02  # of the expected step; less is not worth a sentence
MOST_MICRO_BATCH = 16
PLACES = ("both", "optimizer", "parameters")


@dataclass(frozen=True)
class Advice:
    """One decision.

    Attributes:
        settings: keys of the ``train`` section with their values.
        plan: the plan with this decision and those before it.
        text: for people: what to write, what it gains, and what it takes.
    """

    settings: dict[str, Any]
    plan: Plan
    text: str


def recommend(plan: Plan) -> list[Advice]:
    """Decisions that make a step of this plan faster, in the order in which to take them; none on CPU."""
    found: list[Advice] = []
    current = plan
    while current.duration.expected_step_s:
        before = current.duration.expected_step_s
        tried = [one for one in _changes(current) if _has_room(one.plan, plan)]
        best = min(tried, key=lambda one: one.plan.duration.expected_step_s or before, default=None)
        if best is None or (best.plan.duration.expected_step_s or before) > (1 - LEAST_GAIN) * before:
            return found
        found.append(best)
        current = best.plan
    return found


def _has_room(changed: Plan, plan: Plan) -> bool:
    """Within the share of each limit at which a plan is still no tight one, the disk apart; or no more than now."""
    now = {limit.name: limit.share for limit in plan.limits}
    return all(
        limit.share <= max(TIGHT_SHARE, now.get(limit.name, 0.0))
        for limit in changed.limits
        if limit.name not in (planning.DISK, planning.OWN_DISK)
    )


def _changes(plan: Plan) -> Iterator[Advice]:
    training = plan.training
    batch, steps = training.micro_batch_size, training.gradient_accumulation_steps
    for factor in (2, 4, 8):
        if not steps % factor and batch * factor <= MOST_MICRO_BATCH:
            yield _advice(
                plan, "fewer gathers", micro_batch_size=batch * factor, gradient_accumulation_steps=steps // factor
            )
    if training.strategy == "zero3_offload":
        for place in PLACES:
            if place != training.offload:
                yield _advice(plan, "less over PCIe", offload=place)
        yield _advice(plan, "nothing over PCIe, and the update on the GPUs", strategy="zero3")
    if training.activation_checkpointing and not training.keeps_attention:
        yield _advice(plan, "attention is not computed again", recompute="without_attention")
    for factor in (2, 4):
        size = training.experts_per_shard * factor
        if not plan.model["n_routed_experts"] % (size * training.expert_parallel_size):
            yield _advice(plan, "fewer and larger parameters", experts_per_shard=size)
    yield from _spread_experts(plan)


def _spread_experts(plan: Plan) -> Iterator[Advice]:
    """Expert parallelism inside a node, which saves gathers, and over nodes, which saves what is gathered."""
    cluster, config = plan.cluster, plan.model.config
    for size in (2**power for power in range(1, 10)):
        over_nodes = size > cluster.ranks_per_node
        shard = expert_shards.adapted(config, plan.training.experts_per_shard, size, cluster.ranks_per_node)
        values = {"expert_parallel_size": size, "experts_per_shard": shard}
        sizes = (shard, size, cluster.ranks, cluster.ranks_per_node)
        if any(expert_shards.problems(config, *sizes, plan.training.recompute)):
            continue
        if size != plan.training.expert_parallel_size:
            yield _advice(plan, "experts spread over ranks, rows travel to them", **values)
            if over_nodes and plan.training.activation_checkpointing:
                why = "experts spread over nodes, their results kept"
                yield _advice(plan, why, **values, recompute="without_experts")


def _advice(plan: Plan, why: str, **settings: Any) -> Advice:
    changed = planning.make(
        plan.model, dataclasses.replace(plan.training, **settings), plan.samples, plan.cluster, plan.served_dtype
    )
    written = ", ".join(f"{name}: {value}" for name, value in settings.items())
    before, after = (show(one.duration.expected_step_s or 0, "s") for one in (plan, changed))
    memory = f"{show(changed.device_bytes, 'B')} a GPU"
    return Advice(settings, changed, f"train: {{{written}}}: {why}, one step {after} instead of {before}; {memory}")
