"""Decides between gradient and update: DeepSpeed computes the norm of the gradient and updates the weights in one call.

ZeRO-3's ``step()`` asks for the norms of its sub-groups (``_get_norm_groups``), and then whether to drop the gradients
without touching weights or moments (``_loss_scale_update_and_overflow_cleanup``), which by itself is so in fp16 alone,
or where a norm is no number, and then without a word. The guard answers there, from those norms. DeepSpeed is pinned.
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
        self._norms: list[torch.Tensor] = []
        self._group_norms = self._optimizer._get_norm_groups
        self._conclude = self._optimizer._loss_scale_update_and_overflow_cleanup
        self._optimizer._get_norm_groups = self._norm_groups
        self._optimizer._loss_scale_update_and_overflow_cleanup = self._check

    def _norm_groups(self) -> list[torch.Tensor]:
        self._norms = self._group_norms()
        return self._norms

    def _check(self) -> bool:
        """Whether the update is dropped; called by the optimizer once per step."""
        of_groups = torch.stack([torch.as_tensor(norm) for norm in self._norms])
        norm = torch.linalg.vector_norm(of_groups)
        # DeepSpeed gives -1 for a group whose norm is not finite.
        norm = norm.masked_fill((of_groups < 0).any(), math.nan).to(self._device)
        dist.broadcast(norm, 0)  # one value decides on all ranks
        self.norm = norm.item()
        self.verdict = self.health.judge(self.step, self.loss, self.norm)
        self._optimizer.overflow = not self.verdict.apply
        return self._conclude()
