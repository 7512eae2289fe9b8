"""Run by the train environment's Python: compares two checkpoints' first Adam moments, gradients after one step.

Usage: training_states.py CHECKPOINT CHECKPOINT; prints the relative difference of each parameter as JSON.
"""

import json
import sys
from pathlib import Path

import torch


def first_moments(folder: Path) -> dict[str, torch.Tensor]:
    """Parameter name → first moment, put together from all ranks."""
    count = len(list(folder.glob("*_optim_states.pt")))
    states = [load(folder, rank, "optim_states") for rank in range(count)]
    shapes = load(folder, 0, "model_states")["param_shapes"]
    moments = {}
    for group, parameters in enumerate(shapes):
        position = 0
        flat = [state["optimizer_state_dict"]["optimizer_state_dict"]["state"][group]["exp_avg"] for state in states]
        for name, shape in parameters.items():
            size = -(-shape.numel() // count)
            whole = torch.cat([part[position : position + size] for part in flat])
            moments[name] = whole[: shape.numel()]
            position += size
    return moments


def load(folder: Path, rank: int, kind: str) -> dict:
    (file,) = folder.glob(f"*zero_pp_rank_{rank}_mp_rank_00_{kind}.pt")
    return torch.load(file, weights_only=False, map_location="cpu")


if __name__ == "__main__":
    first, second = (first_moments(Path(folder)) for folder in sys.argv[1:3])
    assert first.keys() == second.keys()
    print(json.dumps({n: ((first[n] - second[n]).norm() / first[n].norm().clamp(min=1e-20)).item() for n in first}))
