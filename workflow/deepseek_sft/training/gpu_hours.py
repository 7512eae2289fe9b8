"""Where a run's GPU hours went: ``starts.jsonl`` of its folder, one object for each start that came to a step.

A start drops the metrics of steps that it trains again; what they took stands in its line. Needs no torch.

    {"attempt", "ranks", "began", "first_step", "resumed_step",
     "before": null | {"ended", "steps", "seconds", "seconds_save", "kept_save"}}

``began`` is when rank 0's process did, ``first_step`` when its first step did, seconds since the epoch. ``before`` is
what an earlier start left: when its last line or checkpoint was written, steps and saves that are trained again, and
the save of the checkpoint that this start goes on from.
"""

import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

from .. import json_files
from ..engines import MARKER
from . import checkpoints, run_folder

STARTS = "starts.jsonl"


@dataclasses.dataclass(frozen=True)
class GpuHours:
    """GPU hours of a run (of its ranks, on CPU).

    Attributes:
        trained: in steps that count.
        saved: in checkpoints that count: while the ranks stood still, and by which steps beside their writing were
            slower.
        validated: in measurements of the validation loss that count.
        again: in steps and checkpoints after the last checkpoint of a start, trained again later.
        starting: from a start's ranks to its first step.
        waiting: between two starts, when the run trained on nothing: queue, preflight, and until an end was noticed.
        starts: number of starts.
        start_seconds, wait_seconds, save_seconds: of each.
    """

    trained: float
    saved: float
    again: float
    starting: float
    waiting: float
    starts: int
    start_seconds: tuple[float, ...]
    wait_seconds: tuple[float, ...]
    save_seconds: tuple[float, ...]
    validated: float = 0.0

    @property
    def held(self) -> float:
        """By ranks, from a start's begin to its last line, without waiting."""
        return self.served + self.saved + self.again + self.starting

    @property
    def share_trained(self) -> float:
        """Of those held."""
        return self.trained / self.held if self.held else 0.0

    @property
    def served(self) -> float:
        """In what counts: steps, and measurements of the validation loss."""
        return self.trained + self.validated

    def rows(self, spent: float | None = None) -> list[tuple[str, str]]:
        """Name and text of each.

        Args:
            spent: GPU hours of all attempts on the nodes, where they are known; else those that ranks held count.
        """
        whole, beside, of = self._whole(spent)
        rows = [
            ("trained", f"{self.trained:,.2f} ({of})"),
            *([("validating", f"{self.validated:,.2f}")] if self.validated else []),
            ("lost", f"{lost(whole, self.served):,.2f}, that is:"),
            ("– saving", f"{self.saved:,.2f}"),
            ("– trained again", f"{self.again:,.2f}, steps and saves after the checkpoint that a restart went on from"),
            ("– starting", f"{self.starting:,.2f} in {self.starts} start{'' if self.starts == 1 else 's'}"),
        ]
        if beside is not None:
            rows.append(("– beside", f"{beside:,.2f}, before ranks began, after they ended, attempts without a step"))
        return [*rows, ("waiting between starts", f"{self.waiting:,.2f} of as many ranks")]

    def text(self, spent: float | None = None) -> str:
        """One line for people."""
        whole, beside, of = self._whole(spent)
        return (
            f"{self.trained:,.2f} trained ({of}), {f'{self.validated:,.2f} validating, ' if self.validated else ''}"
            f"{lost(whole, self.served):,.2f} lost: {self.saved:,.2f} saving, "
            f"{self.again:,.2f} trained again, {self.starting:,.2f} starting"
            f"{'' if beside is None else f', {beside:,.2f} beside'}; {self.waiting:,.2f} waiting between starts"
        )

    def _whole(self, spent: float | None) -> tuple[float, float | None, str]:
        """All that counts, what of it ranks did not hold (None where that is not known), the share that was trained."""
        known = spent is not None and spent > self.held
        whole = spent if known else self.held
        share = self.trained / whole if whole else 0.0
        return whole, spent - self.held if known else None, f"{share:.1%} of those {'spent' if known else 'held'}"

    def typical(self) -> dict[str, float]:
        """Median seconds of a start, a save and a wait, where there was one."""
        seen = {"start": self.start_seconds, "save": self.save_seconds, "again": self.wait_seconds}
        return {name: statistics.median(seconds) for name, seconds in seen.items() if seconds}


def lost(spent: float, served: float) -> float:
    """What served no step that counts: the one rule for GPU hours that are told as lost in training.

    Saves, starts, steps that were trained again, attempts that came to no step, and waiting for an end to be noticed.
    """
    return max(0.0, spent - served)


def left_behind(run: Path, step: int) -> dict[str, Any] | None:
    """What an earlier start left after ``step``; asked before its lines are dropped."""
    path = run / run_folder.METRICS
    try:
        lines, ended = _lines(path), path.stat().st_mtime
    except OSError:
        return None
    if not lines:
        return None
    marker = checkpoints.folder_of(run, step) / MARKER
    committed = max(ended, marker.stat().st_mtime) if marker.exists() else ended
    again = [line for line in lines if line["step"] > (step or -1)]  # without a checkpoint the base's loss as well
    if not again:  # saved and ended: no line says how long that took
        return {"ended": committed, "steps": 0, "seconds": 0.0, "seconds_save": 0.0, "kept_save": committed - ended}
    steps = lines[-1]["step"] - step  # also those that were not logged
    # A line reports the checkpoints before it: the first those of the one that is there.
    kept, *lost = (_saving(line) for line in again)
    seconds = steps * statistics.fmean([line["seconds"] for line in again if line["step"]] or [0.0])
    seconds += sum(line.get("seconds_validation") or 0.0 for line in again)
    return {"ended": ended, "steps": steps, "seconds": seconds, "seconds_save": sum(lost), "kept_save": kept}


def note_start(
    run: Path, attempt: str, ranks: int, began: float, first_step: float, resumed: int, before: dict[str, Any] | None
) -> None:
    """Add a start; by the first rank, before its first step."""
    line = {"attempt": attempt, "ranks": ranks, "began": began, "first_step": first_step, "resumed_step": resumed}
    with open(run / STARTS, "a", encoding="utf-8") as stream:
        stream.write(json.dumps(line | {"before": before}) + "\n")


def read(run: Path) -> GpuHours | None:
    """GPU hours up to the last line of metrics; None for runs that were begun before starts were noted."""
    try:
        return of(run, _lines(run / run_folder.METRICS))
    except OSError:
        return None


def of(run: Path, metrics: list[dict[str, Any]]) -> GpuHours | None:
    """The same, with the lines of metrics, by step, where they have been read."""
    try:
        starts = [one for one in _parsed(run / STARTS) if _is_start(one)]
    except OSError:
        return None
    metrics = [one for one in metrics if _is_line(one)]
    if not starts or starts[0]["resumed_step"]:
        return None
    spent = dict.fromkeys(("trained", "saved", "validated", "again", "starting", "waiting"), 0.0)
    waits: list[float] = []
    saves: list[float] = []
    for earlier, start in zip([None, *starts], starts, strict=False):
        spent["starting"] += start["ranks"] * (start["first_step"] - start["began"])
        if earlier is not None and isinstance(before := start["before"], dict):
            spent["again"] += earlier["ranks"] * (before["seconds"] + before["seconds_save"])
            spent["saved"] += earlier["ranks"] * before["kept_save"]
            saves += [before["kept_save"]] if before["kept_save"] else []
            waits.append(max(0.0, start["began"] - before["ended"]))
            spent["waiting"] += start["ranks"] * waits[-1]
    last = 0
    for line in metrics:
        # The start that trained it: of those that resumed before it the last, since each begins where lines were cut.
        step = line["step"] or 1  # the base's, step 0, is measured before the first
        ranks = [start["ranks"] for start in starts if start["resumed_step"] < step or start is starts[0]][-1]
        slowed = line.get("seconds_slowed") or 0.0
        spent["trained"] += ranks * (line.get("seconds", 0.0) * (line["step"] - last) - slowed)
        spent["saved"] += ranks * _saving(line)
        spent["validated"] += ranks * (line.get("seconds_validation") or 0.0)
        last = line["step"]
    saves += [seconds for line in metrics if (seconds := _saving(line))]
    hours = {name: seconds / 3600 for name, seconds in spent.items()}
    begun = tuple(start["first_step"] - start["began"] for start in starts)
    return GpuHours(
        **hours, starts=len(starts), start_seconds=begun, wait_seconds=tuple(waits), save_seconds=tuple(saves)
    )


def _saving(line: dict[str, Any]) -> float:
    """Seconds that checkpoints took since the line before, however they were written."""
    return (line.get("seconds_save") or 0.0) + (line.get("seconds_slowed") or 0.0)


def _parsed(path: Path) -> list[Any]:
    found = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            found.append(json_files.parse(text))
        except ValueError:
            continue  # the last line of a killed run may be torn
    return found


def _lines(path: Path) -> list[dict[str, Any]]:
    """Lines of metrics with a step and its seconds, and the base's; a torn or edited line counts as none."""
    return [one for one in _parsed(path) if _is_line(one)]


def _is_line(one: Any) -> bool:
    number = (int, float)
    return _has(one, step=int, seconds=number) or (_has(one, step=int, seconds_validation=number) and one["step"] == 0)


def _is_start(one: Any) -> bool:
    number = (int, float)
    kinds = {"ranks": int, "began": number, "first_step": number, "resumed_step": int}
    before = one.get("before") if isinstance(one, dict) else None
    told = before is None or _has(before, **dict.fromkeys(("ended", "seconds", "seconds_save", "kept_save"), number))
    return _has(one, **kinds) and told


def _has(one: Any, **kinds: Any) -> bool:
    return isinstance(one, dict) and all(
        isinstance(one.get(key), kind) and not isinstance(one[key], bool) for key, kind in kinds.items()
    )
