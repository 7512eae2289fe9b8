"""How evenly the routers spread tokens over experts."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ...model.router import Router

RECORDS = 40  # of a whole run, each with a number for every expert: 75 kB for the release's 58 × 256


class ExpertLoad:
    """Counts the tokens that each router sends to each expert in training, padding left out.

    Activation checkpointing runs a layer twice and counts it twice, which changes no share.
    """

    def __init__(self, routers: Sequence[Router], device: torch.device):
        experts = routers[0].n_routed_experts if routers else 0
        self.counts = torch.zeros(len(routers), experts, dtype=torch.int64, device=device)
        self.valid: torch.Tensor | None = None  # bool [rows, length] of the current forward pass
        for layer, router in enumerate(routers):
            router.register_forward_hook(partial(self._count, layer))

    def _count(self, layer: int, router: Router, inputs: Any, outputs: tuple[torch.Tensor, ...]) -> None:
        if not router.training:
            return
        chosen = outputs[0].detach()  # [tokens, top_k]
        ones = torch.ones_like(chosen, dtype=torch.int64)
        if self.valid is not None:
            ones *= self.valid.reshape(-1, 1)
        self.counts[layer].scatter_add_(0, chosen.flatten(), ones.flatten())

    def take(self) -> torch.Tensor:
        """Counts since the last call over all ranks, float64 [layers, experts] on the CPU; a collective."""
        counts = self.counts.clone()
        dist.all_reduce(counts)
        self.counts.zero_()
        return counts.double().cpu()


class LoadRecords:
    """Writes ``expert_load.jsonl``: the load of every expert, a bounded number of times in a run.

    A line is ``{"step", "from_step", "first_layer", "load"}``: ``load`` [layers, experts] is each expert's share of its
    layer's tokens in these steps over an even share, so 1 is even and 0 is an expert without a token.

    Args:
        path: the file, appended to.
        step: steps that are done before the first call of ``add``.
        steps: of the whole run.
        first_layer: number of the first layer with experts.
    """

    def __init__(self, path: Path, step: int, steps: int, first_layer: int):
        self.every = -(-steps // RECORDS)
        self.first_layer, self.recorded, self.step = first_layer, step, step
        self.counts: torch.Tensor | None = None
        self.stream = open(path, "a", encoding="utf-8")  # noqa: SIM115  closed after training

    def add(self, step: int, counts: torch.Tensor) -> None:
        """Counts [layers, experts] of the steps since the last call up to ``step``."""
        self.counts, self.step = counts if self.counts is None else self.counts + counts, step
        if step == 1 or step - self.recorded >= self.every:
            self._write()

    def close(self) -> None:
        """Write what is left."""
        self._write()
        self.stream.close()

    def _write(self) -> None:
        if self.counts is None or not self.counts.numel():
            return
        even = self.counts.mean(-1, keepdim=True).clamp(min=1e-9)
        load = [[round(value, 3) for value in layer] for layer in (self.counts / even).tolist()]
        line = {"step": self.step, "from_step": self.recorded + 1, "first_layer": self.first_layer, "load": load}
        self.stream.write(json.dumps(line, separators=(",", ":")) + "\n")
        self.stream.flush()
        self.counts, self.recorded = None, self.step


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
