"""What a plan tells beside its numbers: lines for the profile, as they can be pasted, and notes."""

import re

from .. import time_limits
from . import duration, gpu_kernels
from .gpu_models import GPUS, named_in
from .plan import MARGIN, Plan, longest_row_that_fits, node_has
from .settings import GIB, MB
from .terms import show, total

STARTS = 3  # of train by one `snakemake`: the first, and `retries` of its rule
SAME = 1.25  # ratio up to which the plan's peak counts as the GPU's: some plan with what they measured


def profile_lines(plan: Plan) -> list[str]:
    """Lines to write below ``set-resources: train:`` where the profile gives training less than the plan needs.

    Valid YAML, each with its reason as a comment. Memory that a node does not have is not asked for.
    """
    cluster, lines = plan.cluster, []
    if cluster.host_bytes is not None and not total(plan.host) <= cluster.host_bytes and node_has(plan):
        known = "" if cluster.node_bytes else ", if the nodes have it"
        lines.append(f"mem_mb: {plan.host_mb}   # planned {total(plan.host) / MB:,.0f} MB and {MARGIN - 1:.0%}{known}")
    save = plan.duration.checkpoint_s + (plan.duration.step.slowest if plan.duration.step else 0)
    if cluster.signal_lead_s is not None and not save <= cluster.signal_lead_s:
        words = time_limits.with_lead(cluster.slurm_extra, duration.planned(plan.duration))
        quoted = words.replace("\\", "\\\\").replace('"', '\\"')
        step = f"the slowest step, {show(plan.duration.step.slowest, 's')}, and " if plan.duration.step else ""
        lines.append(
            f'slurm_extra: "{quoted}"   # {step}a checkpoint, {show(plan.duration.checkpoint_s, "s")}, '
            f"and {time_limits.LEAD_MARGIN - 1:.0%}"
        )
    return lines


def notes(plan: Plan) -> list[str]:
    """What a reader should know that is no limit."""
    found = [*_gpu_notes(plan), *_starts_note(plan), *_cadence_note(plan)]
    longest = longest_row_that_fits(plan)
    if longest is not None and plan.samples.source == "estimated":
        found.append(
            f"planned for rows of up to {plan.samples.longest_row:,} tokens; rows of up to {longest:,} fit a GPU"
        )
    cluster = plan.cluster
    if cluster.host_bytes and cluster.node_bytes and cluster.host_bytes > cluster.node_bytes:
        found.append(
            f"the profile asks for {show(cluster.host_bytes, 'B')} a node (mem_mb), but a node has "
            f"{show(cluster.node_bytes, 'B')}: Slurm could never start the job"
        )
    for limit in plan.limits:
        if limit.have is None:
            found.append(f"{limit.name} is not judged: {limit.setting} says nothing")
    return found


def _gpu_notes(plan: Plan) -> list[str]:
    """What works on the named GPU; a contradiction between the profile's type and the plan's numbers."""
    cluster = plan.cluster
    if cluster.cpu:
        return []
    peak, memory = cluster.gpu_tflops, cluster.gpu_bytes / GIB
    words = " ".join(filter(None, (cluster.gres, *re.findall(r"--constraint[= ]\S+", cluster.slurm_extra))))
    kinds = named_in(words)
    same = [name for name in kinds if _like(peak, GPUS[name].tflops) and memory <= 1.05 * GPUS[name].memory_gib]
    found = []
    if kinds and not same:
        named = GPUS[kinds[-1]]
        found.append(
            f"the profile asks for `{words}`, but the plan counts with {peak:g} TFLOP/s and {memory:.1f} GiB a GPU; "
            f"{kinds[-1]} has {named.tflops:g} and {named.memory_gib:g}: write plan: {{gpu: {' or '.join(kinds)}}}"
        )
    chosen = cluster.gpu or (same[0] if len(same) == 1 else None)
    if chosen and GPUS[chosen].works != GPUS["h100"].works:
        found.append(f"{chosen}: {GPUS[chosen].works}")
    if chosen and (note := gpu_kernels.served_dtype_note(chosen, GPUS[chosen], plan.served_dtype)):
        found.append(note)
    return found


def _like(one: float, other: float) -> bool:
    return 1 / SAME <= one / other <= SAME


def _starts_note(plan: Plan) -> list[str]:
    """How many jobs the run takes where the time limit ends it before its last step."""
    cluster, found = plan.cluster, duration.starts(plan.duration, plan.cluster)
    if found is None or found == (1, 1):
        return []
    limit = show(60 * (cluster.runtime_minutes or 0), "s")
    if 0 in found:
        return [
            f"a job of {limit} (runtime) may have no time for a step between loading and saving: ask for a longer one, "
            "or lower train.gradient_accumulation_steps"
        ]
    fewest, most = found
    times = f"{fewest}" if fewest == most else f"{fewest} to {most}"
    again = (
        f"; one `snakemake` starts training up to {STARTS} times, then the same command goes on"
        if most > STARTS
        else ""
    )
    return [
        f"with {limit} a job (runtime) the run takes {times} starts: each saves before its end, the next resumes{again}"
    ]


def _cadence_note(plan: Plan) -> list[str]:
    """A sentence where checkpoints come more than twice as rarely or as often as is best: between, little is lost."""
    between, best = plan.duration.saving_s, plan.duration.cadence_s
    if between is None or (between[0] <= 2 * best and between[1] >= best / 2):
        return []
    training, steps = plan.training, plan.duration.cadence_steps() or (1, 1)
    minutes = f", train.save_every_minutes: {training.save_every_minutes:g}" if training.save_every_minutes else ""
    shown = [show(seconds, "s") for seconds in between]
    return [
        f"a checkpoint every {shown[0] if shown[0] == shown[1] else ' to '.join(shown)} (train.save_every_steps: "
        f"{training.save_every_steps}{minutes}); every {show(best, 's')} loses the least time, which is "
        f"{steps[0]:,} to {steps[1]:,} steps"
    ]
