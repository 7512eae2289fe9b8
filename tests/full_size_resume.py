"""A resume of 671B on other ranks, dry: what every rank would read of 256 ranks' files, and one rank that reads it.

    .envs/dev/bin/python tests/full_size_resume.py [--folder DIR]

The files are holes. Prints one JSON object for each number of new ranks. Exit code 1 where a byte is read twice or
never, or where the rank needs 1 GiB or more beside its states.
"""

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

PROJECT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(PROJECT / "workflow"), str(PROJECT / "tests")]

import large_zero3  # noqa: E402
import small_models  # noqa: E402

from deepseek_sft.convert import (  # noqa: E402
    rank_state,
    repartition,
    tiny_model,
)
from deepseek_sft.families import deepseek_v3  # noqa: E402

OLD, GIB, STEP = 256, 1 << 30, 7
MARKER = {"step": STEP, "world_size": OLD}
BUFFER = 1 << 26  # bytes: as the engine reads towards a GPU


def write(folder: Path) -> None:
    """The files of 671B that 256 ranks wrote, as holes."""
    specs = deepseek_v3.tensor_specs(tiny_model.config_of(small_models.FULL_SIZE))
    large_zero3.write_checkpoint(folder, specs, world_size=OLD, filled=False, step=STEP)


def planned(folder: Path, new_ranks: int) -> dict[str, Any]:
    """What all new ranks copy, and how often each element of the old files is."""
    source = repartition.Source(folder, MARKER)
    old = source.layout(0)
    new = repartition.of_all_ranks(source.state(0).shapes, new_ranks)
    ranges: dict[tuple[int, int], list[tuple[int, int]]] = {}
    most_files = elements = most = 0
    for rank in range(new_ranks):
        own, files = 0, set()
        for copy in repartition.copies(old, new, rank):
            ranges.setdefault((copy.from_rank, copy.from_index), []).append((copy.from_offset, copy.count))
            own, files = own + copy.count, files | {copy.from_rank}
        elements, most, most_files = elements + own, max(most, own), max(most_files, len(files))
    twice = 0
    for found in ranges.values():
        starts, counts = np.array(sorted(found), np.int64).T
        twice += int(np.maximum(starts[:-1] + counts[:-1] - starts[1:], 0).sum())
    return {
        "new_ranks": new_ranks,
        "elements_read": elements,
        "elements_read_twice": twice,
        "copies": sum(map(len, ranges.values())),
        "most_files_of_a_rank": most_files,
        "most_gib_of_a_rank": round(12 * most / GIB, 2),
    }


def memory(kind: str) -> int:
    """Bytes of this process: ``VmRSS`` now, ``VmHWM`` at most; getrusage's peak is inherited from who started it."""
    line = next(one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith(kind))
    return int(line.split()[1]) * 1024


def read_share(folder: Path, rank: int, new_ranks: int, result: Any) -> None:
    """As a rank does whose states are on its GPU: all its bytes through one buffer, with their CRC-32."""
    before, started = memory("VmRSS"), time.monotonic()
    source, buffer = repartition.Source(folder, MARKER), np.empty(BUFFER // 4, np.float32)
    first, *_ = repartition.old_ranks_of(rank, new_ranks, OLD)
    old = source.layout(first)
    new = repartition.of_all_ranks(source.state(first).shapes, new_ranks)
    wanted = list(repartition.copies(old, new, rank))
    with rank_state.RecordingFiles() as opened:
        for moment in (None, "exp_avg", "exp_avg_sq"):
            for copy in wanted:
                tensor, offset = source.place(copy, moment)
                for start in range(0, copy.count, buffer.size):
                    part = buffer[: min(buffer.size, copy.count - start)]
                    opened.read_into(tensor.file, offset + 4 * start, part)
        ranges = opened.ranges()
    result.put(
        {
            "rank": rank,
            "gib_read": round(opened.bytes_read / GIB, 2),
            "bytes_read": opened.bytes_read,
            "wanted": 12 * sum(copy.count for copy in wanted),
            "ranges": sum(map(len, ranges.values())),
            "seconds": round(time.monotonic() - started, 1),
            "gib_beside_states": round((memory("VmHWM") - before) / GIB, 3),
        }
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="on a disk with holes; removed at the end")
    options = parser.parse_args()
    failed = False
    with tempfile.TemporaryDirectory(prefix="full-size-", dir=options.folder) as scratch:
        folder = Path(scratch) / f"step_{STEP}"
        write(folder)
        for new_ranks in (128, 192):
            found = planned(folder, new_ranks)
            spawned = multiprocessing.get_context("spawn")
            result = spawned.Queue()
            reader = spawned.Process(target=read_share, args=(folder, new_ranks // 3, new_ranks, result))
            reader.start()
            found["reading"] = result.get()
            reader.join()
            print(json.dumps(found), flush=True)
            read = found["reading"]
            failed |= found["elements_read_twice"] > 0 or found["elements_read"] != 671_026_404_352
            failed |= read["bytes_read"] != read["wanted"] or read["gib_beside_states"] >= 1
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
