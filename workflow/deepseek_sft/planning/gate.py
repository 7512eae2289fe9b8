"""What happens to a plan that does not fit."""

from .. import time_limits
from ..cli import say
from ..errors import BadInputError, GateError
from . import alternatives, duration
from .advice import profile_lines
from .deployment import Deployment
from .plan import MISFIT, Plan
from .remedies import for_the_disk, remedies


def check_possible(plan: Plan) -> None:
    """Raises BadInputError where a size divides not what it must: ranks of a node, heads, experts."""
    for problem, fix in alternatives.problems(plan):
        raise BadInputError(problem, fix)


def limit_problems(plan: Plan, hang_minutes: dict[str, float | None] | None) -> list[tuple[str, str]]:
    """Time-outs that would end what is healthy by this plan: problem and fix. See ``time_limits.problems``."""
    cluster, run = plan.cluster, plan.duration.run
    within = bool(run and cluster.runtime_minutes and run.slowest <= 60 * cluster.runtime_minutes)
    times = duration.planned(plan.duration)
    return time_limits.problems(times, hang_minutes, cluster.signal_lead_s, within, cluster.slurm_extra)


def check_limits(plan: Plan, hang_minutes: dict[str, float | None] | None, on_misfit: str) -> None:
    """Raises GateError where a healthy step, save or start would be ended; with ``warn`` a warning is enough."""
    found = limit_problems(plan, hang_minutes)
    if not found:
        return
    told = "; ".join(problem for problem, _ in found)
    if on_misfit == "warn":
        say(f"warning: {told}")
        return
    raise GateError(told, "\n       ".join([*(fix for _, fix in found), ANYWAY]))


def stop_unless_it_fits(plan: Plan, on_misfit: str) -> None:
    """Raises GateError where the plan does not fit, with what to change; with ``warn`` a warning is enough."""
    if plan.verdict != MISFIT:
        return
    if on_misfit == "warn":
        say(f"warning: the plan does not fit: {plan.exceeded}")
        return
    raise GateError(f"the plan does not fit: {plan.exceeded}", "\n       ".join([*ways_out(plan), ANYWAY]))


def check_deployment(found: Deployment, on_misfit: str) -> None:
    """Raises GateError where vLLM could not start so; with ``warn`` a warning is enough."""
    if not found.problems:
        return
    told = "; ".join(found.problems)
    if on_misfit == "warn":
        say(f"warning: {told}")
        return
    ways = "other sizes below `serve` (docs/serving.md has a table), more GPUs for smoke_test, or convert: {dtype: fp8}"
    raise GateError(told, f"{ways}\n       {ANYWAY}")


ANYWAY = "to go on all the same, plan.on_misfit: warn"


def ways_out(plan: Plan) -> list[str]:
    """What makes a plan fit, one way a line: settings, nodes, the profile's lines for memory; then the disk."""
    found = remedies(plan)
    lines = [f"{'or' if number else 'nearest that fits'}: {one}" for number, one in enumerate(found)]
    short = any(not limit.share <= 1 for limit in plan.limits if limit.name.startswith("host"))
    if short and not any("mem_mb" in one.settings for one in found):
        lines += [
            f"or more memory: profile, set-resources: train: {line}" for line in profile_lines(plan) if "mem_mb" in line
        ]
    if not found and not for_the_disk(plan):
        lines.append("no setting of training, no memory of these nodes and no number of nodes makes it fit")
    return [*lines, *for_the_disk(plan)]
