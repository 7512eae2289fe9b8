"""The training stage on one node: from two receipts and a settings file to a checkpoint and a receipt.

Every node runs this at the same time and decides the same from the same files. The first node alone writes: run
folder, configuration, lock, receipt.
"""

import dataclasses
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .. import engines, expert_shards, families, files, json_files, leftovers, receipts, time_limits
from ..cli import say
from ..data import loss_rows
from ..data import tokens as token_files
from ..errors import BadInputError, CrashError, StoppedError
from ..expert_shards import AUTO
from ..settings import field_types
from ..slurm.nodes import NodeEnvironment
from . import checkpoints, early_stop, launch, lock, new_runs, run_folder, same_training, schedule, settings, validation
from .schedule import Schedule
from .settings import Settings


@dataclasses.dataclass(frozen=True)
class Run:
    """One run, as all nodes see it.

    Attributes:
        folder: ``<output>/runs/<run id>``.
        base, tokens: folders of the base model and of the token dataset.
        base_sums: file with the sums of the base's files; None where prepare_model wrote none.
        inputs: receipt entries of what the run was made from.
        end_after: step after which a rehearsal ends, see ``rehearsal``; None trains to the end.
        stated: settings as the configuration says them where a run settles their value.
        trains, begun: see ``same_training.Found``.
        held_out: folder of the held-out token dataset; None where nothing is validated.
        under: the id that these settings would have of their own, where the run is one that others have begun.
    """

    run_id: str
    folder: Path
    output: Path
    base: Path
    tokens: Path
    settings: Settings
    schedule: Schedule
    inputs: dict[str, dict[str, str]]
    base_sums: str | None = None
    end_after: int | None = None
    stated: dict[str, Any] = dataclasses.field(default_factory=dict)
    trains: str = ""
    begun: dict[str, int] = dataclasses.field(default_factory=dict)
    under: str = ""
    held_out: Path | None = None

    def ends_with(self, checkpoint: checkpoints.Checkpoint) -> bool:
        """Whether nothing is left to train after ``checkpoint``: the last step, or the end of the time, or of a loss
        that no longer falls."""
        stop = self.settings.validation and self.settings.validation.early_stop
        if stop and validation.has_ended(validation.of(checkpoint.progress), stop):
            return True
        limit = self.settings.max_seconds
        timed_out = limit is not None and checkpoint.progress.get("wall_seconds", 0.0) >= limit
        return checkpoint.step >= self.schedule.steps or timed_out


def prepare(
    base_receipt: Path,
    tokens_receipt: Path,
    settings_file: Path,
    output: Path,
    node: NodeEnvironment,
    change: Callable[[Settings], Settings] = lambda chosen: chosen,
    spread: int | None = None,
) -> Run:
    """Read and check everything that can be checked before a process starts.

    Args:
        change: makes the settings of another run of the file's.
        spread: ranks over which the plan spreads experts, where the settings leave it to it.

    Raises:
        BadInputError: a receipt, a setting, or a combination of them is wrong.
    """
    chosen = change(settings.read(settings_file))
    base = receipts.read(base_receipt, "prepare_model", {"result": {"base": str}})
    tokens = receipts.read(tokens_receipt, "tokenize_data", {"result": {"tokens": str}})
    base_folder, tokens_folder = Path(base["result"]["base"]).resolve(), Path(tokens["result"]["tokens"]).resolve()
    statistics = _read_statistics(tokens_folder)
    config = families.read_config(base_folder)
    held_out = _held_out(tokens, tokens_receipt) if chosen.validation else None
    if held_out:
        statistics["longest"] = max(statistics["longest"], _read_statistics(held_out)["longest"])
    _check(chosen, config, statistics, node)
    inputs = {
        "base": receipts.input_entry(base_receipt),
        "tokens": receipts.input_entry(tokens_receipt),
        "settings": receipts.input_entry(settings_file),
    }
    output = output.resolve()
    stated = {key: AUTO for key in ("experts_per_shard", "expert_parallel_size") if getattr(chosen, key) == AUTO}
    made_from = same_training.Inputs(base, tokens, statistics["rows"], statistics["samples"])
    found = same_training.find(output / "runs", chosen, made_from, node.world_size)
    chosen = new_runs.settle(chosen, output / "runs" / found.run_id, found.run_id, config, spread)
    _check_experts(chosen, config, node)
    chosen = schedule.with_accumulation(chosen, statistics["rows"], statistics["samples"])
    steps = schedule.plan(chosen, statistics["rows"], node.world_size)
    if found.newest:
        steps = same_training.schedule_from(steps, chosen, found.newest, found.begun)
    folder, sums = output / "runs" / found.run_id, _sums(base)
    return Run(
        *(found.run_id, folder, output, base_folder, tokens_folder, chosen, steps, inputs, sums),
        stated=stated,
        trains=found.trains,
        begun=found.begun,
        under="" if found.run_id == found.own_id else found.own_id,
        held_out=held_out,
    )


def planned(plan_receipt: Path | None) -> time_limits.Planned:
    """What the plan takes the slowest step, save and start for; nothing, which is said, without a readable plan."""
    if plan_receipt is None:
        return time_limits.Planned()
    try:
        return time_limits.Planned.of_figures(
            receipts.read(plan_receipt, plan_receipt.stem, time_limits.Planned.FIGURES)["figures"]
        )
    except BadInputError as error:
        say(f"warning: {error.problem}; time limits are the least ones, whatever the plan said")
        return time_limits.Planned()


def planned_spread(plan_receipt: Path | None) -> int | None:
    """Ranks over which the plan spreads experts; None without a plan that says it."""
    if plan_receipt is None:
        return None
    try:
        told = receipts.read(plan_receipt, plan_receipt.stem, {"figures": {"expert_parallel_size": int}})
    except BadInputError:  # what is wrong with it says who needs it: `planned`, and who has left the size open
        return None
    return told["figures"]["expert_parallel_size"]


def train(
    run: Run,
    node: NodeEnvironment,
    accelerator: str,
    stop_file: Path | None,
    receipt: Path,
    plan: time_limits.Planned | None = None,
) -> None:
    """Train to the last step, or recognise that it is done, and write the receipt (first node).

    Args:
        plan: the slowest times that are expected, from which the limits of the watchdog and of collectives follow.

    Raises:
        StoppedError, GateError, BadInputError, CrashError: as the contract of exit codes says.
        launch.Terminated: on SIGTERM or SIGINT.
    """
    if early_stop.arrived():
        raise StoppedError("stopped on request before training began", "the same command starts it again")
    plan, stated = plan or time_limits.Planned(), run.settings.stated_minutes
    for problem, fix in time_limits.problems(plan, stated, lead=None, ends_within=True):
        raise BadInputError(problem, fix)
    derived = tuple(phase for phase in time_limits.PHASES if stated.get(phase) is None)
    seconds = time_limits.before_measuring(plan, stated)
    worker = engines.ENGINES[run.settings.engine].worker
    start = launch.Start(run.folder, accelerator, seconds, stop_file, run.end_after, derived, worker)
    if node.node_rank > 0:
        if not _is_finished(run, stop_file):
            _check_tokens(run)
            _conclude(run, node, _run_ranks(run, node, start))
        return
    say(f"run {run.run_id} in {run.folder}")
    if run.under:
        say(f"which trains the same as these settings on other ranks; a run of their own would be {run.under}")
    say(run.schedule.describe())
    say(time_limits.describe(start.limits))
    for key in run.stated:
        say(f"train.{key}: auto is {getattr(run.settings, key)} in this run")
    say(f"gradients are summed over the ranks in {run.settings.gradient_communication_dtype}")
    with lock.hold(run.folder, node.attempt) as held:
        if _is_finished(run, stop_file):
            say("finished already; nothing to train (train.run_name forces a new run)")
        else:
            checked = _check_tokens(run)
            say(f"token files: {checked} shards as they were written" if checked else "token files: without checksums")
            _write_run(run, node, accelerator)
            _conclude(run, node, _run_ranks(run, node, start, held.check))
        if run.end_after is None:
            write_receipt(run, receipt)


def write_receipt(run: Run, receipt: Path) -> None:
    """Write the receipt of a finished run after checking its last checkpoint.

    Raises:
        CrashError: the last step has no committed checkpoint.
    """
    found_all = checkpoints.committed(run.folder, run.run_id)
    last = found_all[-1] if found_all else None
    if last is None or not run.ends_with(last):
        found = f"step {last.step}" if last else "none"
        raise CrashError(f"training ended, but the newest committed checkpoint in {run.folder} is {found}")
    converted = validation.result(found_all, run.settings.validation) or last
    if converted.step != last.step:
        say(f"the result is the checkpoint of step {converted.step}, whose validation loss is the lowest")
    receipts.write(
        receipt,
        "train",
        inputs=run.inputs,
        settings=run.settings.shaping() | {"max_hours": run.settings.max_hours},
        result={
            "checkpoint": str(converted.folder),
            "run": str(run.folder),
            "metrics": str(run.folder / run_folder.METRICS),
        },
        figures=figures_of(run.run_id, last)
        | validation.figures(last, converted, run.settings.validation)
        | _losses(converted),
        hosts=last.progress["hosts"],
    )


def figures_of(run_id: str, last: checkpoints.Checkpoint) -> dict[str, Any]:
    """Figures of the receipt, from the last checkpoint's marker."""
    progress = last.progress
    recent = progress["recent_losses"]
    return {
        "run_id": run_id,
        "steps": last.step,
        "planned_steps": last.marker["steps"],
        "skipped_steps": progress["health"]["skipped"],
        "spikes": progress["health"]["spikes"],
        "resumed_from_step": progress["resumed_from_step"],
        "first_loss": progress["first_loss"],
        "last_loss": sum(recent) / len(recent) if recent else None,
        "tokens": progress["tokens"],
        "trained_tokens": progress["trained_tokens"],
        "world_size": last.marker["world_size"],
        "nodes": progress["nodes"],
        "useful_slots_share": _share(progress.get("slots_tokens"), progress.get("slots")),
        "seconds": progress["seconds"],
        "tokens_per_second": progress["tokens"] / max(progress["seconds"], 1e-9),
        "tflops_per_rank": progress["tflops_per_rank"],
        "mfu": progress["mfu"],
        "save_seconds": progress["save_seconds"],
        "wall_seconds": progress["wall_seconds"],
        "parameters": progress["parameters"],
        "checkpoint_bytes": sum(last.marker["files"].values()),
        "peak_memory_gib": progress["peak_memory_gib"],
        "memory_before_model_gib": progress.get("memory_before_model_gib"),
        "kept_by_allocator_gib": progress.get("kept_by_allocator_gib"),
    }


def _losses(converted: checkpoints.Checkpoint) -> dict[str, Any]:
    """Losses of a few rows under the weights that are converted, where they were measured."""
    return {loss_rows.KEY: converted.marker[loss_rows.KEY]} if loss_rows.KEY in converted.marker else {}


def _share(part: int | None, whole: int | None) -> float | None:
    """None for a run that ended before its slots were counted."""
    return round(part / whole, 4) if part and whole else None


def _is_finished(run: Run, stop_file: Path | None) -> bool:
    """Whether the last step is committed; raises where this start must not go on."""
    newest = checkpoints.newest(run.folder, run.run_id)
    if newest and run.ends_with(newest):
        return True
    run_folder.check_gate(run.folder, run.settings)
    if stop_file and stop_file.exists():
        raise StoppedError(f"the stop file {stop_file} exists", "remove it to train on")
    return False


def _write_run(run: Run, node: NodeEnvironment, accelerator: str) -> None:
    """Make the run folder ready for a start: configuration written, unfinished checkpoints set aside."""
    leftovers.sweep([run.folder, *run.folder.glob("step_*")])
    checkpoints.set_aside(run.folder, run.run_id)
    for name in (run_folder.STOP, run_folder.STATUS, run_folder.EARLIER_CONFIG):
        (run.folder / name).unlink(missing_ok=True)
    (run.output / run_folder.EARLIER_CONFIG).unlink(missing_ok=True)
    files.write_json(
        run.folder / "settings.json",
        {
            "run_id": run.run_id,
            "trains": run.trains,
            "begun": run.begun,
            "settings": dataclasses.asdict(run.settings),
            "stated": run.stated,
            "topology": sorted(field_types.marked(settings.Settings, "topology")),
            "schedule": dataclasses.asdict(run.schedule),
            "base": str(run.base),
            "base_sums": run.base_sums,
            "tokens": str(run.tokens),
            "inputs": run.inputs,
        },
    )
    told = engines.ENGINES[run.settings.engine].config.of(run, node, accelerator).as_json()
    for folder in (run.folder, run.output):
        files.write_json(folder / run_folder.CONFIG, told)


def _run_ranks(run: Run, node: NodeEnvironment, start: launch.Start, check: Callable[[], None] | None = None) -> int:
    """Run this node's ranks.

    A termination after they have agreed on an end, or after a rank has crashed, is srun's for another node's exit code.
    """
    try:
        return launch.run_ranks(node, start, check)
    except launch.Terminated:
        agreed = run_folder.read_status(run.folder, node.attempt, patience=0)
        if agreed is None and launch.termination(run.folder, node):
            raise
        return 1


def _conclude(run: Run, node: NodeEnvironment, exit_code: int) -> None:
    """Turn the end of this node's ranks into the stage's result: rank 0's status says what torchrun cannot."""
    status = run_folder.read_status(run.folder, node.attempt, patience=10.0 if exit_code == 0 else 1.0)
    if status is None:
        if ended := launch.termination(run.folder, node):
            say(f"node {node.node_rank} ends because {ended['host']} was terminated")
            raise launch.Terminated(ended["signal"])
        problem = f"training crashed on node {node.node_rank} (torchrun exit code {exit_code})\n"
        if fault := launch.environment_fault(run.folder, node):
            raise BadInputError(f"{fault.problem}\n{problem}{launch.explain_failure(run.folder, node)}", fault.fix)
        raise CrashError(
            problem + launch.explain_failure(run.folder, node),
            "run the same command again: it continues from the newest committed checkpoint",
        )
    if error := status.error():
        raise error
    if exit_code:
        say(f"warning: torchrun ended with {exit_code} after the last step was saved")


def _check(chosen: Settings, config: dict[str, Any], statistics: dict[str, Any], node: NodeEnvironment) -> None:
    if config["num_attention_heads"] % chosen.sequence_parallel_size:
        raise BadInputError(
            f"train.sequence_parallel_size {chosen.sequence_parallel_size} does not divide the base's "
            f"{config['num_attention_heads']} attention heads"
        )
    if node.ranks_per_node % chosen.sequence_parallel_size:
        raise BadInputError(
            f"train.sequence_parallel_size {chosen.sequence_parallel_size} does not divide the {node.ranks_per_node} "
            "ranks of a node: every attention layer would wait for the network",
            "set it to a divisor",
        )
    limit = config.get("max_position_embeddings")
    if limit and statistics["longest"] > limit:
        raise BadInputError(
            f"the longest row has {statistics['longest']} tokens, the base has {limit} positions",
            "lower data.max_length",
        )
    compiler = os.environ.get("CXX", "c++")
    if chosen.optimizer == "cpu_adam" and not shutil.which(compiler):
        raise BadInputError(
            f"train.optimizer cpu_adam is compiled at start: node {node.node_rank} has no C++ compiler ({compiler})",
            "install one on every node (g++), name it in CXX through `train.environment`, or set optimizer adamw",
        )


def _check_experts(chosen: Settings, config: dict[str, Any], node: NodeEnvironment) -> None:
    """
    Args:
        chosen: with what was open settled.
    """
    sizes = (chosen.experts_per_shard, chosen.expert_parallel_size, node.world_size, node.ranks_per_node)
    for problem, fix in expert_shards.problems(config, *sizes, chosen.recompute):
        raise BadInputError(problem, fix)


def _check_tokens(run: Run) -> int:
    """Shards that are as they were written."""
    return token_files.check_shards(run.tokens) + (token_files.check_shards(run.held_out) if run.held_out else 0)


def _held_out(receipt: dict[str, Any], path: Path) -> Path:
    """
    Raises:
        BadInputError: there are no tokens to validate on.
    """
    folder = receipt["result"].get("held_out_tokens")
    if not isinstance(folder, str):
        raise BadInputError(
            f"train.validation: {path} names no held-out tokens",
            "hold samples out (data.held_out) and run tokenize_data again, with --held-out",
        )
    return Path(folder).resolve()


def _sums(base: dict[str, Any]) -> str | None:
    """The absolute path of the sums that the receipt of the base names."""
    return str(Path(base["result"]["sums"]).resolve()) if "sums" in base["result"] else None


def _read_statistics(tokens: Path) -> dict[str, Any]:
    path = tokens / "tokens.json"
    names = ("rows", "samples", "longest")
    statistics = json_files.read(path, dict.fromkeys(names, int), "run tokenize_data again")
    return {name: statistics[name] for name in names}
