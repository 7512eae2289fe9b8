"""One rank: started by torchrun, trains under xtuner's runner, and leaves word of how it ended.

An end that all ranks agree on (finished, stopped, a gate, bad input) is written by rank 0 to the run's status.json and
exits 0; torchrun would turn any other exit code into 1. Anything else is a crash and exits 1.
"""

import argparse
import contextlib
import datetime
import json
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from deepseek_sft import environment_faults, files, json_files
from deepseek_sft import limits as time_limits
from deepseek_sft.cli import say
from deepseek_sft.errors import StageError, StoppedError
from deepseek_sft.training import launch, process_memory, run_folder
from deepseek_sft.training.run_folder import Status
from deepseek_sft.training.watchdog import Watchdog

COMMUNICATION = ("NCCL_", "TORCH_NCCL_", "GLOO_", "UCX_", "FI_", "IBV_")  # prefixes of variables worth a line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run-folder", dest="run", type=Path, required=True)
    parser.add_argument("--attempt", required=True)
    parser.add_argument("--accelerator", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--stop-file")
    parser.add_argument("--end-after", type=int, help="step after which a rehearsal ends without saving")
    for phase in time_limits.PHASES:
        parser.add_argument(f"--hang-{phase}", type=float, required=True, help="seconds")
    parser.add_argument("--derived-limits", nargs="*", default=(), help="phases whose limit follows measured times")
    options = parser.parse_args()
    launch.die_with_parent(signal.SIGKILL)
    rank = int(os.environ["RANK"])
    limits = {phase: getattr(options, f"hang_{phase}") for phase in time_limits.PHASES}
    watchdog = Watchdog(
        rank,
        launch.attempt_folder(options.run, options.attempt),
        limits,
        tuple(options.derived_limits),
        launch.trace_file(options.run, options.attempt, rank) if options.accelerator == "cuda" else None,
    )
    try:
        train(options, rank, watchdog)
    except BaseException as error:
        _leave_word(options, rank, error)
        raise
    sys.stderr.flush()
    os._exit(0)  # interpreter teardown beside live communication threads can hang or crash; everything is on disk


def train(options: argparse.Namespace, rank: int, watchdog: Watchdog) -> None:
    """Train to the end, or to a stop, and write the status."""
    from deepseek_sft.training.xtuner_engine import compat

    compat.install(options.accelerator)
    import deepspeed
    import torch
    import torch.distributed as dist

    if options.accelerator == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    deepspeed.logger.setLevel("WARNING")
    timeout = datetime.timedelta(seconds=time_limits.collectives(watchdog.limits))
    compat.limit_every_group(timeout)
    backend = "gloo" if options.accelerator == "cpu" else "nccl"
    deepspeed.init_distributed(backend, timeout=timeout, verbose=False)
    if rank == 0:
        say(f"{dist.get_world_size()} ranks over {backend}{_communication()}")
    try:
        status = _run(options, rank, watchdog)
    except StageError as error:  # raised on all ranks alike
        outcome = {2: "bad_input", 3: "gate", 4: "stopped"}.get(error.exit_code)
        if outcome is None:
            raise
        status = Status(options.attempt, outcome, error.problem, error.fix)
    if rank == 0:
        run_folder.write_status(options.run, status)
    dist.barrier()


def _run(options: argparse.Namespace, rank: int, watchdog: Watchdog) -> Status:
    from mmengine.config import Config
    from xtuner.parallel.sequence import init_sequence_parallel

    from deepseek_sft.training.xtuner_engine import base_check, resuming
    from deepseek_sft.training.xtuner_engine.loop import stop_files

    config = Config.fromstring(_read_config(options, rank), ".py")
    candidates = resuming.candidates_of(options.run, options.run.name)
    init_sequence_parallel(config.sequence_parallel)
    if not candidates:
        base_check.check(*_base(options, rank))
    config.run, config.attempt = str(options.run), options.attempt
    config.hosts = _hosts()
    config.progress = {}
    config.stop_files = [str(path) for path in stop_files(options.run, options.stop_file)]
    config.end_after = options.end_after
    config.resume = str(candidates[-1].folder) if candidates else None
    config.model.read_weights = not candidates  # the checkpoint holds them all
    config.work_dir = str(launch.attempt_folder(options.run, options.attempt) / "mmengine")
    # What the plan calls `process`: interpreter, libraries, communication, and nothing of the model yet.
    config.memory_before_model_gib = round(process_memory.resident() / (1 << 30), 3)
    runner = resuming.ResumingRunner.from_cfg(config)
    runner.watchdog, runner.candidates = watchdog, candidates
    runner.train()
    if runner.train_loop.stopped:
        raise StoppedError(
            f"stopped on request after step {runner.iter} of {runner.max_iters}; the checkpoint is saved",
            "the same command continues from it",
        )
    figures = {"first_step_at": runner.train_loop.began}
    return Status(options.attempt, "finished", f"step {runner.iter} of {runner.max_iters}", figures=figures)


def _communication() -> str:
    """Settings of the communication libraries in this process's environment."""
    names = sorted(name for name in os.environ if name.startswith(COMMUNICATION))
    return "".join(f"  {name}={os.environ[name]}" for name in names)


def _read_config(options: argparse.Namespace, rank: int) -> str:
    """Text of the run's configuration, read by rank 0 alone: all ranks start from the same."""
    import torch.distributed as dist

    box: list[str | None] = [None]
    if rank == 0:
        box[0] = (options.run / run_folder.CONFIG).read_text(encoding="utf-8")
    dist.broadcast_object_list(box)
    return box[0]


def _base(options: argparse.Namespace, rank: int) -> tuple[Path, str | None, str]:
    """Base folder, file of its sums and whether to compare them, as the first node's program wrote them down."""
    import torch.distributed as dist

    box: list[Any] = [None]
    if rank == 0:
        box[0] = json_files.load(options.run / "settings.json")
    dist.broadcast_object_list(box)
    return Path(box[0]["base"]), box[0]["base_sums"], box[0]["settings"]["check_base"]


def _hosts() -> list[str]:
    """Host names of all nodes, in the order of their ranks."""
    import torch.distributed as dist

    names: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(names, socket.gethostname())
    return list(dict.fromkeys(names))


def _leave_word(options: argparse.Namespace, rank: int, error: BaseException) -> None:
    record = {
        "rank": rank,
        "host": socket.gethostname(),
        "time": time.time(),
        "error": f"{type(error).__name__}: {error}"[:2000],
        "traceback": traceback.format_exc(),
    }
    if fault := environment_faults.explain(error):
        record["fault"] = {"problem": fault.problem, "fix": fault.fix}
    path = launch.attempt_folder(options.run, options.attempt) / f"failure-rank{rank}.json"
    with contextlib.suppress(OSError):  # a full disk takes the last words as well; the node's program finds out
        files.write_text(path, json.dumps(record))
    with contextlib.suppress(OSError):
        traceback.print_exc()
        sys.stderr.flush()
    os._exit(1)  # the other ranks are ended by torchrun; waiting for them in a destructor would hang


if __name__ == "__main__":
    main()
