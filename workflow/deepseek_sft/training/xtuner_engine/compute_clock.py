"""How long this rank computes by itself, without waiting for any other.

The wall time of a step says nothing about one rank: all wait for the slowest in every collective. Between ZeRO-3's
gather before a linear layer and its release after it lies one matrix product and no collective, in the forward pass and
in the recomputation. Of these products a sample over all layers is timed. They are no measure of the whole step, but a
GPU that is slow is slow in them, by as much.
"""

import time
from typing import Any

import torch
from torch import nn

MOST = 64  # layers timed: two CUDA events each, for every micro batch and pass


class ComputeClock:
    """Times linear layers of a model in training. Make it once DeepSpeed has wrapped it: hooks run in their order.

    Args:
        model: whose decoder layers are looked through.
    """

    def __init__(self, model: nn.Module, device: torch.device, most: int = MOST):
        self.device = device
        self._tokens, self._seconds = 0, 0.0
        self._started: dict[int, Any] = {}
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        found = [module for module in model.modules() if type(module) is nn.Linear]
        count = min(most, len(found))
        # Evenly, and not every so-many-th, which would be the same projection in each layer.
        self.timed = [found[index * len(found) // count] for index in range(count)]
        for module in self.timed:
            module.register_forward_pre_hook(self._begin)
            module.register_forward_hook(self._end, prepend=True)

    def _begin(self, module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if not module.training:  # validation is no part of a step
            return
        self._tokens += inputs[0].numel() // inputs[0].shape[-1]
        self._started[id(module)] = self._now()

    def _end(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if not module.training:
            return
        started, ended = self._started.pop(id(module)), self._now()
        if self.device.type == "cuda":
            self._events.append((started, ended))
        else:
            self._seconds += ended - started

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()  # the device reaches it when the gather that the layer waited for is done
        return event

    def collect(self) -> None:
        """Add up the events of a step, which must have ended on the device."""
        self._seconds += sum(started.elapsed_time(ended) for started, ended in self._events) / 1000
        self._events.clear()

    def take(self) -> tuple[float, int]:
        """Seconds since the last call, and rows (tokens, padding included) × layers that were multiplied in them."""
        self.collect()
        seconds, tokens = self._seconds, self._tokens
        self._seconds, self._tokens = 0.0, 0
        return seconds, tokens
