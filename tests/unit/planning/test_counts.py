"""Counts of public models, exact from config.json alone."""

import planning_models as models
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_sft.convert import tiny_model
from deepseek_sft.families import deepseek_v3
from deepseek_sft.planning.counting import count
from deepseek_sft.planning.terms import total


@pytest.fixture(scope="module")
def v3():
    return count(models.DEEPSEEK_V3)


def test_deepseek_v3_has_its_published_parameters_and_tensors(v3):
    assert v3.total == 671_026_419_200
    assert v3.tensors == 45_395
    assert v3.trained == v3.total - 58 * 256


def test_components_of_deepseek_v3_are_exact(v3):
    assert v3.parameters["embedding"] == v3.parameters["output layer"] == 129_280 * 7168
    assert v3.parameters["routed experts"] == 58 * 256 * 3 * 7168 * 2048
    assert v3.parameters["shared experts"] == 58 * 3 * 7168 * 2048
    assert v3.parameters["dense MLP"] == 3 * 3 * 7168 * 18432
    assert v3.parameters["router"] == 58 * (256 * 7168 + 256)
    assert sum(v3.parameters.values()) == v3.total


def test_deepseek_v3_activates_its_published_37_billion(v3):
    assert v3.activated == 37_552_297_472


def test_moonlight_has_its_published_16_and_3_billion():
    model = count(models.MOONLIGHT_16B)
    attention = 2048 * 16 * 192 + 2048 * 576 + 512 + 512 * 16 * 256 + 16 * 128 * 2048
    moe = 64 * 2048 + 64 + (64 + 2) * 3 * 2048 * 1408
    assert model.total == 2 * 163_840 * 2048 + 27 * (attention + 2 * 2048) + 26 * moe + 3 * 2048 * 11264 + 2048
    assert round(model.total / 1e9) == 16
    assert 2.5e9 < model.activated < 3.5e9


def test_tiny_model_is_counted_as_its_specification_says():
    config = tiny_model.config_of(tiny_model.TinyShape())
    model = count(config)
    specs = deepseek_v3.tensor_specs(config)
    assert (model.total, model.tensors) == (sum(spec.elements for spec in specs.values()), len(specs))


def test_sizes_of_deepseek_v3_are_the_published_ones(v3):
    assert round(v3.bf16_bytes / 1e12, 3) == 1.342
    assert round(v3.fp32_bytes / 1e12, 3) == 2.684
    assert round(v3.checkpoint_bytes / 1e12, 3) == 8.052
    assert round(v3.checkpoint_bytes / 2**40, 2) == 7.32
    assert 0.670e12 < v3.fp8_bytes < 0.676e12


@pytest.mark.parametrize(("ranks", "gigabytes"), [(256, 31.45), (128, 62.9)])
def test_rank_files_of_deepseek_v3_have_their_known_size(v3, ranks, gigabytes):
    assert 12 * v3.partition(ranks, 8) / 1e9 == pytest.approx(gigabytes, rel=1e-3)


def test_partition_agrees_with_a_count_over_every_training_parameter():
    config = tiny_model.config_of(tiny_model.TinyShape(vocab_size=1003, routed_experts=8))
    expected = 0
    for name, spec in deepseek_v3.tensor_specs(config).items():
        if ".mlp.experts." not in name and not name.endswith(deepseek_v3.CORRECTION_BIAS):
            expected += -(-spec.elements // 5)
    for _ in range(2 * 4):  # 2 MoE layers, 4 shards of 2 experts each
        expected += -(-2 * 2 * 64 * 64 // 5) + -(-2 * 64 * 64 // 5)
    assert count(config).partition(5, 2) == expected


@given(st.integers(1, 4096))
def test_partitions_of_all_ranks_hold_every_parameter_and_little_more(ranks):
    model = count(tiny_model.config_of(tiny_model.TinyShape()))
    parameters = sum(model.shapes.values()) + 2 * 2 * 2
    held = ranks * model.partition(ranks, 4)
    assert model.trained <= held < model.trained + ranks * parameters


def test_attention_flops_grow_with_the_causal_length(v3):
    short, long = v3.forward_flops(1), v3.forward_flops(32768)
    assert short[0] == long[0]
    assert long[1].value == 2 * 61 * 128 * (192 + 128) * 32769 / 2
    assert total(short) < total(long)
