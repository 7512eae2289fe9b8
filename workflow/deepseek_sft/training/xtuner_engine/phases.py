"""Where the time of a step goes: data, forward, backward, update."""

import time

import torch

PHASES = ("data", "forward", "backward", "update")


WAITING = "commit"  # between backward and update, where a checkpoint is not yet written


class PhaseClock:
    """Times consecutive phases of a step.

    On GPUs a phase ends when the device reaches its event, not when the host has queued its work; nothing waits for it
    before ``seconds``. Reading data is the host's and is timed there.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._marks: list[tuple[str, float, torch.cuda.Event | None]] = []

    def mark(self, phase: str) -> None:
        """``phase`` begins, the one before it ends; ``end`` closes the last."""
        event = None
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
        self._marks.append((phase, time.perf_counter(), event))

    def seconds(self) -> dict[str, float]:
        """Seconds of every phase since the last call, ``WAITING`` among them; waits for the device."""
        self.mark("end")
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        total = dict.fromkeys((*PHASES, WAITING), 0.0)
        for (phase, started, event), (_, ended, next_event) in zip(self._marks, self._marks[1:], strict=False):
            if event is None or phase == "data":
                total[phase] += ended - started
            else:
                total[phase] += event.elapsed_time(next_event) / 1000
        self._marks.clear()
        return total
