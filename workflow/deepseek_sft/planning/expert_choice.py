"""``train.expert_parallel_size: auto``: over how many ranks a plan spreads the experts."""

import dataclasses

from .. import expert_shards
from . import plan as planning
from .plan import MISFIT, Plan
from .recommend import LEAST_GAIN


def choose(plan: Plan, stated_shard: int | str) -> Plan:
    """The plan with the fewest ranks whose expected step is within ``LEAST_GAIN`` of the shortest, of those that fit.

    What a step takes is not known on CPU, and no experts are spread there.

    Args:
        plan: with any size.
        stated_shard: ``train.experts_per_shard``.
    """
    config, cluster = plan.model.config, plan.cluster
    made = []
    for size in range(1, plan.model["n_routed_experts"] + 1):
        if plan.model["n_routed_experts"] % size:
            continue
        each = expert_shards.experts_per_shard(config, stated_shard, size)
        recompute = plan.training.recompute
        if any(expert_shards.problems(config, each, size, cluster.ranks, cluster.ranks_per_node, recompute)):
            continue
        training = dataclasses.replace(plan.training, expert_parallel_size=size, experts_per_shard=each)
        made.append(planning.make(plan.model, training, plan.samples, cluster, plan.served_dtype))
    if not made:
        return plan  # which is refused, with what to change
    fitting = [one for one in made if one.verdict != MISFIT] or made
    steps = [one.duration.expected_step_s for one in fitting]
    if None in steps:
        return fitting[0]
    return next(one for one, step in zip(fitting, steps, strict=True) if step <= (1 + LEAST_GAIN) * min(steps))
