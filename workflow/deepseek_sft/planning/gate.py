"""What happens to a plan that does not fit."""

from ..cli import say
from ..errors import BadInputError, GateError
from . import alternatives
from .plan import MISFIT, Plan, profile_lines


def check_possible(plan: Plan) -> None:
    """Raises BadInputError where a size divides not what it must: ranks of a node, heads, experts."""
    experts, each = plan.model["n_routed_experts"], plan.training.experts_per_shard
    if experts % each:
        raise BadInputError(f"train.experts_per_shard {each} does not divide the base's {experts} routed experts")
    if not alternatives.possible(plan):
        raise BadInputError(
            f"train.sequence_parallel_size {plan.training.sequence_parallel_size} does not divide the "
            f"{plan.cluster.ranks_per_node} ranks of a node and the {plan.model['num_attention_heads']} heads"
        )


def stop_unless_it_fits(plan: Plan, on_misfit: str) -> None:
    """Raises GateError where the plan does not fit, with what to change; with ``warn`` a warning is enough."""
    if plan.verdict != MISFIT:
        return
    if on_misfit == "warn":
        say(f"warning: the plan does not fit: {plan.binding}")
        return
    near = alternatives.nearest(plan)
    fixes = [f"profile, set-resources: train: {line}" for line in profile_lines(plan)]
    if near:
        fixes.append(f"nearest that fits: {alternatives.as_yaml(near[0])}")
    raise GateError(f"the plan does not fit: {plan.binding}", "; ".join([*fixes, *advice(plan), ANYWAY]))


ANYWAY = "to go on all the same, plan.on_misfit: warn"
DISK_ADVICE = (
    "lay `results` on a larger file system, lower train.keep_checkpoints, or state what is free with plan.storage_tb"
)


def advice(plan: Plan) -> list[str]:
    """What helps against a full disk, which neither nodes nor training's settings change."""
    return [DISK_ADVICE] if any(limit.name == "disk" and not limit.share <= 1 for limit in plan.limits) else []
