"""Ranks that compute slower than the others for many steps, and the nodes that the next start leaves out for it.

Pure but for one file, ``<results>/train/slow_nodes.json``: node → what was seen. Remove the file, or an entry, to have
the node taken again. Needs no torch.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import files, json_files

FILE = "slow_nodes.json"
GPU_PERCENT = 10.0  # above the median; on CPU, where processes share cores, only what the configuration asks for
STEPS = 20  # so many in a row: one slow step is data, or a neighbour


@dataclass(frozen=True)
class Slow:
    """A rank that was slower than the median for ``steps`` steps in a row, up to ``step``.

    Attributes:
        percent: above the median of all ranks, over the steps counted.
    """

    rank: int
    percent: float
    steps: int
    step: int


class Judge:
    """Counts for how many steps in a row each rank was slower than the median.

    Args:
        percent: above the median from which a rank counts as slow; None judges nothing.
    """

    def __init__(self, percent: float | None, steps: int = STEPS):
        self.percent, self.steps = percent, steps
        self._in_a_row: dict[int, int] = {}
        self._seconds: dict[int, float] = {}
        self._expected: dict[int, float] = {}
        self._named: set[int] = set()

    def look(self, step: int, rates: Sequence[float], covered: int = 1) -> list[Slow]:
        """Ranks that have become slow.

        Args:
            rates: seconds that each rank computed per token, without waiting; 0 where it computed nothing.
            covered: steps since the last look.
        """
        if self.percent is None or len(rates) < 2 or not all(rate > 0 for rate in rates):
            return []
        middle, found = statistics.median_low(rates), []  # of two ranks, the faster
        for rank, rate in enumerate(rates):
            if rate <= middle * (1 + self.percent / 100):
                for counted in (self._in_a_row, self._seconds, self._expected):
                    counted.pop(rank, None)
                self._named.discard(rank)
                continue
            for counted, one in ((self._in_a_row, 1), (self._seconds, rate), (self._expected, middle)):
                counted[rank] = counted.get(rank, 0) + covered * one
            if self._in_a_row[rank] >= self.steps and rank not in self._named:
                self._named.add(rank)
                percent = 100 * (self._seconds[rank] / self._expected[rank] - 1)
                found.append(Slow(rank, round(percent, 1), self._in_a_row[rank], step))
        return found


def allowed_percent(stated: float | None, accelerator: str) -> float | None:
    """Above the median from which a rank is slow; None judges nothing."""
    return stated if stated is not None else GPU_PERCENT if accelerator == "cuda" else None


def describe(slow: Slow, host: str, ranks_per_node: int) -> str:
    """One sentence: rank, node, device, figures."""
    return (
        f"rank {slow.rank} (device {slow.rank % ranks_per_node} of {host}) has computed {slow.percent:g} % slower than "
        f"the median rank for {slow.steps} steps"
    )


def note(folder: Path, slow: Slow, host: str, ranks_per_node: int) -> None:
    """Add a rank's node to the file in ``folder`` (``<results>/train``)."""
    found = read(folder)
    found[host] = {
        "rank": slow.rank,
        "device": slow.rank % ranks_per_node,
        "percent": slow.percent,
        "steps": slow.steps,
        "step": slow.step,
        "time": time.time(),
        "text": describe(slow, host, ranks_per_node),
    }
    files.write_json(folder / FILE, found)


def left_out(found: dict[str, dict[str, Any]], folder: Path) -> list[str]:
    """One sentence for each node that the next start leaves out, with how to take it again."""
    return [
        f"train leaves {host} out: {entry.get('text', 'it was slow')}; remove {folder / FILE} to take it again"
        for host, entry in found.items()
    ]


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """Node → what was seen of it; empty without a file that can be read."""
    try:
        found = json_files.load(folder / FILE)
    except (OSError, ValueError):
        return {}
    entries = found.items() if isinstance(found, dict) else ()
    return {host: entry for host, entry in entries if isinstance(entry, dict)}
