"""Every time-out of a run, from one set of numbers: what the plan says a step, a save and a start take.

Watchdog, NCCL, Slurm's signal and preflight each end what takes too long. They ask here, so that none of them ends what
another one allows, and what is healthy by the plan is ended by none. Seconds throughout; needs no torch.
"""

import re
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from .json_files import Maybe

PHASES = ("start", "step", "save")  # what the watchdog tells apart
LEAST = {"start": 3600.0, "step": 1800.0, "save": 3600.0}  # before anything is measured, and where no plan knows better
FACTOR = 4.0  # of the plan's slowest, then of the measured median: rows are padded, groups wait for their slowest
FLOOR = 600.0  # least limit from measured times
MEASURED_STEPS = 3  # of a start, after which the measured median counts
MEASURED_SAVES = 1
STATED_FACTOR = 2.0  # a stated limit must be this many times the plan's slowest: it knows no padding
COLLECTIVE_MARGIN = 600.0  # that a collective waits longer than the watchdog, which knows more
LEAD_MARGIN = 1.25  # of the signal's lead over the slowest planned step and a checkpoint


@dataclass(frozen=True)
class Planned:
    """The slowest that a plan expects, in seconds; 0 where no plan knows it (on CPU, or without a plan).

    Attributes:
        start: reading the base or a checkpoint, whichever takes longer.
        step: one optimizer step.
        save: one checkpoint.
    """

    start: float = 0.0
    step: float = 0.0
    save: float = 0.0

    # What is needed of the plan's receipt.
    FIGURES: ClassVar = {"figures": dict.fromkeys(("checkpoint_s", "loading_s", "step_slowest_s"), Maybe(float))}

    @classmethod
    def of_figures(cls, figures: Mapping[str, Any]) -> "Planned":
        """From the figures of a plan's receipt; older ones lack ``loading_s``."""
        save = figures.get("checkpoint_s") or 0.0
        start = max(save, figures.get("loading_s") or 0.0)  # a resumed start reads a checkpoint
        return cls(start, figures.get("step_slowest_s") or 0.0, save)


def before_measuring(planned: Planned, stated: Mapping[str, float | None] | None = None) -> dict[str, float]:
    """Limit of each phase at the start of a run.

    Args:
        stated: minutes that the configuration gives (``train.hang_minutes``); None for a phase, or for all, derives it.
    """
    minutes = {phase: (stated or {}).get(phase) for phase in PHASES}
    return {
        phase: max(LEAST[phase], FACTOR * getattr(planned, phase)) if (given := minutes[phase]) is None else 60 * given
        for phase in PHASES
    }


def after_measuring(seconds: Iterable[float], most: float, least: float = 0.0) -> float:
    """Limit of a phase once it was seen.

    Args:
        seconds: measured times; at least one.
        most: the longest limit that collectives were set up for.
        least: a limit that this one must not be below.
    """
    return min(most, max(FLOOR, least, FACTOR * statistics.median(seconds)))


def collectives(limits: Mapping[str, float]) -> float:
    """Time-out of NCCL and gloo: after every limit of the watchdog, so that the watchdog speaks first."""
    return max(limits.values()) + COLLECTIVE_MARGIN


def signal_lead(planned: Planned) -> float:
    """Before a job's end at which training must be told to stop: it ends its step, then saves."""
    return LEAD_MARGIN * (planned.step + planned.save)


def describe(limits: Mapping[str, float]) -> str:
    """One line for logs."""
    shown = ", ".join(f"{phase} {seconds / 60:.0f} min" for phase, seconds in limits.items())
    return f"limits: {shown}; a collective {collectives(limits) / 60:.0f} min"


@dataclass(frozen=True)
class UnderLoad:
    """Preflight's limits for the nodes' common measurement.

    Attributes:
        loading: until every rank has imported torch: hundreds of cold starts from one shared folder.
        joining: after that, until all ranks have found each other, which waits for the slowest node's imports.
        measuring: after that, until the end.
    """

    loading: float
    joining: float
    measuring: float

    @property
    def total(self) -> float:
        return self.loading + self.joining + self.measuring


def under_load(ranks: int) -> UnderLoad:
    """Preflight's limits for so many ranks: imports and connections grow with them."""
    loading = 300.0 + 2 * ranks
    return UnderLoad(loading, joining=loading + 60.0, measuring=240.0 + ranks)


def problems(
    planned: Planned,
    stated: Mapping[str, float | None] | None,
    lead: float | None,
    ends_within: bool,
    slurm_extra: str = "",
) -> list[tuple[str, str]]:
    """What would end a healthy step, save or start: problem and fix, with key and figures.

    Args:
        stated: ``train.hang_minutes``.
        lead: of Slurm's signal, in seconds; None where the profile asks for none.
        ends_within: whether even the slowest run ends before the job's time limit.
        slurm_extra: the profile's words, with ``--signal``.
    """
    found = []
    for phase in PHASES:
        minutes, slowest = (stated or {}).get(phase), getattr(planned, phase)
        if minutes is not None and 60 * minutes < STATED_FACTOR * slowest:
            found.append(
                (
                    f"train.hang_minutes.{phase}: {minutes:g} minutes, but the plan's slowest {phase} takes "
                    f"{slowest / 60:.1f}: a healthy one would be ended as a hang",
                    f"train.hang_minutes: {{{phase}: null}} derives it from the plan; or at least "
                    f"{-(-STATED_FACTOR * slowest // 60):.0f}",
                )
            )
    healthy = planned.step + planned.save
    if lead is not None and lead < healthy and not ends_within:
        found.append(
            (
                f"profile, set-resources: train: slurm_extra: --signal comes {lead:.0f} s before the job's end, but "
                f"the plan's slowest step takes {planned.step:.0f} s and a checkpoint {planned.save:.0f} s: the save "
                "would be cut off",
                f'slurm_extra: "{with_lead(slurm_extra, planned)}"',
            )
        )
    return found


def with_lead(slurm_extra: str, planned: Planned) -> str:
    """The profile's ``slurm_extra`` with a signal that comes early enough, in whole minutes."""
    lead = -(-int(signal_lead(planned)) // 60) * 60
    return re.sub(r"(--signal[= ]\S*@)\d+", rf"\g<1>{lead}", slurm_extra)
