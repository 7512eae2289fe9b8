"""Run in the training environment: what transformers and DeepSpeed say of a model, as one line of JSON.

python planning_probe.py counts CONFIG.json      parameters and tensors of DeepseekV3ForCausalLM on the meta device
python planning_probe.py estimate ELEMENTS LARGEST GPUS NODES OFFLOAD      DeepSpeed's estimator of model states
"""

import json
import sys
from pathlib import Path


def counts(file: str) -> dict[str, int]:
    import torch
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = json.loads(Path(file).read_text())
    config.pop("quantization_config", None)
    with torch.device("meta"):
        model = DeepseekV3ForCausalLM(DeepseekV3Config(**config))
    trained = [parameter.numel() for parameter in model.parameters()]
    biases = [b.numel() for name, b in model.named_buffers() if name.endswith("e_score_correction_bias")]
    return {
        "trained": sum(trained),
        "parameters": sum(trained) + sum(biases),
        "tensors": len(trained) + len(biases),
    }


def estimate(elements: str, largest: str, gpus: str, nodes: str, offload: str) -> dict[str, float]:
    from deepspeed.runtime.zero import stage3

    cpu, gpu, layer = stage3.estimate_zero3_model_states_mem_needs(
        int(elements), int(largest), int(gpus), int(nodes), offload == "1", offload == "1", True, 1.5
    )
    return {"host": cpu, "device": gpu, "largest": layer}


if __name__ == "__main__":
    print(json.dumps({"counts": counts, "estimate": estimate}[sys.argv[1]](*sys.argv[2:])))
