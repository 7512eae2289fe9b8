"""Promises of the checks before the first step: a model that is not the base on disk is never trained."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import small_models

from deepseek_sft.convert import base_model, dequantize
from deepseek_sft.settings import deepspeed_keys

pytestmark = pytest.mark.stage("train")
STAGES = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def figures(environment, project, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    original = small_models.make_base(folder / "original")
    small_models.make_fp8_release(original, folder / "fp8")
    dequantize.dequantize(base_model.open_model(folder / "fp8"), folder / "base", dequantize.Options(workers=1))
    command = [
        str(environment("train")),
        str(STAGES / "start_checks_probe.py"),
        str(folder / "base"),
        str(folder / "fp8"),
    ]
    variables = os.environ | {"PYTHONPATH": str(project / "workflow")}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_an_intact_model_passes(figures):
    assert figures["intact"] == figures["config"] == []
    assert figures["elements"] > 5000
    assert figures["repeatable"]


def test_deepspeed_knows_every_key_that_is_taken(figures):
    assert deepspeed_keys.IN_ZERO.keys() <= set(figures["zero keys"])


def test_a_model_of_an_fp8_release_passes(figures):
    assert figures["fp8"] == []


def test_gate_and_up_projections_exchanged_are_noticed(figures):
    (problem,) = figures["gate and up exchanged"]
    assert "model.layers.1.mlp.experts.0.w1w3: element" in problem


def test_a_changed_correction_bias_is_noticed_and_so_is_one_that_differs_between_ranks(figures):
    assert figures["bias"] == ["model.layers.1.mlp.gate.e_score_correction_bias differs from the base"]
    assert figures["ranks"] == ["the routers' correction biases differ from rank 0's (rank 1, 3)"]


@pytest.mark.parametrize("named", ["router 0: top_k is 1", "rope_theta is 5.0", "rms_norm_eps is 0.5"])
def test_what_would_be_computed_otherwise_than_the_base_says_is_named(figures, named):
    assert any(named in problem for problem in figures["changed config"])


def test_a_base_in_the_names_of_transformers_5_is_the_same_model(figures):
    assert figures["new names"] == figures["new and old"] == []


def test_a_lost_scaling_is_named_by_the_numbers_it_changes(figures):
    for what in ("rotary frequency", "the softmax scale"):
        assert any(what in problem for problem in figures["scaling lost"])


@pytest.mark.parametrize(
    "what", ["rotary frequency 2", "layer 1: the softmax scale", "router 0: routed_scaling_factor"]
)
def test_numbers_in_memory_that_config_json_does_not_imply_are_named(figures, what):
    assert any(problem.startswith(f"{what} would be ") for problem in figures["numbers"])


def test_parameters_of_another_dtype_than_configured_are_named(figures):
    assert "is torch.float32, not torch.bfloat16" in figures["dtype"][0]
