"""One plan: everything that a run needs beside everything that it gets, and the verdict."""

from dataclasses import dataclass
from typing import Any

from . import device_memory, disk, duration, evaluation_time, host_memory, own_disks
from .counting import Model
from .deployment import Deployment
from .device_memory import Peak
from .duration import Duration
from .own_disks import OwnDisks
from .settings import MB, Cluster, Samples, Training
from .terms import Term, show, total

FITS, TIGHT, MISFIT = "fits", "tight", "does not fit"
DISK, OWN_DISK = "disk", "disk of a node"
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
    """A run as planned, and how its model is served and evaluated; not planned on CPU."""

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
    deployment: Deployment | None = None
    evaluation: tuple[evaluation_time.Stage, ...] = ()

    @property
    def device_bytes(self) -> float:
        return self.peaks[0].bytes

    @property
    def own_disks(self) -> OwnDisks | None:
        """Checkpoints on the nodes' own disks, as configured or as they could be; None where they make no sense."""
        return own_disks.of(self.training, self.cluster, self.duration, self.checkpoint)

    @property
    def limits(self) -> list[Limit]:
        """What is judged, the most used first."""
        found = [
            Limit("host memory per node", total(self.host), self.cluster.host_bytes, "profile, train: mem_mb"),
            Limit(DISK, total(self.disk), self.cluster.storage_bytes, "plan.storage_tb, or free space of results"),
        ]
        if self.training.checkpoints and self.own_disks:
            found.append(Limit(OWN_DISK, self.own_disks.disk, self.cluster.local_bytes, "plan.local_tb"))
        if not self.cluster.cpu:
            found.append(Limit("GPU memory per rank", self.device_bytes, self.cluster.gpu_bytes, "plan.gpu_memory_gib"))
        return sorted(found, key=lambda limit: -limit.share)

    @property
    def verdict(self) -> str:
        return self.limits[0].verdict

    @property
    def exceeded(self) -> str:
        """Every limit that is exceeded, the worst first, in words; empty where none is."""
        over = [limit for limit in self.limits if not limit.share <= 1]
        return "; ".join(
            f"{limit.name} {show(limit.need, 'B')} of {show(limit.have or 0, 'B')} ({limit.share:.0%})"
            for limit in over
        )

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


def node_has(plan: Plan) -> bool:
    """Whether a node has the memory that training needs, as far as that is known."""
    return plan.cluster.node_bytes is None or plan.host_mb * MB <= plan.cluster.node_bytes


def figures(plan: Plan) -> dict[str, Any]:
    """What a plan counts, for receipts and ``--json``; every quantity in bytes, seconds or as a plain count."""
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
        "expert_parallel_size": plan.training.expert_parallel_size,
        "tokens_per_rank": device_memory.tokens_per_rank(plan.training, plan.samples),
        **plan.model.figures(),
        "rank_memory_bytes": round(plan.device_bytes),
        "rank_memory_moment": plan.peaks[0].moment,
        "host_memory_bytes": round(total(plan.host)),
        "host_memory_by_deepspeed_estimator_bytes": round(estimator),
        "checkpoint_bytes": round(plan.checkpoint),
        "disk_bytes": round(total(plan.disk)),
        **duration.figures(plan.duration, plan.cluster),
        **own_disks.figures(plan.own_disks, plan.training),
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
    }
