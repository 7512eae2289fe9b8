"""Groups of ranks in one launch: forks of a process that has imported the libraries once."""

import os
import signal
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch


def import_libraries() -> None:
    """Import what all ranks need, with the engine's shims, before anything is forked."""
    from deepseek_sft.training.xtuner_engine import compat

    compat.install("cpu")
    import deepspeed
    import training_engine  # noqa: F401
    from transformers import DeepseekV3ForCausalLM  # noqa: F401

    from deepseek_sft.training.xtuner_engine import sft_model  # noqa: F401

    torch.set_num_threads(1)
    deepspeed.logger.setLevel("ERROR")


def together(tasks: list[Callable[[], None]], end: int = 0) -> None:
    """Run each task in a fork of this process, all at once.

    Args:
        end: signal that is to end each of them; 0: none.

    Raises:
        SystemExit: one ended otherwise; the others are ended.
    """
    running = set()
    for task in tasks:
        if child := os.fork():
            running.add(child)
            continue
        try:
            task()
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        os._exit(0)
    while running:
        child, status = os.wait()
        running.remove(child)
        if status != end:
            for other in running:
                os.kill(other, signal.SIGKILL)
                os.waitpid(other, 0)
            raise SystemExit(f"process {child} ended with {status}")


def group(world_size: int, task: Callable[..., None], meeting: Path, *arguments: Any, end: int = 0) -> None:
    """Run ``task(*arguments)`` on all ranks of a new gloo group.

    Args:
        meeting: file that the ranks find each other by; must not exist.
        end: see ``together``.
    """
    together([partial(_rank, world_size, rank, task, meeting, arguments) for rank in range(world_size)], end)


def _rank(world_size: int, rank: int, task: Callable[..., None], meeting: Path, arguments: tuple[Any, ...]) -> None:
    import deepspeed
    import torch.distributed as dist

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(world_size)}
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world_size)
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    task(*arguments)
    dist.barrier()
