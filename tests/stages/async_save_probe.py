"""Run by the train environment's Python: what the writer of checkpoints does with records on GPUs and with bad disks.

Usage: async_save_probe.py FOLDER; prints a JSON object.
"""

import json
import os
import resource
import sys
import threading
from pathlib import Path

import torch

from deepseek_sft.training.xtuner_engine import background_writer, deferred_files

NAME = "zero_pp_rank_0_mp_rank_00_optim_states.pt"


def in_pieces(folder: Path) -> list[bool]:
    """Whether bytes that travel in pieces arrive, also through memory that was larger before."""
    landing, found = deferred_files.Landing(piece=1000), []
    for size in (12_345, 3000, 999, 0):
        source = torch.randint(0, 256, (size,), dtype=torch.uint8)
        storage = landing.bring(source, None, pinned=False)
        found.append(torch.empty(0, dtype=torch.uint8).set_(storage)[:size].equal(source))
    return found


def small_at_once(folder: Path) -> list[float]:
    """A count and a large tensor that change between description and writing; the file holds the count as it was."""
    count, large = torch.tensor(3.0), torch.zeros(1 << 20)
    file = deferred_files.describe({"count": count, "large": large}, folder / "small.pt")
    count += 1
    deferred_files.write(file, deferred_files.Landing())
    held = torch.load(folder / "small.pt")
    return [held["count"].item(), held["large"].sum().item()]


def refused(folder: Path) -> dict[str, str]:
    """What comes of a disk that takes no more than 1 MB, and what the thread said meanwhile."""
    writer = background_writer.BackgroundWriter()
    file = deferred_files.describe({"large": torch.ones(1 << 20)}, folder / NAME)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        writer.result(writer.write(folder, 0, [file]), "step_1", told=False)
    except OSError as error:
        return {"kind": type(error).__name__, "text": str(error)}
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    return {}


def slow(folder: Path) -> int:
    """Waits for a slow disk, saying how far it is; bytes of the file."""
    background_writer.TOLD_EVERY = 0.05
    writer, hold = background_writer.BackgroundWriter(), threading.Event()
    writer.after(hold.wait)
    threading.Timer(0.5, hold.set).start()
    file = deferred_files.describe({"large": torch.ones(1 << 20)}, folder / NAME)
    sizes, digests = writer.result(writer.write(folder, 0, [file]), "step_1", told=True)
    writer.close()
    return sizes[NAME] if digests.keys() == sizes.keys() else 0


def niceness(folder: Path) -> dict[str, int]:
    """Of the thread that writes, and of the one that gives the GPU its work, before and after."""
    own, found = os.getpriority(os.PRIO_PROCESS, threading.get_native_id()), {}
    writer = background_writer.BackgroundWriter()
    writer.after(lambda: found.update(writer=os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) - own))
    writer.close()
    return found | {"computing": os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) - own}


if __name__ == "__main__":
    parts = (in_pieces, small_at_once, refused, slow, niceness)
    print(json.dumps({part.__name__: part(Path(sys.argv[1])) for part in parts}))
