"""Promises of the training model, against transformers' own classes in fp32."""

import json
import os
import subprocess
from pathlib import Path

import family_shapes
import numpy as np
import pytest
import small_models

from deepseek_sft.convert import tiny_model

pytestmark = pytest.mark.stage("train")
STAGES = Path(__file__).resolve().parent


KINDS = ["r1", "beyond the original context", *family_shapes.FAMILIES, "weights not normalised"]
WAYS = ["fused experts", "one expert a shard", "grouped products", "checkpointing", "attention kept"]


@pytest.fixture(scope="module")
def probe(environment, project):
    def run(name: str, *arguments: Path) -> dict:
        """Run a probe in the train environment and return what it prints."""
        result = subprocess.run(
            [str(environment("train")), str(STAGES / name), *map(str, arguments)],
            env=os.environ
            | {"PYTHONPATH": f"{project / 'workflow'}:{project / 'tests'}", "DS_ACCELERATOR": "cpu", "LOCAL_RANK": "0"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout.splitlines()[-1])

    return run


@pytest.fixture(scope="module")
def figures(probe, tmp_path_factory):
    base = tmp_path_factory.mktemp("model") / "base"
    tiny_model.write_tiny(base, tiny_model.TinyShape(vocab_size=1024, kv_lora_rank=64), 0, 8_000_000)
    return probe("training_probe.py", base)


@pytest.fixture(scope="module")
def variants(probe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("variants")
    base = small_models.make_base(folder / "bf16", hidden_size=160, moe_intermediate_size=144)
    expected = small_models.make_fp8_release(base, folder / "fp8")
    np.savez(folder / "fp8.npz", **expected)
    return probe("training_variants_probe.py", folder, folder / "fp8")


def test_logits_are_those_of_transformers(figures):
    assert figures["logits"] < 1e-5


def test_the_chunked_loss_is_that_of_transformers(figures):
    assert figures["loss"] < 1e-5


def test_the_loss_of_each_token_is_that_of_transformers(figures):
    assert figures["token_losses"] < 1e-5


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


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_every_kind_of_release_computes_what_transformers_computes(variants, kind, way):
    found = variants["kinds"][kind][way]
    assert found["logits"] < 1e-5
    assert found["loss"] < 1e-6
    assert found["gradients"] < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_kept_attention_is_computed_once_and_changes_no_bit(variants, kind):
    ways = variants["kinds"][kind]
    layers = ways["fused experts"]["kernels"]
    assert layers > 0
    assert (ways["checkpointing"]["kernels"], ways["attention kept"]["kernels"]) == (2 * layers, layers)
    assert ways["attention kept"]["same bits"]


def test_flash_attention_gets_heads_of_one_size_and_the_samples_boundaries(variants):
    assert variants["flash"]["rows"] < 1e-5
    assert variants["flash"]["packed"] < 1e-5


def test_no_gathered_weights_are_kept_from_the_forward_to_the_backward_pass(variants):
    assert variants["released"]["input_gradient"] < 1e-5 * variants["released"]["size"]


def test_an_fp8_release_is_loaded_as_its_dequantised_values(variants):
    assert variants["fp8"]["rows"] == [144, 160]
    assert variants["fp8"]["worst"] == 0
    assert variants["fp8"]["parts"] == 0


def test_experts_are_multiplied_in_a_loop_on_cpu_unless_grouped_is_asked_for(variants):
    assert variants["rule"] == {"auto on CPU": False, "grouped on CPU": True, "loop": False}


@pytest.fixture(scope="module")
def zero_calls(probe, tmp_path_factory):
    return probe("zero_calls_probe.py", tmp_path_factory.mktemp("zero_calls"))


def test_gathers_and_sums_over_ranks_give_the_bits_of_deepspeeds_own(zero_calls):
    assert len(zero_calls) == 3
    for rank in zero_calls:
        assert rank["reduced differently"] == []
        assert rank["gathered alike"] == [True, True, True]


def test_modules_gather_and_train_as_under_deepspeeds_own_hooks_bit_for_bit(zero_calls):
    for rank in zero_calls:
        assert rank["gathers, trained alike"] > 100
        assert rank["trained alike"]


def test_what_deepspeed_decided_is_repeated_until_the_order_of_modules_changes(zero_calls):
    for rank in zero_calls:
        # Learnt in 0 and 1, noted in 2; a block is missing from 7, so that it is learnt and noted anew in 8 to 10.
        assert rank["repeated, trained alike"] == [3, 4, 5, 6, 11]


def test_modules_with_frozen_parameters_gather_and_train_as_under_deepspeeds_own_hooks(zero_calls):
    for rank in zero_calls:
        assert rank["trained alike with a frozen norm"]
