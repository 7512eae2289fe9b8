"""Run by torchrun in the train environment: the same steps, spread over ranks in different ways; rank 0 writes JSON.

Usage: training_spread_probe.py INPUTS CASES OUTPUT
CASES is JSON: name → {"settings": {…}, "steps": N, "moments": bool, "inputs": name}. Moments are compared with
OUTPUT/reference.pt where it is there.
"""

import json
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def main(inputs: Path, cases: dict, output: Path) -> None:
    from deepseek_sft.training.xtuner_engine import compat

    compat.install("cpu")
    import deepspeed
    import torch.distributed as dist

    torch.set_num_threads(1)
    deepspeed.logger.setLevel("ERROR")
    deepspeed.init_distributed("gloo", verbose=False)
    from training_engine import engine

    for name, case in cases.items():
        begin = time.monotonic()
        with engine(inputs / "base", inputs / case.get("tokens", "tokens"), **case["settings"]) as run:
            figures: dict = {"losses": [run.step() for _ in range(case.get("steps", 1))]}
            if case.get("moments"):
                figures["moments"] = differences(run.first_moments(), output / "reference.pt")
            if run.model.balance_bias is not None:
                figures["biases"] = torch.stack([r.e_score_correction_bias for r in run.model.llm.routers()]).tolist()
            everyone = [None] * dist.get_world_size()
            dist.all_gather_object(everyone, (run.model.llm.bytes_read, figures.get("biases")))
            figures["bytes_read"] = [entry[0] for entry in everyone]
            figures["biases_equal"] = all(entry[1] == everyone[0][1] for entry in everyone)
        if dist.get_rank() == 0:
            figures["seconds"] = time.monotonic() - begin
            (output / f"{name}.json").write_text(json.dumps(figures))
    dist.barrier()


def differences(moments: dict[str, torch.Tensor], reference: Path) -> dict[str, float]:
    """Relative difference of each parameter's first moment from (1 - beta1) × the reference's gradient."""
    wanted = torch.load(reference)
    assert moments.keys() == wanted.keys()
    return {
        name: ((moment.flatten() / 0.1 - wanted[name]).norm() / wanted[name].norm().clamp(min=1e-12)).item()
        for name, moment in moments.items()
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()), Path(sys.argv[3]))
