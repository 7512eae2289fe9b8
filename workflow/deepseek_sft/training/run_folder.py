"""Small files of a run folder beside its checkpoints: metrics, status, gate.

``metrics.jsonl``      one object per logged step, in order
``starts.jsonl``       one object per start: where its GPU hours went (``gpu_hours``)
``expert_load.jsonl``  load of every expert, some 40 times in a run
``engine.json``        what all ranks of the newest start read
``status.json``        how the last start ended, written by rank 0: torchrun turns every exit code into 1
``gate.json``          a failed gate; a start of the same run stops at it at once
``stop``               request to save and stop, made by a signal
"""

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import files, json_files
from ..errors import BadInputError, GateError, StageError, StoppedError

if TYPE_CHECKING:
    from .settings import Settings  # read where training is, not where a run is looked at

METRICS, EXPERT_LOAD = "metrics.jsonl", "expert_load.jsonl"
STATUS, GATE, STOP, CONFIG = "status.json", "gate.json", "stop", "engine.json"
EARLIER_CONFIG = "sft_config.py"  # of earlier versions: another start's, once there is CONFIG


@dataclasses.dataclass(frozen=True)
class Status:
    """How a start ended: ``finished``, ``stopped``, ``gate`` or ``bad_input``; ``figures`` of finished ones."""

    attempt: str
    outcome: str
    message: str = ""
    fix: str = ""
    figures: dict[str, Any] = dataclasses.field(default_factory=dict)

    def error(self) -> StageError | None:
        """The error that stands for this end; None for ``finished``."""
        kinds = {"stopped": StoppedError, "gate": GateError, "bad_input": BadInputError}
        return kinds[self.outcome](self.message, self.fix) if self.outcome in kinds else None


def write_status(run: Path, status: Status) -> None:
    files.write_json(run / STATUS, dataclasses.asdict(status))


def read_status(run: Path, attempt: str, patience: float = 10.0) -> Status | None:
    """The status of start ``attempt``; None where rank 0 left none.

    On a shared file system another node's file may show up some seconds late: waits up to ``patience`` seconds.
    """
    deadline = time.monotonic() + patience
    while True:
        try:
            status = Status(**json_files.load(run / STATUS))
            if status.attempt == attempt:
                return status
        except (OSError, ValueError, TypeError):
            pass
        if time.monotonic() > deadline:
            return None
        time.sleep(0.2)


def write_gate(run: Path, kind: str, message: str, value: float | None) -> None:
    """Record a failed gate: ``first_loss`` with the loss, ``not_finite``, or ``spike``."""
    files.write_json(run / GATE, {"kind": kind, "message": message, "value": value})


def check_gate(run: Path, settings: "Settings") -> None:
    """Stop a run whose gate failed before; a gate that the settings have opened since is forgotten.

    Raises:
        GateError: the gate still stands.
    """
    path = run / GATE
    if not path.exists():
        return
    fields = {"kind": str, "message": str, "value": (float, type(None))}
    gate = json_files.read(path, fields, "look in the log for why the run was stopped; remove the file to try again")
    limit, value = settings.first_loss_max, gate.get("value")
    opened = {
        "first_loss": value is not None and (limit is None or value <= limit),
        "not_finite": settings.on_not_finite == "skip",
        "spike": settings.on_spike != "stop" or settings.spike_factor is None,
    }
    if opened.get(gate["kind"], False):
        path.unlink(missing_ok=True)  # every node forgets it
        return
    raise GateError(
        f"this run failed a gate before: {gate['message']}",
        "change the settings (config/README.md, train.first_loss_max, train.on_not_finite, train.on_spike), "
        f"or remove {path} to try the same again",
    )


def cut_metrics(run: Path, step: int) -> None:
    """Drop the lines after ``step``: the steps after the checkpoint that a start resumes from are trained again."""
    for name in (METRICS, EXPERT_LOAD):
        _cut(run / name, step)


def _cut(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json_files.parse(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue  # the last line of a killed run may be torn
    files.write_text(path, "".join(kept))
