"""A plan as text for a terminal."""

from collections.abc import Iterable
from typing import Any

from .. import time_limits
from . import alternatives, deployment, duration, evaluation_time, gate, gpu_kernels, host_memory, own_disks
from . import plan as planning
from .advice import notes, profile_lines
from .device_memory import tokens_per_rank
from .duration import Duration, Range
from .gpu_models import GPUS
from .plan import MISFIT, Plan
from .recommend import recommend
from .terms import Term, show, total

WIDTH = 46


def text(plan: Plan, explain: bool = False, hang_minutes: dict[str, float | None] | None = None) -> str:
    """The plan; with ``explain`` every number with its formula.

    Args:
        hang_minutes: of the configuration's ``train`` section.
    """
    cluster, training, samples, model = plan.cluster, plan.training, plan.samples, plan.model
    device = "CPU" if cluster.cpu else "GPU"
    rows = "unknown number of" if samples.rows is None else f"{samples.rows:,}"
    size = training.expert_parallel_size
    spread = f"; a layer's experts over {size} of them" if size > 1 else ""
    lines = [
        f"model     {model.total:,} parameters ({model.activated:,} activated) in {model.tensors:,} tensors",
        f"run       {training.strategy}, sequence parallel {training.sequence_parallel_size}, micro batch "
        f"{training.micro_batch_size}, accumulation {training.gradient_accumulation_steps}; "
        f"{cluster.nodes} nodes × {cluster.ranks_per_node} {device} ranks{spread}",
        *_gpu(plan),
        f"samples   {rows} rows ({samples.source}), {samples.mean_length:,.0f} tokens on average, "
        f"up to {samples.longest_row:,}; {tokens_per_rank(training, samples):,} tokens per rank and micro batch",
        "",
        *_limits(plan),
        "",
        *_time(plan),
        *_limits_of_time(plan, hang_minutes),
        *_deployment(plan),
        *evaluation_time.lines(plan.evaluation, plan.cluster.price_per_gpu_hour),
    ]
    if explain:
        lines += ["", *_explained(plan)]
    refused = [f"refused at start: {what}; fix: {fix}" for what, fix in gate.limit_problems(plan, hang_minutes)]
    refused += [f"refused at start: {what}" for what in (plan.deployment.problems if plan.deployment else ())]
    if found := [*refused, *notes(plan)]:
        lines += ["", *(f"note: {line}" for line in found)]
    if found := recommend(plan):
        lines += ["", *(f"faster: {one.text}" for one in found)]
    if found := profile_lines(plan):
        lines += ["", "write into the profile:", "  set-resources:", "    train:", *(f"      {line}" for line in found)]
    return "\n".join([*lines, "", verdict(plan)])


def _gpu(plan: Plan) -> list[str]:
    cluster = plan.cluster
    if not cluster.gpu:
        return []
    memory = show(cluster.gpu_bytes, "B")
    gpu = GPUS[cluster.gpu]
    kernel = gpu_kernels.attention(gpu, plan.model, plan.samples)
    return [
        f"gpu       {cluster.gpu}: {cluster.gpu_tflops:g} TFLOP/s BF16, {memory}; {gpu.works}",
        f"          attention by {kernel} (train.attention: auto)",
    ]


def _deployment(plan: Plan) -> list[str]:
    return deployment.lines(plan.deployment, plan.cluster.storage_gb_per_second) if plan.deployment else []


def figures(plan: Plan) -> dict[str, Any]:
    """What the receipt and ``--json`` say: what is counted, and what is advised."""
    found = planning.figures(plan) | {"profile_lines": profile_lines(plan), "notes": notes(plan)}
    found |= {"deployment": deployment.figures(plan.deployment)} if plan.deployment else {}
    return found | ({"evaluation": evaluation_time.figures(plan.evaluation)} if plan.evaluation else {})


def verdict(plan: Plan) -> str:
    """Verdict with the limit that is used most, or with every limit that is exceeded and what makes it fit."""
    if plan.verdict == MISFIT:
        return "\n".join([f"verdict: does not fit: {plan.exceeded}", *gate.ways_out(plan)])
    limit = plan.limits[0]
    used = f", {show(limit.need, 'B')} of {show(limit.have, 'B')}" if limit.have else ""
    return f"verdict: {plan.verdict} ({limit.name}{used})"


def _limits(plan: Plan) -> list[str]:
    lines = [f"{'':24}{'need':>12}{'have':>12}{'share':>8}"]
    for limit in plan.limits:
        have = show(limit.have, "B") if limit.have else "unknown"
        share = f"{limit.share:.0%}" if limit.have else ""
        verdict = limit.verdict if limit.have else "not judged"
        lines.append(f"{limit.name:24}{show(limit.need, 'B'):>12}{have:>12}{share:>8}  {verdict}")
    if plan.cluster.cpu:
        lines.append(f"{'memory per rank':24}{show(plan.device_bytes, 'B'):>12}")
    lines.append(f"{'one checkpoint':24}{show(plan.checkpoint, 'B'):>12}")
    return lines


def _range(found: Range) -> str:
    return f"{show(found.fastest, 's')} to {show(found.slowest, 's')}"


def _time(plan: Plan) -> list[str]:
    found: Duration = plan.duration
    steps = "steps" if found.steps is None else f"{found.steps:,} steps"
    lines = [f"time      {steps} of {found.global_batch:,} rows; {found.tokens_per_gather:,.0f} tokens per gather"]
    if found.steps is None:
        lines.append("          how many, and their cost: not known before plan.samples says how many rows there are")
    if found.step:
        lines.append(
            f"          one step {_range(found.step)}" + (f", whole run {_range(found.run)}" if found.run else "")
        )
        hours = found.gpu_hours(plan.cluster.ranks)
        if hours:
            price = plan.cluster.price_per_gpu_hour
            money = f", {hours[0] * price:,.0f} to {hours[1] * price:,.0f} at {price:g} an hour" if price else ""
            lines.append(f"cost      {hours[0]:,.0f} to {hours[1]:,.0f} GPU hours{money}")
    else:
        lines.append("          not estimated on CPU")
    if found.limit_s:
        (least, by), expected = found.limit_s, found.expected_step_s or 0.0
        lines.append(
            f"          expected {show(expected, 's')}, {expected / least:.2f} × the least of this cluster, "
            f"{show(least, 's')} ({by})"
        )
    lines.append(f"slots     {found.turns.useful_slots:.0%} of token slots hold a token{_dealt(plan)}")
    cadence = found.cadence_steps()
    every = f" ({cadence[0]:,} to {cadence[1]:,} steps)" if cadence else ""
    beside = ""
    if found.stop_s and plan.training.saves_beside_steps:
        stop = dict.fromkeys(show(seconds, "s") for seconds in sorted(found.stop_s))
        beside = f" beside the next step, which costs {' to '.join(stop)}"
    lines.append(
        f"saving    {show(found.checkpoint_s, 's')} a checkpoint{beside}; a failure every {show(found.mtbf_s, 's')}: "
        f"best every {show(found.cadence_s, 's')}{every}"
    )
    return lines + own_disks.lines(plan.own_disks, plan.training, plan.cluster)


def _dealt(plan: Plan) -> str:
    if plan.samples.packed:
        return f" (packed: {plan.samples.per_row:.1f} samples a row)"
    return {"order": " (in the order of the data)"}.get(plan.training.deal_rows or "", " (dealt by cost)")


def _limits_of_time(plan: Plan, hang_minutes: dict[str, float | None] | None) -> list[str]:
    """When the watchdog ends what hangs; nothing where no times are planned."""
    if plan.duration.step is None:
        return []
    found = time_limits.before_measuring(duration.planned(plan.duration), hang_minutes)
    shown = ", ".join(f"{phase} {show(seconds, 's')}" for phase, seconds in found.items())
    return [f"hangs     ended after: {shown}; a collective after {show(time_limits.collectives(found), 's')}"]


def _table(title: str, terms: Iterable[Term], summed: bool = True) -> list[str]:
    terms = list(terms)
    lines = [title]
    for term in terms:
        lines.append(f"  {term.name:{WIDTH}}{term.show():>16}   = {term.formula}")
    if summed and terms:
        lines.append(f"  {'together':{WIDTH}}{show(total(terms), terms[0].unit):>16}")
    return lines


def _explained(plan: Plan) -> list[str]:
    model, found = plan.model, plan.duration
    lines = ["parameters"]
    lines += [f"  {name:{WIDTH}}{count:>16,}" for name, count in model.figures()["parameters_by_component"].items()]
    lines += [f"  {'together':{WIDTH}}{model.total:>16,}"]
    lines += [f"  {'trained (without correction biases)':{WIDTH}}{model.trained:>16,}"]
    for name, size in (("in BF16", model.bf16_bytes), ("in fp32", model.fp32_bytes), ("in FP8", model.fp8_bytes)):
        lines.append(f"  {name:{WIDTH}}{show(size, 'B'):>16}")
    length = plan.samples.mean_length
    lines += ["", *_table(f"forward FLOPs of a token in {length:,.0f}", model.forward_flops(length))]
    for peak in plan.peaks:
        lines += ["", *_table(f"memory of a rank: {peak.moment}", peak.terms)]
    lines += ["", *_table("host memory of a node", plan.host), *_estimator(plan)]
    if plan.deployment:
        lines += ["", *_table("served: weights of a GPU", plan.deployment.weights)]
        lines += ["", *_table("served: beside weights and KV cache", plan.deployment.working)]
    lines += ["", *_table("disk", plan.disk), "", *_table("traffic", [found.traffic], summed=False)]
    parts = [*found.parts, *([found.step] if found.step else []), *([found.run] if found.run else [])]
    if parts:
        lines += ["", "time, fastest to slowest"]
        lines += [f"  {part.name:24}{_range(part):>38}   = {part.formula}" for part in parts]
    return lines


def _estimator(plan: Plan) -> list[str]:
    host = host_memory.estimator_host_bytes(plan.model, plan.training, plan.cluster)
    device = host_memory.estimator_device_bytes(plan.model, plan.training, plan.cluster)
    return [
        f"  DeepSpeed's estimator: {show(host, 'B')} of host memory a node, {show(device, 'B')} a GPU for states alone"
    ]


def sweep_table(plan: Plan, found: list[tuple[dict[str, Any], Plan]]) -> str:
    """A table over alternatives with the recommended one marked."""
    best = alternatives.recommend(changed for _, changed in found)
    keys = list(found[0][0]) if found else []
    head = [*keys, "rank memory", "host memory", "disk", "step", "verdict", "binding limit"]
    rows = [
        [
            *(str(settings[key]) for key in keys),
            show(changed.device_bytes, "B"),
            show(total(changed.host), "B"),
            show(total(changed.disk), "B"),
            _range(changed.duration.step) if changed.duration.step else "–",
            changed.verdict + (" *" if changed is best else ""),
            changed.binding,
        ]
        for settings, changed in found
    ]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in [head, *rows]
    ]
    end = "* recommended: fewest GPU seconds a token of those that fit" if best else "none of these fits"
    return "\n".join([*lines, end])
