"""What every rank tells with each logged step: its own compute time and its GPU's health; the slow one is named."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ...cli import say
from ...slurm.nodes import own_name
from .. import device_health, slow_nodes
from .compute_clock import ComputeClock

FIGURES = ("compute_seconds", "rows", "clock_mhz", "most_mhz", "reasons", "corrected", "uncorrected", "xid")


class RankWatch:
    """One for each rank; rank 0 judges.

    Args:
        model: DeepSpeed's engine's module.
        folder: ``<results>/train``, where the nodes to leave out are noted.
        percent: above the median from which a rank is slow; None judges nothing.
    """

    def __init__(self, model: torch.nn.Module, device: torch.device, folder: Path, percent: float | None, step: int):
        self.device, self.folder = device, folder
        self.clock = ComputeClock(model, device)
        self.judge = slow_nodes.Judge(percent)
        self.last = step
        self.observer = None
        if device.type == "cuda":
            uuid = str(torch.cuda.get_device_properties(device).uuid)
            self.observer = device_health.Observer(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
            if dist.get_rank() == 0 and self.observer.why:  # once, and not for every rank
                source = self.observer.source or "nothing tells clocks, throttling and errors of GPUs"
                say(f"health of GPUs: {source} ({self.observer.why})")
        self.hosts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(self.hosts, own_name())

    def told(self, step: int) -> dict[str, Any]:
        """Figures of all ranks since the last call; a collective. Only rank 0's result is judged and complete."""
        seconds, rows = self.clock.take()
        health = self.observer.take() if self.observer else device_health.Health()
        own = [seconds, rows, *(getattr(health, name) for name in FIGURES[2:])]
        mine = torch.tensor(own, dtype=torch.float64, device=self.device)
        everyone = [torch.empty_like(mine) for _ in self.hosts]
        dist.all_gather(everyone, mine)
        table = dict(zip(FIGURES, torch.stack(everyone).T.tolist(), strict=True))
        covered, self.last = step - self.last, step
        if dist.get_rank() == 0:
            self._judge(step, table, covered)
        return line(table, covered)

    def _judge(self, step: int, table: dict[str, list[float]], covered: int) -> None:
        rates = [s / rows if rows else 0.0 for s, rows in zip(table["compute_seconds"], table["rows"], strict=True)]
        each = len(self.hosts) // len(set(self.hosts))
        for slow in self.judge.look(step, rates, covered):
            host = self.hosts[slow.rank]
            reasons = device_health.words(int(table["reasons"][slow.rank]))
            why = f" ({', '.join(reasons)})" if reasons else ""
            say(
                f"warning: {slow_nodes.describe(slow, host, each)}{why}: all ranks wait for it; the next start leaves "
                f"the node out ({self.folder / slow_nodes.FILE}; by hand: --exclude={host})"
            )
            try:
                slow_nodes.note(self.folder, slow, host, each)
            except OSError as error:
                say(f"warning: {self.folder / slow_nodes.FILE} cannot be written: {error.strerror}")

    def close(self) -> None:
        if self.observer:
            self.observer.close()


def line(table: dict[str, list[float]], covered: int) -> dict[str, Any]:
    """Keys of ``metrics.jsonl``: compute time of every rank and step; of GPUs' health what is not as it should be."""
    found: dict[str, Any] = {"compute_seconds": [round(s / max(covered, 1), 6) for s in table["compute_seconds"]]}
    if max(table["clock_mhz"]) > 0:
        found["clock_mhz"] = [round(clock) for clock in table["clock_mhz"]]
    throttled = {str(rank): device_health.words(int(bits)) for rank, bits in enumerate(table["reasons"]) if bits > 0}
    if throttled:
        found["throttled"] = throttled
    for key, name in (("corrected", "ecc_corrected"), ("uncorrected", "ecc_uncorrected"), ("xid", "xid_events")):
        if counted := {str(rank): int(count) for rank, count in enumerate(table[key]) if count > 0}:
            found[name] = counted
    return found
