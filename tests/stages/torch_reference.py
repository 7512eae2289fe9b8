"""What DeepSpeed's own tools and torch's casts make of checkpoints (run in the train environment).

usage: torch_reference.py JOBS.json    a list of {"checkpoint", "prefix", "experts_per_shard", "output", "masters"}

Writes ``bf16.safetensors`` and, from FP32 master weights, ``fp8.safetensors`` into each output folder. Master weights
are those of ``zero_to_fp32``. What it leaves out is taken from the model's own state after the last step, in BF16: what
was not trained at stage 1, and all weights of DeepSpeed's BF16 optimizer.
"""

import json
import re
import sys
from pathlib import Path

import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from safetensors.torch import save_file

BIAS = "e_score_correction_bias"
BLOCK, LARGEST = 128, 448


def unmerged(name: str, values: torch.Tensor, experts: int) -> dict[str, torch.Tensor]:
    match = re.fullmatch(r"(.*experts)\.(\d+)\.(w1w3|w2)", name)
    if not match:
        return {name: values}
    found = {}
    for i, expert in enumerate(values):
        place = f"{match[1]}.{int(match[2]) * experts + i}"
        if match[3] == "w2":
            found[f"{place}.down_proj.weight"] = expert
        else:
            found[f"{place}.gate_proj.weight"], found[f"{place}.up_proj.weight"] = expert.chunk(2)
    return found


def quantised(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and block factors by torch's own cast."""
    rows, columns = values.shape
    codes = torch.empty(values.shape, dtype=torch.float8_e4m3fn)
    factors = torch.empty((-(-rows // BLOCK), -(-columns // BLOCK)))
    for i in range(factors.shape[0]):
        for j in range(factors.shape[1]):
            place = slice(i * BLOCK, (i + 1) * BLOCK), slice(j * BLOCK, (j + 1) * BLOCK)
            factors[i, j] = values[place].abs().max() / LARGEST
            codes[place] = (values[place] / factors[i, j]).to(torch.float8_e4m3fn)
    return codes, factors


def main() -> None:
    for job in json.loads(Path(sys.argv[1]).read_text()):
        checkpoint, output = Path(job["checkpoint"]), Path(job["output"])
        output.mkdir(parents=True)
        whole, state = checkpoint / "mp_rank_00_model_states.pt", {}
        if whole.exists():  # stages 1 and 2
            state = torch.load(whole, weights_only=False)["module"]
        if job["masters"]:
            state |= get_fp32_state_dict_from_zero_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
        tensors = {}
        for name, values in state.items():
            tensors |= unmerged(name.removeprefix(job["prefix"]), values, job["experts_per_shard"])
        rounded = {n: (v.float() if n.endswith(BIAS) else v.bfloat16()).contiguous() for n, v in tensors.items()}
        save_file(rounded, output / "bf16.safetensors")
        if job["masters"]:
            for name, values in tensors.items():
                if name.endswith(("_proj.weight", "_mqa.weight")):
                    rounded[name], rounded[f"{name}_scale_inv"] = quantised(values.float())
            save_file(rounded, output / "fp8.safetensors")


if __name__ == "__main__":
    main()
