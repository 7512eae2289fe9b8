"""What a step did, and what is asked for after it."""

import enum
import time
from dataclasses import dataclass, field
from pathlib import Path

from ... import saving_tiers
from .. import run_folder
from ..health import Verdict
from ..settings import Settings


class Due(enum.IntEnum):
    """Where a step is to be saved."""

    NOWHERE = 0
    NODES = 1
    SHARED = 2


@dataclass(frozen=True)
class StepResult:
    """What a step did, summed over all ranks.

    Attributes:
        loss: mean cross-entropy over the step's trained tokens.
        gradient_norm: before clipping.
        tokens, trained_tokens: without padding; with loss.
        pairs: queries and the keys before them in their sample: what causal attention computes.
        seconds: wall time of the step, data included, without ``waited``.
        phases: this rank's seconds by phase.
        verdict: whether the update was applied, and why not.
        stop_requested: someone asked to save and stop.
        save_due: where so many minutes have passed since the last checkpoint.
        time_is_up: the run has trained as long as it may.
        beside_save: a checkpoint was written meanwhile.
        waited: seconds that the update waited for it.
    """

    loss: float
    gradient_norm: float
    tokens: int
    trained_tokens: int
    pairs: int
    seconds: float
    phases: dict[str, float] = field(default_factory=dict)
    verdict: Verdict = field(default_factory=Verdict)
    stop_requested: bool = False
    save_due: Due = Due.NOWHERE
    time_is_up: bool = False
    beside_save: bool = False
    waited: float = 0.0


class Requests:
    """What rank 0 alone decides, from files and clocks, before each step; all ranks learn it with the step's counts.

    Args:
        stop_files: files whose existence asks for a stop.
        save_seconds: between checkpoints on the shared storage; None saves by steps alone.
        end_seconds: of training in all starts, after which the run ends; None for no limit.
        trained_seconds: of earlier starts.
        local_seconds: between checkpoints on the nodes' own disks; None saves none there.
    """

    def __init__(
        self,
        stop_files: list[Path],
        save_seconds: float | None = None,
        end_seconds: float | None = None,
        trained_seconds: float = 0.0,
        local_seconds: float | None = None,
    ):
        self.stop_files, self.save_seconds, self.end_seconds = stop_files, save_seconds, end_seconds
        self.local_seconds = local_seconds
        self._started = time.monotonic()
        self._saved = dict.fromkeys((Due.NODES, Due.SHARED), self._started)
        self.trained_seconds = trained_seconds

    def wall_seconds(self) -> float:
        """Seconds of training up to now: this start's, and what the earlier ones kept."""
        return self.trained_seconds + time.monotonic() - self._started

    def saved(self, where: Due = Due.SHARED) -> None:
        """There is a checkpoint; minutes to the next are counted from now. The shared storage's counts for both."""
        for place in self._saved:
            if place <= where:
                self._saved[place] = time.monotonic()

    def flags(self) -> tuple[bool, Due, bool]:
        """Stop, save, end."""
        return (
            any(Path(file).exists() for file in self.stop_files),
            self._due(),
            self.end_seconds is not None and self.wall_seconds() >= self.end_seconds,
        )

    def _due(self) -> Due:
        limits = {Due.SHARED: self.save_seconds, Due.NODES: self.local_seconds}
        now = time.monotonic()
        passed = [where for where, limit in limits.items() if limit is not None and now - self._saved[where] >= limit]
        return max(passed, default=Due.NOWHERE)


def requests_of(settings: Settings, stop_files: list[Path], trained_seconds: float, on_nodes: bool) -> Requests:
    """
    Args:
        on_nodes: whether this start saves to the nodes' own disks, too.
    """
    return Requests(
        stop_files,
        save_seconds=saving_tiers.shared_seconds(settings),
        end_seconds=settings.max_seconds,
        trained_seconds=trained_seconds,
        local_seconds=saving_tiers.local_seconds(settings) if on_nodes else None,
    )


def stop_files(run: Path, stop_file: str | None) -> list[Path]:
    """Files whose existence asks for a stop: the run's own, made by a signal, and the user's."""
    return [run / run_folder.STOP] + ([Path(stop_file)] if stop_file else [])
