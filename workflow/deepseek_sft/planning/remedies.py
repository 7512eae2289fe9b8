"""What makes a plan fit that does not: other settings on the same nodes, more memory of these nodes, more nodes.

Only what the site can have is named: no memory beyond a node's, where that is known. Space on disk is a question of its
own, which neither nodes nor most settings change.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

from . import alternatives
from . import plan as planning
from .plan import MISFIT, Plan
from .settings import MB
from .terms import show, total

SHOWN = 3
PLACES = (("zero3", "both"), ("zero3_offload", "both"), ("zero3_offload", "optimizer"), ("zero3_offload", "parameters"))
NAMES = {"strategy": "train.strategy", "offload": "train.offload"} | {
    name: f"train.{name}"
    for name in (
        *("sequence_parallel_size", "micro_batch_size", "gradient_accumulation_steps"),
        *("gradient_accumulation_dtype", "experts_per_shard"),
    )
}


@dataclasses.dataclass(frozen=True)
class Remedy:
    """A change that makes memory suffice.

    Attributes:
        settings: what to change, by the configuration's keys, ``nodes`` or ``mem_mb`` of the profile.
        plan: the plan with the change.
        changes: how many decisions it takes; the accumulation that keeps the batch is none.
    """

    settings: dict[str, Any]
    plan: Plan
    changes: int

    def __str__(self) -> str:
        words = [f"{NAMES[key]}: {value}" for key, value in self.settings.items() if key in NAMES]
        words += [f"profile, train: {key}: {value}" for key, value in self.settings.items() if key not in NAMES]
        tightest = _memory(self.plan)[0]
        return f"{', '.join(words)} ({tightest.share:.0%} of the {tightest.name})"


def _memory(plan: Plan) -> list[planning.Limit]:
    return [limit for limit in plan.limits if limit.name not in (planning.DISK, planning.OWN_DISK)]


def suffices(plan: Plan) -> bool:
    """Whether memory suffices, whatever the disk."""
    return all(limit.verdict != MISFIT for limit in _memory(plan))


def remedies(plan: Plan) -> list[Remedy]:
    """The nearest changes for memory, the fewest decisions first, at most one for each kind; none where it suffices."""
    if suffices(plan):
        return []
    cost = alternatives.seconds_per_token
    found = sorted(
        (*_on_these_nodes(plan), *_more_memory(plan), *_on_more_nodes(plan)),
        key=lambda one: (one.changes, "nodes" in one.settings, _loses(one), cost(one.plan)),
    )
    kept: dict[frozenset[str], Remedy] = {}
    for one in found:
        kind = frozenset(one.settings) - {"gradient_accumulation_steps"}
        # Not what is another one and something more, unless it takes fewer nodes.
        nodes = one.settings.get("nodes", 0)
        if all(not other <= kind or 0 < nodes < kept[other].settings.get("nodes", 0) for other in kept):
            kept.setdefault(kind, one)
    return list(kept.values())[:SHOWN]


def _on_these_nodes(plan: Plan) -> Iterator[Remedy]:
    training, ranks = plan.training, plan.cluster.ranks_per_node
    places = [(training.strategy, training.offload), *PLACES]
    options = {
        "place": list(dict.fromkeys(places)),
        "sequence_parallel_size": [size for size in range(1, ranks + 1) if ranks % size == 0],
        "micro_batch_size": range(1, training.micro_batch_size + 1),
        "gradient_accumulation_dtype": list(dict.fromkeys([training.gradient_accumulation_dtype, "bfloat16"])),
        "experts_per_shard": [
            n for n in range(1, training.experts_per_shard + 1) if training.experts_per_shard % n == 0
        ],
    }
    if plan.cluster.cpu:
        options["place"] = places[:1]
    for chosen in itertools.product(*options.values()):
        values = dict(zip(options, chosen, strict=True))
        strategy, offload = values.pop("place")
        values["strategy"] = strategy
        if strategy == "zero3_offload":
            values["offload"] = offload
        changed = {key: value for key, value in values.items() if value != getattr(training, key)}
        if not changed:
            continue
        decisions = _decisions(plan, changed)
        changed |= _same_batch(plan, changed)
        other = _make(plan, dataclasses.replace(training, **changed))
        if alternatives.possible(other) and suffices(other):
            yield Remedy(changed, other, decisions)


def _same_batch(plan: Plan, changed: dict[str, Any]) -> dict[str, Any]:
    """The accumulation that keeps the samples of a step, where a whole number does."""
    training = plan.training
    size = changed.get("sequence_parallel_size", training.sequence_parallel_size)
    micro = changed.get("micro_batch_size", training.micro_batch_size)
    now = training.micro_batch_size * size * training.gradient_accumulation_steps
    steps, rest = divmod(now, training.sequence_parallel_size * micro)
    return {"gradient_accumulation_steps": steps} if not rest and steps != training.gradient_accumulation_steps else {}


def _more_memory(plan: Plan) -> Iterator[Remedy]:
    """More of the nodes' memory for the job, where they have it."""
    cluster = plan.cluster
    if cluster.host_bytes and not total(plan.host) <= cluster.host_bytes and planning.node_has(plan):
        larger = dataclasses.replace(cluster, host_bytes=float(plan.host_mb * MB))
        other = planning.make(plan.model, plan.training, plan.samples, larger, plan.served_dtype)
        if suffices(other):
            yield Remedy({"mem_mb": plan.host_mb}, other, 1)


def _on_more_nodes(plan: Plan) -> Iterator[Remedy]:
    training = plan.training
    places = PLACES if not plan.cluster.cpu else ()
    for strategy, offload in dict.fromkeys([(training.strategy, training.offload), *places]):
        for dtype in dict.fromkeys([training.gradient_accumulation_dtype, "bfloat16"]):
            values = {"strategy": strategy, "gradient_accumulation_dtype": dtype}
            values |= {"offload": offload} if strategy == "zero3_offload" else {}
            changed = {key: value for key, value in values.items() if value != getattr(training, key)}
            other = _make(plan, dataclasses.replace(training, **changed))
            more = alternatives.fewest_nodes(other, suffices)
            if more and more.cluster.nodes > plan.cluster.nodes:
                yield Remedy(changed | {"nodes": more.cluster.nodes}, more, _decisions(plan, changed) + 1)


def _loses(one: Remedy) -> bool:
    """Whether a change costs precision; among equals those come first that do not."""
    return one.settings.get("gradient_accumulation_dtype") == "bfloat16"


def _decisions(plan: Plan, changed: dict[str, Any]) -> int:
    """Where states lie is one decision, whether it takes one key or two."""
    return len(changed) - ("offload" in changed and "strategy" in changed)


def _make(plan: Plan, training: Any) -> Plan:
    return planning.make(plan.model, training, plan.samples, plan.cluster, plan.served_dtype)


def for_the_disk(plan: Plan) -> list[str]:
    """What helps where the disk is too small; nothing where it suffices."""
    disk = next(limit for limit in plan.limits if limit.name == planning.DISK)
    if disk.verdict != MISFIT:
        return []
    keep = plan.training.keep_checkpoints
    fewer = [_make(plan, dataclasses.replace(plan.training, keep_checkpoints=n)) for n in range(keep - 1, 0, -1)]
    fitting = [other for other in fewer if total(other.disk) <= (disk.have or 0)]
    space = (
        f"lay `results` on a file system with {show(disk.need, 'B')} free, or state what is free with plan.storage_tb"
    )
    if fitting:
        return [f"train.keep_checkpoints: {fitting[0].training.keep_checkpoints} fits the disk; or {space}"]
    return [space if keep == 1 else f"{space}; train.keep_checkpoints: 1 needs {show(total(fewer[-1].disk), 'B')}"]
