"""One plan: everything that a run needs beside everything that it gets, and the verdict."""

from dataclasses import dataclass
from typing import Any

from . import device_memory, disk, duration, host_memory
from .counting import Model
from .device_memory import Peak
from .duration import Duration
from .settings import MB, Cluster, Samples, Training
from .terms import Term, show, total

FITS, TIGHT, MISFIT = "fits", "tight", "does not fit"
TIGHT_SHARE = 0.93  # above this share of a limit a plan is called tight
MARGIN = 1.05  # of memory asked from Slurm over what is planned


@dataclass(frozen=True)
class Limit:
    """Something that a run needs and a cluster has.

    Attributes:
        have: None where unknown; then it is not judged.
        setting: where more of it comes from.
    """

    name: str
    need: float
    have: float | None
    setting: str

    @property
    def share(self) -> float:
        """Need as a share of what there is; 0 where that is unknown."""
        return self.need / self.have if self.have else 0.0

    @property
    def verdict(self) -> str:
        if not self.share <= 1:
            return MISFIT
        return FITS if self.share <= TIGHT_SHARE else TIGHT


@dataclass(frozen=True)
class Plan:
    """A run as planned."""

    model: Model
    training: Training
    samples: Samples
    cluster: Cluster
    peaks: list[Peak]
    host: list[Term]
    disk: list[Term]
    checkpoint: float
    duration: Duration
    served_dtype: str

    @property
    def device_bytes(self) -> float:
        return self.peaks[0].bytes

    @property
    def limits(self) -> list[Limit]:
        """What is judged, the most used first."""
        found = [
            Limit("host memory per node", total(self.host), self.cluster.host_bytes, "profile, train: mem_mb"),
            Limit("disk", total(self.disk), self.cluster.storage_bytes, "plan.storage_tb, or free space of results"),
        ]
        if not self.cluster.cpu:
            found.append(Limit("GPU memory per rank", self.device_bytes, self.cluster.gpu_bytes, "plan.gpu_memory_gib"))
        return sorted(found, key=lambda limit: -limit.share)

    @property
    def verdict(self) -> str:
        return self.limits[0].verdict

    @property
    def binding(self) -> str:
        """Name of the limit that is used most."""
        return self.limits[0].name

    @property
    def host_mb(self) -> int:
        """Slurm's MB to ask for per node: the plan with a margin, in whole GB."""
        return -(-int(MARGIN * total(self.host) / MB) // 1000) * 1000


def make(model: Model, training: Training, samples: Samples, cluster: Cluster, served_dtype: str = "bf16") -> Plan:
    """Plan a run.

    Args:
        served_dtype: format of the converted model, ``bf16``, ``fp32`` or ``fp8``.
    """
    peaks = device_memory.peaks(model, training, samples, cluster)
    each = disk.checkpoint_bytes(model, training, cluster)
    return Plan(
        model,
        training,
        samples,
        cluster,
        peaks,
        host_memory.host_memory(model, training, cluster, peaks[0]),
        disk.disk(model, training, cluster, served_dtype),
        each,
        duration.duration(model, training, samples, cluster, each),
        served_dtype,
    )


def longest_row_that_fits(plan: Plan) -> int | None:
    """Tokens of the longest row for which the device's memory suffices; None on CPU, 0 where none does."""
    if plan.cluster.gpu_bytes is None:
        return None
    size = plan.training.sequence_parallel_size

    def fits(tokens: int) -> bool:
        samples = Samples(None, tokens, tokens, "tried")
        return device_memory.peaks(plan.model, plan.training, samples, plan.cluster)[0].bytes <= plan.cluster.gpu_bytes

    low, high = 0, 1 << 22
    while high - low > size:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low // size * size


def profile_lines(plan: Plan) -> list[str]:
    """Lines to write into the profile where it gives training less than the plan needs."""
    cluster, lines = plan.cluster, []
    if cluster.host_bytes is not None and not total(plan.host) <= cluster.host_bytes:
        lines.append(f"mem_mb: {plan.host_mb}   # planned {total(plan.host) / MB:,.0f} MB and {MARGIN - 1:.0%}")
    save = plan.duration.checkpoint_s + (plan.duration.step.slowest if plan.duration.step else 0)
    if cluster.signal_lead_s is not None and not save <= cluster.signal_lead_s:
        lead = -(-int(2 * save) // 60) * 60
        lines.append(f'slurm_extra: "--signal=USR1@{lead} …"   # one step and one checkpoint take up to {save:,.0f} s')
    return lines


def notes(plan: Plan) -> list[str]:
    """What a reader should know that is no limit."""
    found, run, minutes = [], plan.duration.run, plan.cluster.runtime_minutes
    if run and minutes and not run.slowest <= 60 * minutes:
        jobs = -(-run.slowest // (60 * minutes))
        found.append(
            f"the time limit of {minutes} minutes may end the run before its last step: it saves and needs up to "
            f"{jobs:.0f} jobs; Snakemake's retries continue it"
        )
    found += _cadence_note(plan)
    longest = longest_row_that_fits(plan)
    if longest is not None and plan.samples.source == "estimated":
        found.append(
            f"planned for rows of up to {plan.samples.longest_row:,} tokens; rows of up to {longest:,} fit a GPU"
        )
    for limit in plan.limits:
        if limit.have is None:
            found.append(f"{limit.name} is not judged: {limit.setting} says nothing")
    return found


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


def figures(plan: Plan) -> dict[str, Any]:
    """What the receipt and ``--json`` say; every quantity in bytes, seconds or as a plain count."""
    estimator = host_memory.estimator_host_bytes(plan.model, plan.training, plan.cluster)
    return {
        "verdict": plan.verdict,
        "binding_limit": plan.binding,
        "nodes": plan.cluster.nodes,
        "ranks": plan.cluster.ranks,
        "samples": plan.samples.rows,
        "samples_are": plan.samples.source,
        "longest_row": plan.samples.longest_row,
        "longest_row_that_fits": longest_row_that_fits(plan),
        "tokens_per_rank": device_memory.tokens_per_rank(plan.training, plan.samples),
        **plan.model.figures(),
        "rank_memory_bytes": round(plan.device_bytes),
        "rank_memory_moment": plan.peaks[0].moment,
        "host_memory_bytes": round(total(plan.host)),
        "host_memory_by_deepspeed_estimator_bytes": round(estimator),
        "checkpoint_bytes": round(plan.checkpoint),
        "disk_bytes": round(total(plan.disk)),
        **duration.figures(plan.duration, plan.cluster),
        "rank_memory": {f"{term.name}_bytes": round(term.value) for term in plan.peaks[0].terms},
        "host_memory": {f"{term.name}_bytes": round(term.value) for term in plan.host},
        "disk": {f"{term.name}_bytes": round(term.value) for term in plan.disk},
        "limits": {
            limit.name: {
                "need_bytes": round(limit.need),
                "have_bytes": None if limit.have is None else round(limit.have),
                "verdict": limit.verdict if limit.have else "not judged",
            }
            for limit in plan.limits
        },
        "profile_lines": profile_lines(plan),
        "notes": notes(plan),
    }
