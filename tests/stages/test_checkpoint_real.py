"""Checkpoints written by the real DeepSpeed become, bit for bit, what DeepSpeed's own tool makes of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import small_models

pytestmark = pytest.mark.stage("train")
HERE = Path(__file__).parent

# zero_to_fp32 is DeepSpeed's own converter; experts are un-merged and rounded by torch here.
REFERENCE = """
import re, sys
from pathlib import Path
import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from safetensors.torch import save_file
checkpoint, prefix, experts, output = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
tensors = {}
for name, values in get_fp32_state_dict_from_zero_checkpoint(str(checkpoint.parent), tag=checkpoint.name).items():
    name = name.removeprefix(prefix)
    match = re.fullmatch(r"(.*experts)[.](\\d+)[.](w1w3|w2)", name)
    if not match:
        tensors[name] = values
        continue
    for i, expert in enumerate(values):
        place = f"{match[1]}.{int(match[2]) * experts + i}"
        parts = {"down_proj": expert} if match[3] == "w2" else dict(zip(("gate_proj", "up_proj"), expert.chunk(2)))
        tensors |= {f"{place}.{part}.weight": part_values for part, part_values in parts.items()}
bias = "e_score_correction_bias"
save_file({n: (v.float() if n.endswith(bias) else v.bfloat16()).contiguous() for n, v in tensors.items()}, output)
"""


@pytest.mark.parametrize(
    "world_size, experts_per_shard, sub_group_size, prefix, dtype",
    [(2, 2, 4000, "llm.", "bf16"), (3, 4, 10**9, "", "fp32")],
)
def test_deepspeed_checkpoint_converts_bit_for_bit(
    tmp_path, project, environment, world_size, experts_per_shard, sub_group_size, prefix, dtype
):
    train = environment("train")
    base, checkpoint, model = small_models.make_base(tmp_path / "base"), tmp_path / "run/step3", tmp_path / "model"
    layout = [str(experts_per_shard), str(sub_group_size), prefix, dtype]
    settings = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    launcher = [train, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world_size}"]
    subprocess.run(
        [*launcher, HERE / "zero3_checkpoint.py", base, checkpoint, *layout], check=True, env=os.environ | settings
    )
    converter = project / "workflow/scripts/convert_checkpoint.py"
    common = [f"--checkpoint={checkpoint}", f"--base={base}", f"--receipt={tmp_path / 'receipt.json'}"]
    subprocess.run([sys.executable, converter, *common, f"--output={model}", "--max-shard-size=20kB"], check=True)
    receipt = json.loads((tmp_path / "receipt.json").read_text())
    assert (receipt["figures"]["step"], receipt["figures"]["world_size"]) == (3, world_size)

    reference = tmp_path / "reference"
    reference.mkdir()
    command = [train, "-c", REFERENCE, checkpoint, prefix, str(experts_per_shard), reference / "model.safetensors"]
    subprocess.run(command, check=True, env=os.environ | settings)
    found, expected = small_models.read_tensors(model), small_models.read_tensors(reference)
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name].tobytes() != expected[name].tobytes()] == []

    verifier = project / "workflow/scripts/verify_model.py"
    bound = ["--learning-rate=1e-3", "--steps=3", "--full"]
    subprocess.run([sys.executable, verifier, *common, f"--model={model}", *bound], check=True)


def test_transformers_loads_the_tiny_model_without_missing_or_unexpected_keys(tmp_path, environment):
    base = small_models.make_base(tmp_path / "base")
    program = (
        "import sys, torch; from transformers import AutoModelForCausalLM, AutoTokenizer;"
        "model, found = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True);"
        "assert type(model).__module__.startswith('transformers.models.deepseek_v3'), type(model);"
        "assert not any(found.values()), found;"
        "tokens = torch.tensor([[0, 5, 7]]); assert torch.isfinite(model(tokens).logits).all();"
        "assert AutoTokenizer.from_pretrained(sys.argv[1]).bos_token_id == 0"
    )
    subprocess.run([environment("train"), "-c", program, base], check=True)
