"""What happens to a plan that does not fit."""

from ..cli import say
from ..errors import BadInputError, GateError
from . import alternatives
from .plan import MISFIT, Plan, profile_lines


def check_possible(plan: Plan) -> None:
    """Raises BadInputError where the sequence-parallel size divides neither heads nor the ranks of a node."""
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
    fixes.append("or go on all the same with plan.on_misfit: warn")
    raise GateError(f"the plan does not fit: {plan.binding}", "; ".join(fixes))
