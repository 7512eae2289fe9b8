"""The rule by which DeepSeek-V3's pre-training keeps experts evenly loaded without a loss (report, section 2.1.2).

After each step the router's correction bias of an overloaded expert sinks, that of an underloaded expert rises, by a
fixed speed.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist

from .router import Router


class BalanceBias:
    """Counts a step's tokens per expert and moves the biases; they stay equal on all ranks.

    Args:
        speed: change of a bias per step (0.001 in the report).
    """

    def __init__(self, routers: Sequence[Router], speed: float):
        self.routers, self.speed = routers, speed
        self.load: list[torch.Tensor] = []  # int64 [experts] of every router, over the step's micro batches

    def begin(self, valid: torch.Tensor) -> None:
        """Before a micro batch: ``valid`` bool [rows, length / sp], False on padding, which does not count."""
        for router in self.routers:
            router.counted = valid

    def count(self) -> None:
        """After the forward pass of a micro batch, before anything else runs the model."""
        counts = [router.load for router in self.routers]
        self.load = [a + b for a, b in zip(self.load, counts, strict=True)] if self.load else counts

    @torch.no_grad()
    def apply(self) -> None:
        """After a step: move the biases by the load of the whole global batch. A collective.

        Every rank adds the same numbers to the same biases, since counts are integers summed over all ranks.
        """
        load = torch.stack(self.load)
        if dist.is_initialized():
            dist.all_reduce(load)
        moves = self.speed * torch.sign(load.double().mean(-1, keepdim=True) - load).float()
        for router, move in zip(self.routers, moves, strict=True):
            router.e_score_correction_bias += move
        self.load = []
