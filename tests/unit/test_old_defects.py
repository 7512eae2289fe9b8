"""Defects of an earlier system for the same models that show without a training environment.

Each test fails on the old behaviour, which it spells out. The others are in tests/stages/test_old_defects.py.
"""

import re
import subprocess
import sys

import numpy as np
import pytest
import small_models
import synthetic_zero3
from training_helpers import settings

from deepseek_sft.convert import base_model, convert, zero
from deepseek_sft.data import messages
from deepseek_sft.slurm import sbatch
from deepseek_sft.slurm.sbatch import Allocation
from deepseek_sft.tensors.safetensors_files import read_header
from deepseek_sft.training.xtuner_engine import config

LARGE = 70_000.0  # finite in bf16, infinite in fp16
PROGRAM = re.compile(r"workflow/scripts/[\w./-]+")


def test_a_converted_model_is_bf16_and_keeps_what_fp16_cannot_hold(tmp_path, project):
    base = small_models.make_base(tmp_path / "base")
    tensors = small_models.read_tensors(base)
    name = "lm_head.weight"
    tensors[name] = np.full_like(tensors[name], LARGE)
    fused = synthetic_zero3.fuse(tensors, 2, "llm.")
    buffers = {key: values for key, values in fused.items() if key.endswith("e_score_correction_bias")}
    parameters = {key: values for key, values in fused.items() if key not in buffers}
    groups = synthetic_zero3.split_groups(parameters, 3000)
    folder = synthetic_zero3.write_checkpoint(tmp_path / "step_7", groups, 2, buffers)
    opened = zero.open_checkpoint(folder), base_model.open_model(base)
    convert.run(convert.prepare(*opened, tmp_path / "model", convert.Options(workers=1)))
    dtypes = {t.spec.dtype for path in (tmp_path / "model").glob("*.safetensors") for t in read_header(path).values()}
    assert dtypes == {"BF16", "F32"}  # F32: the routers' biases, as in the release
    assert np.isfinite(small_models.read_tensors(tmp_path / "model")[name]).all()
    with np.errstate(over="ignore"):
        assert np.isinf(np.float32(LARGE).astype(np.float16))  # what the old converter wrote
    command = [sys.executable, str(project / "workflow/scripts/convert_checkpoint.py"), "--dtype", "fp16"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "invalid choice: 'fp16'" in done.stderr


# What of xtuner and DeepSpeed collects a whole model in one process.
GATHERING = re.compile(r"HFCheckpointHook|GatheredParameters|_zero3_consolidated_16bit_state_dict|save_16bit_model")


def what_gathers(deepspeed: dict, sources: str) -> list[str]:
    key = "stage3_gather_16bit_weights_on_model_save"
    return GATHERING.findall(sources) + [key] * deepspeed["zero_optimization"][key]


def test_nothing_gathers_the_whole_model_on_rank_0(tmp_path, project):
    told = config.deepspeed(settings(), "cuda", tmp_path)
    engine = project / "workflow/deepseek_sft/training/xtuner_engine"
    sources = "".join(path.read_text() for path in engine.glob("*.py"))
    assert "deepspeed.initialize" in sources
    assert what_gathers(told, sources) == []
    old = 'custom_hooks = [dict(type="xtuner.engine.hooks.HFCheckpointHook")]'  # of its configuration
    assert what_gathers(told, old) == ["HFCheckpointHook"]


def programs_that_do_not_exist(script: str, project) -> list[str]:
    return [name for name in PROGRAM.findall(script) if not (project / name).is_file()]


@pytest.mark.parametrize("name", ["train", "smoke_test"])
def test_every_program_that_a_script_starts_exists_and_is_given_to_python(name, project):
    context = {
        "project": str(project),
        "experiment": "r1",
        "results": "results/r1",
        "logs": "logs/r1",
        "python": "python",
        "activate": "",
        "accelerator": "cuda",
        "environment": {},
        "ranks_per_node": None,
        "preflight": True,
        "spare_nodes": 0,
    }
    script = sbatch.render(name, Allocation(nodes=2, gres="gpu:8"), context)
    assert PROGRAM.search(script)
    assert programs_that_do_not_exist(script, project) == []
    assert not re.search(r"(bash|sh) \S+\.py", script)  # the old script ran a Python file with bash
    old = script.replace("workflow/scripts/train.py", "workflow/scripts/train")  # and named one without its ending
    assert name != "train" or programs_that_do_not_exist(old, project)


def test_an_assistant_turn_without_a_loss_key_is_trained_though_others_have_one():
    conversation = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d", "loss": False},
        {"role": "user", "content": "e"},
        {"role": "assistant", "content": "f", "loss": True},
    ]
    # A table of such records has the key in every row, null where it was absent; the old code read null as "none".
    for absent in ({}, {"loss": None}):
        conversation[1] = {"role": "assistant", "content": "b", **absent}
        assert [turn["loss"] for turn in messages.normalise(conversation) if "loss" in turn] == [True, False, True]
    old = [str(turn.get("loss")).lower() == "true" for turn in conversation if turn["role"] == "assistant"]
    assert old == [False, False, True]
