"""Decides between gradient and update: DeepSpeed computes the norm of the gradient and updates the weights in one call.

ZeRO-3's optimizer asks ``_overflow_check_and_loss_scale_update`` first, which is true only in fp16 and then drops the
gradients without touching weights or moments. The guard answers there, from the gradient's norm. DeepSpeed is pinned.
"""

import math
from typing import Any

import torch
import torch.distributed as dist

from ..health import StepHealth, Verdict


class StepGuard:
    """Judges every step of an engine before its update.

    Set ``step`` and ``loss`` before the engine's ``step()``; ``verdict`` and ``norm`` hold what came of it.
    """

    def __init__(self, engine: Any, health: StepHealth):
        self.health = health
        self.step, self.loss = 0, 0.0
        self.verdict, self.norm = Verdict(), 0.0
        self._optimizer = engine.optimizer
        self._device = engine.device
        self._drop_if_overflow = self._optimizer._overflow_check_and_loss_scale_update
        self._group_norms = self._optimizer._get_norm_groups
        self._optimizer._overflow_check_and_loss_scale_update = self._check

    def _check(self) -> bool:
        """Whether the update is dropped; called by the optimizer once per step."""
        norms = self._group_norms()
        of_groups = torch.stack(norms)
        norm = torch.linalg.vector_norm(of_groups)
        # DeepSpeed gives -1 for a group whose norm is not finite.
        norm = norm.masked_fill((of_groups < 0).any(), math.nan).to(self._device)
        dist.broadcast(norm, 0)  # one value decides on all ranks
        self.norm = norm.item()
        self.verdict = self.health.judge(self.step, self.loss, self.norm)
        self._optimizer.overflow = not self.verdict.apply
        self._optimizer._get_norm_groups = lambda: norms  # the optimizer would compute the same again
        return self._drop_if_overflow()
