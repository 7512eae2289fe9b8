"""How evenly the routers spread tokens over experts."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from ...model.experts import Router


class ExpertLoad:
    """Counts the tokens that each router sends to each expert, padding left out.

    Activation checkpointing runs a layer twice and counts it twice, which changes no share.
    """

    def __init__(self, routers: Sequence[Router], device: torch.device):
        experts = routers[0].n_routed_experts if routers else 0
        self.counts = torch.zeros(len(routers), experts, dtype=torch.int64, device=device)
        self.valid: torch.Tensor | None = None  # bool [rows, length] of the current forward pass
        for layer, router in enumerate(routers):
            router.register_forward_hook(partial(self._count, layer))

    def _count(self, layer: int, router: Router, inputs: Any, outputs: tuple[torch.Tensor, ...]) -> None:
        chosen = outputs[0].detach()  # [tokens, top_k]
        ones = torch.ones_like(chosen, dtype=torch.int64)
        if self.valid is not None:
            ones *= self.valid.reshape(-1, 1)
        self.counts[layer].scatter_add_(0, chosen.flatten(), ones.flatten())

    def figures(self) -> dict[str, list[float]]:
        """Figures of every layer since the last call, over all ranks; a collective."""
        counts = self.counts.clone()
        dist.all_reduce(counts)
        self.counts.zero_()
        return balance(counts.double().cpu())


def balance(counts: torch.Tensor) -> dict[str, list[float]]:
    """Balance of ``counts`` [layers, experts]: per layer, entropy of the shares (1 is even, 0 is a single expert),
    experts without a token, and the busiest expert's load over the mean load."""
    experts = counts.shape[-1]
    shares = counts / counts.sum(-1, keepdim=True).clamp(min=1)
    entropy = -torch.special.xlogy(shares, shares).sum(-1) / torch.log(torch.tensor(float(max(experts, 2))))
    return {
        "expert_load_entropy": [round(value, 6) for value in entropy.tolist()],
        "dead_experts": (counts == 0).sum(-1).tolist(),
        "busiest_expert_load": [round(value, 4) for value in (shares.amax(-1) * experts).tolist()],
    }
