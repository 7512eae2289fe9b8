"""A rehearsal: training's first steps on its own nodes and settings, left and entered again, in a folder of its own.

The first start loads, trains three steps, saves, and goes on to step 5 without saving: the unbroken run. The second one
resumes from step 3 and trains steps 4 and 5 again. Its run is no start of the real one: another run id, another folder.
"""

import dataclasses
import shutil
import time
from pathlib import Path
from typing import Any, Literal

from .. import engines, files, json_files, time_limits
from ..errors import BadInputError, CrashError
from ..slurm.nodes import NodeEnvironment
from . import checkpoints, run_folder, stage
from .settings import Settings

SAVED, END = 3, 5  # the step after which it saves, and the last one of both starts
PARTS = ("unbroken", "resumed")
Part = Literal["unbroken", "resumed"]


def settings_of(chosen: Settings) -> Settings:
    """Training's settings with the cadence of a rehearsal; what shapes the steps stays."""
    return dataclasses.replace(
        chosen,
        run_name=f"rehearsal {chosen.run_name}".strip(),
        max_hours=None,
        save_every_steps=SAVED,
        save_every_minutes=None,
        keep_checkpoints=1,
        checkpoints=(),
        async_save="off",  # what writing takes is what the plan is held against
        log_every_steps=1,
        validation=None,
    )


def prepare(
    base_receipt: Path,
    tokens_receipt: Path,
    settings_file: Path,
    output: Path,
    node: NodeEnvironment,
    spread: int | None = None,
) -> stage.Run:
    """The rehearsal's run, with training's own schedule.

    Raises:
        BadInputError: as ``stage.prepare``; or the run is as short as a rehearsal.
    """
    run = stage.prepare(base_receipt, tokens_receipt, settings_file, output, node, settings_of, spread)
    if run.schedule.steps <= END:
        raise BadInputError(
            f"the run has {run.schedule.steps} steps, a rehearsal takes {END}: there is nothing to rehearse",
            "train it: snakemake --profile <profile> [--configfile <yours>]",
        )
    return dataclasses.replace(run, end_after=END)


def train(
    run: stage.Run,
    node: NodeEnvironment,
    accelerator: str,
    part: Part,
    record: Path,
    plan: time_limits.Planned | None = None,
) -> None:
    """Train one part on this node; the first node writes what it saw to ``record``.

    Raises:
        CrashError: the part ended early, or did not begin where it should.
        StageError: as ``stage.train``.
    """
    started = time.time()
    saved = checkpoints.newest(run.folder, run.run_id)
    if part == "resumed" and (saved is None or saved.step != SAVED):
        raise CrashError(f"{run.folder} holds no committed checkpoint of step {SAVED} to resume from", "rehearse again")
    stage.train(run, node, accelerator, None, record, plan)
    if node.node_rank == 0:
        allowed = time_limits.before_measuring(plan or time_limits.Planned(), run.settings.stated_minutes)
        files.write_json(record, observe(run, node, part, started) | {"limits": allowed})


def observe(run: stage.Run, node: NodeEnvironment, part: Part, started: float) -> dict[str, Any]:
    """What a finished part left: metrics of its steps, seconds until its first one, its checkpoint.

    Raises:
        CrashError: the part ended early, or did not begin where it should.
    """
    metrics = (run.folder / run_folder.METRICS).read_text(encoding="utf-8")
    lines = [json_files.parse(line) for line in metrics.splitlines()]
    saved = checkpoints.newest(run.folder, run.run_id)
    steps = [line["step"] for line in lines]
    status = json_files.read(run.folder / run_folder.STATUS)
    if steps != list(range(1, END + 1)) or saved is None or saved.step != SAVED:
        found = f"metrics of steps {steps}, checkpoint of {f'step {saved.step}' if saved else 'no step'}"
        raise CrashError(f"the {part} part of the rehearsal left {found}", f"look at the ranks' logs in {run.folder}")
    return {
        "part": part,
        "run_id": run.run_id,
        "run": str(run.folder),
        "hosts": list(node.hosts),
        "ranks": node.world_size,
        "ranks_per_node": node.ranks_per_node,
        "planned_steps": run.schedule.steps,
        "start_seconds": round(status["figures"]["first_step_at"] - started, 3),
        "wall_seconds": round(time.time() - started, 3),
        "checkpoint_bytes": sum(saved.marker["files"].values()),
        "metrics": lines if part == "unbroken" else lines[SAVED:],
        "inputs": run.inputs,
    }


def remove_checkpoints(rehearsals: Path) -> list[Path]:
    """Remove the checkpoints of all rehearsals below a folder, markers first; logs and metrics stay.

    Returns:
        The folders that were removed.
    """
    found = sorted(path for path in rehearsals.glob("*/runs/*/step_*") if path.is_dir())
    for folder in found:
        (folder / engines.MARKER).unlink(missing_ok=True)
        shutil.rmtree(folder)
    return found
