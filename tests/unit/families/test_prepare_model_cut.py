"""A base cut to a few layers: the same tensors under the numbers of their new places, in BF16 and from FP8."""

import json
import subprocess
import sys

import numpy as np
import pytest
import small_models

from deepseek_sft.config import merge
from deepseek_sft.convert import base_model, cut_base, dequantize, tiny_model
from deepseek_sft.errors import BadInputError
from deepseek_sft.families import deepseek_v3
from deepseek_sft.planning import load


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Three dense layers, then three with experts, and a prediction layer: as DeepSeek-V3, smaller."""
    folder = tmp_path_factory.mktemp("cut")
    plain = small_models.make_base(folder / "bf16", layers=6, dense_layers=3)
    values = small_models.make_fp8_release(plain, folder / "fp8")
    return plain, folder / "fp8", values


def written(folder, layers, output, mtp="drop"):
    view = cut_base.cut_base(base_model.open_model(folder), layers)
    dequantize.dequantize(view, output, dequantize.Options(mtp=mtp, largest_shard=100_000, workers=2))
    return base_model.open_model(output)


@pytest.mark.parametrize("layers", [4, 5])
@pytest.mark.parametrize("kind", [0, 1], ids=["bf16", "fp8"])
def test_the_first_layers_keep_their_values(base, tmp_path, kind, layers):
    model = written(base[kind], layers, tmp_path / "out")
    found, before = small_models.read_tensors(tmp_path / "out"), small_models.read_tensors(base[0])
    wanted = {**before, **base[2]} if kind else before
    assert model.config["num_hidden_layers"] == layers and model.config["first_k_dense_replace"] == 3
    assert found.keys() == deepseek_v3.tensor_specs(model.config).keys()
    assert all(np.array_equal(values, wanted[name]) for name, values in found.items())


def test_a_cut_that_would_be_dense_alone_takes_the_first_layer_with_experts(base, tmp_path):
    model = written(base[0], 2, tmp_path / "out")
    found, before = small_models.read_tensors(tmp_path / "out"), small_models.read_tensors(base[0])
    assert model.config["first_k_dense_replace"] == 1
    moved = [name for name in found if name.startswith("model.layers.1.")]
    assert any(".experts." in name for name in moved)
    assert all(np.array_equal(found[name], before[name.replace(".1.", ".3.", 1)]) for name in moved)


def test_the_prediction_layer_comes_after_the_last_kept_one(base, tmp_path):
    model = written(base[1], 4, tmp_path / "out", mtp="copy")
    assert model.mtp_layers == 1 and all(name.startswith("model.layers.4.") for name in model.mtp)
    assert model.config["num_nextn_predict_layers"] == 1


def test_two_cuts_of_a_base_are_two_models(base):
    model = base_model.open_model(base[0])
    prints = {model.fingerprint, *(cut_base.cut_base(model, layers).fingerprint for layers in (4, 5))}
    assert len(prints) == 3


@pytest.mark.parametrize(("layers", "said"), [(6, "the base has 6"), (9, "the base has 6"), (1, "the first is dense")])
def test_a_cut_that_is_none_is_refused(base, layers, said):
    with pytest.raises(BadInputError, match=said):
        cut_base.cut_base(base_model.open_model(base[0]), layers)


def test_the_program_says_what_it_wrote_and_the_plan_counts_the_same(base, tmp_path, project):
    receipt = tmp_path / "receipt.json"
    command = [sys.executable, project / "workflow/scripts/prepare_model.py", "--base", base[1], "--layers", "4"]
    command += ["--output", tmp_path / "out", "--receipt", receipt]
    subprocess.run(command, check=True, capture_output=True)
    told = json.loads(receipt.read_text())
    config = {"model": {"tiny": None, "base": str(base[1]), "layers": 4}, "plan": {}}
    assert told["settings"] == {"layers": 4} and told["figures"]["layers"] == 4
    assert told["figures"]["parameters"] == load.model_of(config).total


def test_four_layers_of_the_published_size_have_one_with_experts():
    published = tiny_model.config_of(small_models.FULL_SIZE)
    config = {"model": {"tiny": None, "base": None, "layers": 4}, "plan": {"model": "deepseek-v3"}}
    cut = load.model_of(config).total
    expected = sum(
        spec.elements
        for name, spec in deepseek_v3.tensor_specs(published).items()
        if not name.startswith("model.layers.") or int(name.split(".")[2]) < 4
    )
    assert cut == expected


def test_only_a_base_is_cut():
    from deepseek_sft import config

    overlay = {"experiment": "x", "accelerator": "cpu", "data": {"sources": ["a"]}, "train": {"ranks_per_node": 1}}
    with pytest.raises(BadInputError, match=r"model\.layers: cuts `model\.base`"):
        config.resolve(merge(overlay, {"model": {"tiny": {}, "base": None, "layers": 4}}))
