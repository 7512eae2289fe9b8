"""Promises of the training model, against transformers' own classes in fp32."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from deepseek_sft.model import tiny

pytestmark = pytest.mark.stage("train")
STAGES = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def figures(environment, project, tmp_path_factory):
    base = tmp_path_factory.mktemp("model") / "base"
    tiny.write_tiny(base, tiny.TinyShape(vocab_size=1024, kv_lora_rank=64), 0, 8_000_000)
    result = subprocess.run(
        [str(environment("train")), str(STAGES / "training_probe.py"), str(base)],
        env=os.environ | {"PYTHONPATH": str(project / "workflow"), "DS_ACCELERATOR": "cpu", "LOCAL_RANK": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_logits_are_those_of_transformers(figures):
    assert figures["logits"] < 1e-5


def test_the_chunked_loss_is_that_of_transformers(figures):
    assert figures["loss"] < 1e-5


def test_every_gradient_is_that_of_transformers(figures):
    assert max(figures["gradients"].values()) < 1e-5, max(figures["gradients"].items(), key=lambda item: item[1])


def test_rotary_frequencies_are_those_of_the_published_scaling(figures):
    assert figures["inv_freq"] == 0


def test_a_batch_without_targets_gives_every_parameter_a_zero_gradient(figures):
    assert figures["without_targets"] == []


def test_packed_samples_do_not_see_each_other(figures):
    assert figures["packing"] < 1e-5


def test_the_balance_loss_counts_real_tokens_by_its_formula(figures):
    assert figures["balance"] < 1e-5


def test_experts_of_groups_left_out_never_win(figures):
    assert figures["groups_used"] == 2


def test_bias_and_frequencies_stay_fp32_and_exact_in_a_bf16_model_that_zero3_splits(figures):
    assert figures["split_parameters"]
    assert figures["buffers_of_split_model"] == ["torch.float32"]
    assert figures["inv_freq_of_split_model"] == 0


def test_a_rank_loads_its_own_slices_of_every_parameter(figures):
    assert figures["split_weights"] == 0


def test_shims_do_nothing_where_the_packages_are_there(figures):
    assert figures["shims"]["needed"]
    assert figures["shims"]["again"] == []
    assert figures["shims"]["with_packages"] == []
    assert figures["shims"]["stubbed_with_packages"] == []
