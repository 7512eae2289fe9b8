"""One rank: started by torchrun, trains, and leaves word of how it ended.

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

from ... import environment_faults, files, json_files, time_limits
from ...cli import say
from ...errors import StageError, StoppedError
from .. import launch, near_cores, process_memory, run_folder
from ..run_folder import Status
from ..watchdog import Watchdog
from .config import Attempt, EngineConfig

BEGAN = time.time()
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
    from . import compat

    compat.install(options.accelerator)
    import deepspeed
    import torch
    import torch.distributed as dist

    if options.accelerator == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        _stay_near_the_gpu(rank)
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


def _stay_near_the_gpu(rank: int) -> None:
    """Run this rank on the cores of its GPU's NUMA node, before anything is pinned; elsewhere where there are none."""
    import torch

    device = torch.cuda.get_device_properties(torch.cuda.current_device())
    address = f"{device.pci_domain_id:04x}:{device.pci_bus_id:02x}:{device.pci_device_id:02x}.0"
    where = near_cores.bind(near_cores.cores_beside(address))
    if rank == 0:
        say(f"rank 0 runs {where}")


def _run(options: argparse.Namespace, rank: int, watchdog: Watchdog) -> Status:
    from . import loop
    from .step_result import stop_files

    config = EngineConfig.from_json(_read_config(options, rank))
    attempt = Attempt(
        run=options.run,
        name=options.attempt,
        hosts=_hosts(),
        stop_files=stop_files(options.run, options.stop_file),
        end_after=options.end_after,
        began=BEGAN,
        logs=launch.attempt_folder(options.run, options.attempt),
        # What the plan calls `process`: interpreter, libraries, communication, and nothing of the model yet.
        memory_before_model_gib=round(process_memory.resident() / (1 << 30), 3),
    )
    ending = loop.run(config, attempt, watchdog)
    if ending.stopped:
        raise StoppedError(
            f"stopped on request after step {ending.step} of {config.schedule.steps}; the checkpoint is saved",
            "the same command continues from it",
        )
    said = f"step {ending.step} of {config.schedule.steps}"
    return Status(options.attempt, "finished", said, figures={"first_step_at": ending.began})


def _communication() -> str:
    """Settings of the communication libraries in this process's environment."""
    names = sorted(name for name in os.environ if name.startswith(COMMUNICATION))
    return "".join(f"  {name}={os.environ[name]}" for name in names)


def _read_config(options: argparse.Namespace, rank: int) -> dict[str, Any]:
    """What the ranks are told, read by rank 0 alone: all start from the same."""
    import torch.distributed as dist

    box: list[Any] = [None]
    if rank == 0:
        box[0] = json_files.load(options.run / run_folder.CONFIG)
    dist.broadcast_object_list(box)
    return box[0]


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
