"""Steps, traffic, time range, cost and checkpoint cadence of a run. Reasons and sources: docs/planning.md."""

import math
from dataclasses import dataclass
from typing import Any

from .. import time_limits
from . import checkpoint_cost, lockstep, validation_time
from .counting import Model
from .expert_exchange import Exchange
from .lockstep import Turns
from .settings import Cluster, Samples, Training
from .terms import Term

# Lowest and highest share of a peak that is reached: judgements from public runs (docs/planning.md), not measured here.
FLOP_SHARE = (0.25, 0.40)  # of dense BF16 peak, what is recomputed counted
NETWORK_SHARE = (0.60, 0.90)  # of the line rate, by collectives of hundreds of MB
MEMORY_SHARE = (0.40, 0.80)  # of host memory bandwidth: Adam on the CPU
PCIE_SHARE = (0.50, 0.85)  # of one direction's rate, all GPUs of a node at once
LEAST_NETWORK_SHARE = 0.40  # below it preflight calls a network broken
LIMIT_FLOP_SHARE = 0.40  # of the best that a step could do
ADAM_BYTES = 28  # per parameter: read gradient, weight and two moments, write weight and two moments, fp32
HOST_SECONDS = 1.46e-3  # of Python for a parameter and micro batch: 6.56 s for 4,505, `benchmarks/train.py scale`
OPTIMIZER = "optimizer on the host"
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
        turns: the step's micro batches: what groups wait for each other.
        parts: compute, network, host, PCIe, optimizer of one step, each by itself.
        step: one step in all.
        limit_s: what a step takes at least, and the part that says so: compute at ``LIMIT_FLOP_SHARE`` without waiting,
            network at its line rate, host, PCIe at its rate.
        run: the whole run with its checkpoints.
        stop_s: seconds that a checkpoint keeps the GPUs from steps, for the fastest and the slowest step; None where
            it is not known.
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
    turns: Turns
    saving_s: tuple[float, float] | None = None
    loading_s: float = 0.0
    limit_s: tuple[float, str] | None = None
    stop_s: tuple[float, float] | None = None

    @property
    def expected_step_s(self) -> float | None:
        """Between the fastest and the slowest step, as many times the one as the other is of it."""
        return math.sqrt(self.step.fastest * self.step.slowest) if self.step else None

    def gpu_hours(self, ranks: int) -> tuple[float, float] | None:
        return (self.run.fastest * ranks / HOURS, self.run.slowest * ranks / HOURS) if self.run else None

    def cadence_steps(self) -> tuple[int, int] | None:
        """Steps between checkpoints that lose the least time, for the slowest and the fastest step."""
        if self.step is None:
            return None
        return max(1, round(self.cadence_s / self.step.slowest)), max(1, round(self.cadence_s / self.step.fastest))


def duration(model: Model, training: Training, samples: Samples, cluster: Cluster, checkpoint: float) -> Duration:
    """Time of a run whose checkpoints take ``checkpoint`` bytes."""
    groups = max(1, cluster.ranks // training.sequence_parallel_size)  # 0: refused by gate.check_possible
    batch = training.micro_batch_size * groups * training.gradient_accumulation_steps
    steps = training.max_steps
    if steps is None and samples.rows is not None:
        steps = max(1, math.ceil(round(training.epochs * samples.rows, 6) / batch))
    tokens = batch * samples.mean_length
    traffic = _traffic(model, training)
    dealt = lockstep.turns(model, training, samples, groups)
    parts: list[Range] = []
    step = least = None
    if not cluster.cpu:
        slots = training.micro_batch_size * samples.mean_length / training.sequence_parallel_size / dealt.useful_slots
        timed = Step(model, training, cluster, dealt, traffic, slots)
        parts, step, least = timed.parts(), timed.whole(), timed.limit()
    saved = checkpoint / (cluster.storage_gb_per_second * 1e9)
    loading = model.bf16_bytes / (cluster.storage_gb_per_second * 1e9)
    run = between = stop = None
    if step:
        limit = 60 * training.save_every_minutes if training.save_every_minutes else math.inf
        update = next((part for part in parts if part.name == OPTIMIZER), Range(OPTIMIZER, 0.0, 0.0, ""))
        beside = (step.fastest - update.fastest, step.slowest - update.slowest)
        stop = checkpoint_cost.stops(training, saved, beside)
        between = tuple(min(training.save_every_steps * seconds, limit) for seconds in (step.fastest, step.slowest))
    if step and steps and between:
        trained = [steps * seconds for seconds in (step.fastest, step.slowest)]
        saves = [max(1, math.ceil(round(s / every, 6))) for s, every in zip(trained, between, strict=True)]
        measured = validation_time.measurements(training, steps)
        passes = [validation_time.seconds(training, samples, groups, s) for s in (step.fastest, step.slowest)]
        stood = checkpoint_cost.stood(training, cluster, checkpoint, saved, trained, saves, stop, beside)
        ends = [t + still + loading + measured * v for t, still, v in zip(trained, stood, passes, strict=True)]
        times = str(saves[0]) if saves[0] == saves[1] else f"{saves[0]} to {saves[1]}"
        each = (
            f"{min(stop):,.0f} to {max(stop):,.0f} s (the last {saved:,.0f} s)"
            if stop[0] < saved
            else f"{saved:,.0f} s"
        )
        formula = f"{steps:,} steps + {times} checkpoints × {each} + loading {loading:,.0f} s"
        if measured:
            formula += f" + {measured:,} validations × {passes[0]:,.0f} to {passes[1]:,.0f} s"
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
        checkpoint_cost.on_shared_storage(training, cluster, max(stop or (saved,)), mtbf, saved),
        dealt,
        between,
        loading,
        least,
        stop,
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


@dataclass(frozen=True)
class Step:
    """The time of one step on GPUs, micro batch by micro batch.

    Gathers and scatters travel while layers compute, and the host runs ahead of the GPU: of the three the slowest
    decides a micro batch. In the slowest case what passes PCIe is not hidden at all; rows that travel to experts never
    are.

    Attributes:
        tokens: slots of a rank in a micro batch, padding included.
    """

    model: Model
    training: Training
    cluster: Cluster
    turns: Turns
    traffic: Term
    tokens: float = 0.0

    @property
    def passes(self) -> int:
        """Forward passes that a step's products amount to: the backward pass takes two, recomputation one."""
        return 4 if self.training.activation_checkpointing else 3

    def computing(self, share: float) -> list[float]:
        """Seconds of the costliest group in each micro batch, at a share of the peak."""
        rate = self.training.sequence_parallel_size * self.cluster.gpu_tflops * 1e12 * share
        kept = 1 if self.training.keeps_attention else 0  # passes through attention's kernel that are left out
        each = zip(self.turns.operations, self.turns.attention, strict=True)
        return [(self.passes * operations - kept * attention) / rate for operations, attention in each]

    @property
    def link(self) -> tuple[float, float, str]:
        """GB/s of the link that decides, the share of what moves that crosses it, and its name."""
        cluster = self.cluster
        if cluster.nodes > 1:
            crossing = (cluster.nodes - 1) / cluster.nodes
            return cluster.node_gb_per_second, crossing, f"{cluster.node_gb_per_second:g} GB/s per node"
        speed = cluster.nvlink_gb_per_second
        return speed, (cluster.ranks - 1) / cluster.ranks, f"NVLink {speed:g} GB/s"

    @property
    def exchange(self) -> Exchange:
        return Exchange(self.model, self.training, self.cluster)

    @property
    def into_node(self) -> float:
        """Bytes of weights and gradients that a node gets of others in a micro batch."""
        if self.training.expert_parallel_size > 1:
            return self.exchange.weights_into_node()
        each = self.traffic.value / self.model.trained
        return each * (self.exchange.experts_into_node() + self.exchange.others_into_node())

    def moving(self, share: float) -> float:
        """Seconds that the gathers and scatters of a micro batch take on the deciding link."""
        speed, crossing, _ = self.link
        moved = self.into_node if self.cluster.nodes > 1 else self.traffic.value / self.training.expert_parallel_size
        return moved * (1 if self.cluster.nodes > 1 else crossing) / (speed * 1e9 * share)

    def exchanging(self, share: float) -> float:
        """Seconds that a micro batch's rows take to their experts and back, which nothing hides."""
        tokens = self.tokens
        inside = self.exchange.rows_inside(tokens) / (self.cluster.nvlink_gb_per_second * 1e9 * share)
        return inside + self.exchange.rows_into_node(tokens) / (self.cluster.node_gb_per_second * 1e9 * share)

    @property
    def hosting(self) -> float:
        """Seconds of Python a micro batch."""
        shapes = sum(self.model.shapes.values())
        shards = self.model.moe_layers * self.model["n_routed_experts"] // self.training.experts_per_shard
        own = shards // self.training.expert_parallel_size
        return HOST_SECONDS * (shapes + 2 * own) + self.exchange.hosting()

    @property
    def pcie_bytes(self) -> tuple[float, str]:
        """Bytes of a rank and micro batch between host and GPU: gathered parameters, gradients and their sums."""
        training = self.training
        partition = self.model.partition(self.cluster.ranks, training.experts_per_shard, training.expert_parallel_size)
        terms = []
        if training.offloads_parameters:
            gathers = 3 if training.activation_checkpointing and not training.keep_layer_gathered else 2
            terms.append((gathers * training.width, f"{gathers} × {training.width} (parameters)"))
        if training.offloads_optimizer:
            terms.append((2 * training.gradient_width, f"2 × {training.gradient_width} (gradients and their sums)"))
        words = " + ".join(word for _, word in terms) or "0"
        return sum(each for each, _ in terms) * partition, f"({words}) × {partition:,} elements"

    def copying(self, share: float) -> float:
        """Seconds of a micro batch on PCIe."""
        return self.pcie_bytes[0] / (self.cluster.pcie_gb_per_second * 1e9 * share)

    def optimizing(self, share: float) -> float:
        """Seconds of the update on the host; nothing where the states are on the GPUs."""
        if not self.training.offloads_optimizer:
            return 0.0
        touched = ADAM_BYTES * self.model.trained / self.cluster.nodes
        return touched / (self.cluster.memory_gb_per_second * 1e9 * share)

    def whole(self) -> Range:
        host = self.hosting
        network = [self.moving(share) for share in NETWORK_SHARE]
        rows = [self.exchanging(share) for share in NETWORK_SHARE]
        fastest = sum(max(seconds, network[1], host) + rows[1] for seconds in self.computing(FLOP_SHARE[1]))
        slowest = sum(max(seconds, network[0], host) + rows[0] for seconds in self.computing(FLOP_SHARE[0]))
        slowest += len(self.turns.operations) * self.copying(PCIE_SHARE[0])
        return Range(
            "one step",
            fastest + self.optimizing(MEMORY_SHARE[1]),
            slowest + self.optimizing(MEMORY_SHARE[0]),
            "each micro batch: the largest of compute, network and host; slowest: and PCIe; then the optimizer",
        )

    def limit(self) -> tuple[float, str]:
        """What a step takes at least on this cluster, and by what."""
        count = len(self.turns.operations)
        rate = self.training.sequence_parallel_size * self.cluster.gpu_tflops * 1e12 * LIMIT_FLOP_SHARE
        found = {
            f"compute at {LIMIT_FLOP_SHARE:.0%}": self.passes * self.turns.useful_operations / rate,
            "network at its line rate": count * (self.moving(1.0) + self.exchanging(1.0)),
            "host": count * self.hosting,
            "PCIe at its rate": count * self.copying(1.0),
        }
        name = max(found, key=lambda one: found[one])
        return found[name], name

    def parts(self) -> list[Range]:
        """Compute, network, host, PCIe and optimizer of a step, each as if it were alone."""
        count, cluster = len(self.turns.operations), self.cluster
        compute = [sum(self.computing(share)) for share in FLOP_SHARE]
        found = [
            Range(
                "compute",
                compute[1],
                compute[0],
                f"{self.passes} × {sum(self.turns.operations):.4g} FLOP of the costliest groups, "
                f"{self.turns.useful_share:.0%} of it useful / ({self.training.sequence_parallel_size} ranks × "
                f"{cluster.gpu_tflops:g} TFLOP/s × {FLOP_SHARE[1]:.0%} to {FLOP_SHARE[0]:.0%})",
            ),
            Range(
                "network",
                count * self.moving(NETWORK_SHARE[1]),
                count * self.moving(NETWORK_SHARE[0]),
                self._network_formula(count),
            ),
            *self._rows(count),
            Range("host", count * self.hosting, count * self.hosting, f"{count} micro batches × {self.hosting:.2f} s"),
        ]
        moved, words = self.pcie_bytes
        if moved:
            ends = [count * self.copying(share) for share in PCIE_SHARE]
            formula = f"{count} micro batches × {words} / ({cluster.pcie_gb_per_second:g} GB/s × shares)"
            found.append(Range("PCIe", ends[1], ends[0], formula))
        if self.training.offloads_optimizer:
            found.append(
                Range(
                    OPTIMIZER,
                    self.optimizing(MEMORY_SHARE[1]),
                    self.optimizing(MEMORY_SHARE[0]),
                    f"{ADAM_BYTES} B × {self.model.trained:,} / {cluster.nodes} nodes / "
                    f"({cluster.memory_gb_per_second:g} GB/s × {MEMORY_SHARE[1]:.0%} to {MEMORY_SHARE[0]:.0%})",
                )
            )
        return found

    def _network_formula(self, count: int) -> str:
        per = f"({self.link[2]} × {NETWORK_SHARE[1]:.0%} to {NETWORK_SHARE[0]:.0%})"
        if self.training.expert_parallel_size > 1 and self.cluster.nodes > 1:
            return f"{count} micro batches × {self.into_node / 1e12:.3f} TB into a node / {per}"
        return f"{count} micro batches × {self.traffic.value / 1e12:.3f} TB × {self.link[1]:.4f} / {per}"

    def _rows(self, count: int) -> list[Range]:
        if self.training.expert_parallel_size == 1:
            return []
        exchange, tokens = self.exchange, self.tokens
        return [
            Range(
                "rows to experts",
                count * self.exchanging(NETWORK_SHARE[1]),
                count * self.exchanging(NETWORK_SHARE[0]),
                f"{count} micro batches × {exchange.passes} passes of {tokens:,.0f} tokens a rank: "
                f"{exchange.rows_into_node(tokens) / 1e12:.3f} TB into a node, "
                f"{exchange.rows_inside(tokens) / 1e9:.0f} GB of a rank inside it",
            )
        ]


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
        "checkpoint_stop_s": [round(seconds, 3) for seconds in found.stop_s or ()],
    }
    result |= {"useful_slots_share": round(found.turns.useful_slots, 4)}
    if found.limit_s:
        result |= {"step_expected_s": round(found.expected_step_s or 0, 3), "step_least_s": round(found.limit_s[0], 3)}
        result["step_least_by"] = found.limit_s[1]
    if found.step:
        result |= {"step_fastest_s": round(found.step.fastest, 3), "step_slowest_s": round(found.step.slowest, 3)}
        result["checkpoint_cadence_steps"] = list(found.cadence_steps() or ())
    if found.run:
        result |= {"run_fastest_s": round(found.run.fastest), "run_slowest_s": round(found.run.slowest)}
        result["starts"] = list(starts(found, cluster) or ())
        hours = found.gpu_hours(cluster.ranks) or ()
        result["gpu_hours"] = [round(each, 1) for each in hours]
        if price := cluster.price_per_gpu_hour:
            result["cost"] = [round(each * price) for each in hours]
    return result
