"""Steps, traffic, time range, cost and checkpoint cadence of a run. Reasons and sources: docs/planning.md."""

import math
from dataclasses import dataclass
from typing import Any

from .. import time_limits
from .counting import Model
from .settings import Cluster, Samples, Training
from .terms import Term, total

# Lowest and highest share of a peak that is reached.
FLOP_SHARE = (0.10, 0.35)  # of dense BF16 peak: small matrix products of single experts at the low end
NETWORK_SHARE = (0.40, 0.90)  # of the line rate: all-gather of many small parameters at the low end
MEMORY_SHARE = (0.20, 0.80)  # of host memory bandwidth: Adam on the CPU
ADAM_BYTES = 28  # per parameter: read gradient, weight and two moments, write weight and two moments, fp32
HOURS, DAYS = 3600, 86400


@dataclass(frozen=True)
class Range:
    """Fastest and slowest seconds, with their formula."""

    name: str
    fastest: float
    slowest: float
    formula: str


@dataclass(frozen=True)
class Duration:
    """What a run does and takes; times are None on CPU, where no peak speeds are known.

    Attributes:
        steps: optimizer steps; None where the number of rows is unknown.
        tokens_per_gather: tokens of all ranks for which all parameters are moved once: decides ZeRO-3's throughput.
        parts: compute, network, optimizer of one step.
        step: one step in all.
        run: the whole run with its checkpoints.
        saving_s: seconds between checkpoints as configured, for the fastest and the slowest step.
        loading_s: reading the base or a checkpoint at each start.
    """

    global_batch: int
    steps: int | None
    tokens_per_step: float
    tokens_per_gather: float
    traffic: Term
    parts: list[Range]
    step: Range | None
    checkpoint_s: float
    run: Range | None
    mtbf_s: float
    cadence_s: float
    saving_s: tuple[float, float] | None = None
    loading_s: float = 0.0

    def gpu_hours(self, ranks: int) -> tuple[float, float] | None:
        return (self.run.fastest * ranks / HOURS, self.run.slowest * ranks / HOURS) if self.run else None

    def cadence_steps(self) -> tuple[int, int] | None:
        """Steps between checkpoints that lose the least time, for the slowest and the fastest step."""
        if self.step is None:
            return None
        return max(1, round(self.cadence_s / self.step.slowest)), max(1, round(self.cadence_s / self.step.fastest))


def young_daly(checkpoint_s: float, mtbf_s: float) -> float:
    """Seconds between checkpoints that lose the least time (Daly 2006, equation 37; Young 1974 is its first term)."""
    if checkpoint_s >= 2 * mtbf_s:
        return mtbf_s
    ratio = checkpoint_s / (2 * mtbf_s)
    return math.sqrt(2 * checkpoint_s * mtbf_s) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - checkpoint_s


def duration(model: Model, training: Training, samples: Samples, cluster: Cluster, checkpoint: float) -> Duration:
    """Time of a run whose checkpoints take ``checkpoint`` bytes."""
    groups = max(1, cluster.ranks // training.sequence_parallel_size)  # 0: refused by gate.check_possible
    batch = training.micro_batch_size * groups * training.gradient_accumulation_steps
    steps = training.max_steps
    if steps is None and samples.rows is not None:
        steps = max(1, math.ceil(round(training.epochs * samples.rows, 6) / batch))
    tokens = batch * samples.mean_length
    traffic = _traffic(model, training)
    parts = [] if cluster.cpu else _parts(model, training, samples, cluster, tokens, traffic)
    step = None
    if parts:
        fastest = max(parts[0].fastest, parts[1].fastest) + sum(part.fastest for part in parts[2:])
        slowest = sum(part.slowest for part in parts)
        step = Range("one step", fastest, slowest, "fastest: max(compute, network) + optimizer; slowest: their sum")
    saved = checkpoint / (cluster.storage_gb_per_second * 1e9)
    loading = model.bf16_bytes / (cluster.storage_gb_per_second * 1e9)
    run = between = None
    if step:
        limit = 60 * training.save_every_minutes if training.save_every_minutes else math.inf
        between = tuple(min(training.save_every_steps * seconds, limit) for seconds in (step.fastest, step.slowest))
    if step and steps and between:
        trained = [steps * seconds for seconds in (step.fastest, step.slowest)]
        saves = [max(1, math.ceil(round(s / every, 6))) for s, every in zip(trained, between, strict=True)]
        ends = [seconds + count * saved + loading for seconds, count in zip(trained, saves, strict=True)]
        times = str(saves[0]) if saves[0] == saves[1] else f"{saves[0]} to {saves[1]}"
        formula = f"{steps:,} steps + {times} checkpoints × {saved:,.0f} s + loading {loading:,.0f} s"
        run = Range("whole run", ends[0], ends[1], formula)
    mtbf = 1000 * DAYS / (cluster.failures_per_1000_node_days * cluster.nodes)
    return Duration(
        batch,
        steps,
        tokens,
        tokens / training.gradient_accumulation_steps,
        traffic,
        parts,
        step,
        saved,
        run,
        mtbf,
        young_daly(saved, mtbf),
        between,
        loading,
    )


def planned(found: Duration) -> time_limits.Planned:
    """The slowest step, save and start of this plan, from which every time-out follows."""
    step = found.step.slowest if found.step else 0.0
    return time_limits.Planned(max(found.checkpoint_s, found.loading_s), step, found.checkpoint_s)


def starts(found: Duration, cluster: Cluster) -> tuple[int, int] | None:
    """Jobs that a run takes under the time limit, for the fastest and the slowest step; None where not known.

    Each job loads the base or a checkpoint, and is stopped before its end to save. 0 where a job has no time to train.
    """
    if not (found.run and found.step and cluster.runtime_minutes):
        return None
    limit = 60 * cluster.runtime_minutes
    ends = []
    for run, step in ((found.run.fastest, found.step.fastest), (found.run.slowest, found.step.slowest)):
        if run <= limit:
            ends.append(1)
            continue
        useful = limit - max(cluster.signal_lead_s or 0, found.checkpoint_s + step) - found.loading_s
        ends.append(math.ceil((run - found.loading_s) / useful) if useful > step else 0)
    return ends[0], ends[1]


def _traffic(model: Model, training: Training) -> Term:
    again = training.activation_checkpointing and not training.keep_layer_gathered
    gathers = 3 if again else 2
    return Term(
        "ZeRO-3 traffic per rank and micro batch",
        (gathers * training.width + training.communication_width) * model.trained,
        f"({gathers} × {training.width} + {training.communication_width}) × {model.trained:,}: gathered for forward, "
        + ("recomputation, " if again else "")
        + "backward; gradients scattered",
    )


def _parts(
    model: Model, training: Training, samples: Samples, cluster: Cluster, tokens: float, traffic: Term
) -> list[Range]:
    passes = 4 if training.activation_checkpointing else 3
    flops = passes * total(model.forward_flops(samples.mean_length)) * tokens
    peak = cluster.ranks * cluster.gpu_tflops * 1e12
    compute = Range(
        "compute",
        flops / peak / FLOP_SHARE[1],
        flops / peak / FLOP_SHARE[0],
        f"{flops:.4g} FLOP (forward × {passes}) / ({cluster.ranks} × {cluster.gpu_tflops:g} TFLOP/s × "
        f"{FLOP_SHARE[1]:.0%} to {FLOP_SHARE[0]:.0%})",
    )
    if cluster.nodes > 1:
        speed, crossing = cluster.node_gb_per_second, (cluster.nodes - 1) / cluster.nodes
        link = f"{cluster.node_gb_per_second:g} GB/s per node"
    else:
        speed, crossing = cluster.nvlink_gb_per_second, (cluster.ranks - 1) / cluster.ranks
        link = f"NVLink {speed:g} GB/s"
    moved = training.gradient_accumulation_steps * traffic.value * crossing
    fewest = (2 * training.width + training.communication_width) * model.trained
    least = moved / traffic.value * fewest  # the recomputation's gather reused
    network = Range(
        "network",
        least / (speed * 1e9) / NETWORK_SHARE[1],
        moved / (speed * 1e9) / NETWORK_SHARE[0],
        f"{training.gradient_accumulation_steps} micro batches × {traffic.value / 1e12:.3f} TB × {crossing:.4f} "
        f"/ ({link} × {NETWORK_SHARE[1]:.0%} to {NETWORK_SHARE[0]:.0%}); fastest with three moves",
    )
    if not training.offloads_optimizer:
        return [compute, network]
    touched = ADAM_BYTES * model.trained / cluster.nodes
    seconds = touched / (cluster.memory_gb_per_second * 1e9)
    optimizer = Range(
        "optimizer on the host",
        seconds / MEMORY_SHARE[1],
        seconds / MEMORY_SHARE[0],
        f"{ADAM_BYTES} B × {model.trained:,} / {cluster.nodes} nodes / ({cluster.memory_gb_per_second:g} GB/s × "
        f"{MEMORY_SHARE[1]:.0%} to {MEMORY_SHARE[0]:.0%})",
    )
    return [compute, network, optimizer]


def figures(found: Duration, cluster: Cluster) -> dict[str, Any]:
    """Numbers for receipts and ``--json``."""
    result: dict[str, Any] = {
        "steps": found.steps,
        "global_batch": found.global_batch,
        "tokens_per_step": round(found.tokens_per_step),
        "tokens_per_gather": round(found.tokens_per_gather),
        "traffic_per_micro_batch_bytes": round(found.traffic.value),
        "checkpoint_s": round(found.checkpoint_s, 3),
        "loading_s": round(found.loading_s, 3),
        "mean_time_between_failures_s": round(found.mtbf_s),
        "checkpoint_cadence_s": round(found.cadence_s),
    }
    if found.step:
        result |= {"step_fastest_s": round(found.step.fastest, 3), "step_slowest_s": round(found.step.slowest, 3)}
        result["checkpoint_cadence_steps"] = list(found.cadence_steps() or ())
    if found.run:
        result |= {"run_fastest_s": round(found.run.fastest), "run_slowest_s": round(found.run.slowest)}
        result["starts"] = list(starts(found, cluster) or ())
        result["gpu_hours"] = [round(hours, 1) for hours in found.gpu_hours(cluster.ranks) or ()]
    return result
