"""Run by the train environment's Python: the largest difference between two checkpoints' master weights and moments.

Usage: same_state.py CHECKPOINT CHECKPOINT; prints a JSON object.
"""

import json
import sys
from pathlib import Path

import torch
from training_states import load


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Name → flat tensor of every rank and group."""
    found = {}
    for rank in range(len(list(folder.glob("*_optim_states.pt")))):
        state = load(folder, rank, "optim_states")["optimizer_state_dict"]
        for group, weights in enumerate(state["fp32_flat_groups"]):
            moments = state["optimizer_state_dict"]["state"][group]
            found[f"weights {rank}.{group}"] = weights
            found |= {f"{name} {rank}.{group}": moments[name] for name in ("exp_avg", "exp_avg_sq")}
    return found


if __name__ == "__main__":
    first, second = (tensors(Path(folder)) for folder in sys.argv[1:3])
    assert first.keys() == second.keys()
    print(json.dumps({name: (first[name] - second[name]).abs().max().item() for name in first}))
