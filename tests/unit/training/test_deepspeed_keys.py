"""Keys for DeepSpeed are merged last, checked, and part of the run id; the dtype of gradient sums is a run's own."""

import dataclasses
import json

import pytest
import training_helpers as helpers
from planning_models import DEEPSEEK_V3 as V3

from deepseek_sft import expert_shards
from deepseek_sft.errors import BadInputError
from deepseek_sft.settings import deepspeed_keys
from deepseek_sft.training import new_runs, settings
from deepseek_sft.training.xtuner_engine import config

RECEIPT = {"rule": "x", "inputs": {}, "settings": {}, "figures": {}}


def run_id(**changes):
    return settings.run_id(helpers.settings(**changes), RECEIPT, RECEIPT)


def test_keys_are_merged_last_and_the_others_stay(tmp_path):
    given = {"zero_optimization": {"reduce_bucket_size": 7, "overlap_comm": False}, "steps_per_print": 3}
    found = config.deepspeed(helpers.settings(deepspeed=given), "cuda", tmp_path)
    assert found["zero_optimization"]["reduce_bucket_size"] == 7
    assert found["zero_optimization"]["overlap_comm"] is False
    assert found["zero_optimization"]["stage"] == 3
    assert found["steps_per_print"] == 3


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"zero_optimization": {"stage": 2}}, "checkpoints of stage 3"),
        ({"zero_optimization": {"offload_param": {}}}, "train.offload"),
        ({"zero_optimization": {"stage3_max_live_parameter": 1}}, "not one of the keys"),
        ({"zero_optimization": {"reduce_bucket_size": 5e8}}, "whole number"),
        ({"zero_optimization": {"overlap_comm": 1}}, "true or false"),
        ({"zero_optimization": 3}, "expected keys"),
        ({"gradient_clipping": 1.0}, "train.max_grad_norm"),
        ({"bf16": {"enabled": False}}, "train.dtype"),
        ({"nonsense": 1}, "not one of the keys"),
    ],
)
def test_what_would_break_a_run_is_refused_with_its_reason(given, said):
    (problem,) = deepspeed_keys.problems(given)
    assert said in problem


def test_taken_keys_have_no_problem():
    assert not list(deepspeed_keys.problems({"zero_optimization": {"sub_group_size": 5}, "dump_state": True}))


def test_run_id_changes_only_where_keys_are_set():
    assert run_id() == run_id(deepspeed=None, gradient_communication_dtype=None)
    assert len({run_id(), run_id(deepspeed={"dump_state": True}), run_id(gradient_communication_dtype="bfloat16")}) == 3


def test_a_new_run_sums_gradients_in_float32_and_deals_rows_by_cost(tmp_path):
    found = new_runs.settle(helpers.settings(dtype="bfloat16"), tmp_path / "new", "id", V3)
    assert (found.gradient_communication_dtype, found.deal_rows, found.zero_thresholds) == ("float32", "cost", "shard")
    assert found.async_save == "auto"
    told = config.deepspeed(dataclasses.replace(found, zero_thresholds="deepspeed"), "cpu", tmp_path)
    assert told["communication_data_type"] == "fp32"


@pytest.mark.parametrize(
    ("kept", "dtype", "dealt"),
    [
        ({}, "bfloat16", "order"),
        ({"gradient_communication_dtype": "float32"}, "float32", "order"),
        ({"gradient_communication_dtype": "float32", "deal_rows": "cost"}, "float32", "cost"),
    ],
)
def test_a_begun_run_goes_on_as_it_was_begun(tmp_path, kept, dtype, dealt):
    (tmp_path / "settings.json").write_text(json.dumps({"settings": kept}))
    found = new_runs.settle(helpers.settings(dtype="bfloat16"), tmp_path, "id", V3)
    assert (found.gradient_communication_dtype, found.deal_rows) == (dtype, dealt)
    assert (found.zero_thresholds, found.async_save) == ("deepspeed", "off")


@pytest.mark.parametrize("text", ["{", "[]", '{"settings": {"deal_rows": "by chance"}}'])
def test_a_begun_run_whose_settings_cannot_be_read_is_not_guessed(tmp_path, text):
    (tmp_path / "settings.json").write_text(text)
    with pytest.raises(BadInputError, match="is not known"):
        new_runs.settle(helpers.settings(dtype="bfloat16"), tmp_path, "id", V3)


@pytest.mark.parametrize(
    ("kept", "expected"),
    [(None, 16), ({"settings": {"experts_per_shard": 32}}, 32), ({"settings": {"dtype": "x"}}, 16)],
)
def test_how_many_experts_share_a_parameter_stays_with_a_run(tmp_path, kept, expected):
    if kept:
        (tmp_path / "settings.json").write_text(json.dumps(kept))
    assert new_runs.settle(helpers.settings(experts_per_shard="auto"), tmp_path, "id", V3).experts_per_shard == expected
    assert new_runs.settle(helpers.settings(experts_per_shard=8), tmp_path, "id", V3).experts_per_shard == 8


@pytest.mark.parametrize(("kept", "size", "shard"), [(None, 64, 4), ({"expert_parallel_size": 16}, 16, 16)])
def test_over_how_many_ranks_experts_are_spread_is_the_plan_s_choice_and_stays_with_a_run(tmp_path, kept, size, shard):
    if kept:
        (tmp_path / "settings.json").write_text(json.dumps({"settings": kept}))
    left_open = helpers.settings(expert_parallel_size="auto", experts_per_shard="auto")
    found = new_runs.settle(left_open, tmp_path, "id", V3, planned=64)
    assert (found.expert_parallel_size, found.experts_per_shard) == (size, shard)


def test_without_a_plan_it_is_not_guessed_over_how_many_ranks_experts_are_spread(tmp_path):
    with pytest.raises(BadInputError, match="is the plan's choice"):
        new_runs.settle(helpers.settings(expert_parallel_size="auto"), tmp_path, "id", V3)


@pytest.mark.parametrize(
    ("experts", "hidden", "ffn", "expected"),
    [
        (256, 7168, 2048, 16),
        (384, 7168, 2048, 16),
        (64, 2048, 1408, 16),
        (8, 64, 32, 2),
        (2, 64, 32, 1),
        (7, 64, 32, 1),
    ],
)
def test_a_shard_has_as_many_experts_as_divide_and_fit(experts, hidden, ffn, expected):
    config = {"n_routed_experts": experts, "hidden_size": hidden, "moe_intermediate_size": ffn}
    assert expert_shards.experts_per_shard(config, "auto") == expected


def test_what_a_begun_run_did_before_is_left_to_deepspeed(tmp_path):
    begun = dataclasses.replace(helpers.settings(dtype="bfloat16"), gradient_communication_dtype="bfloat16")
    assert "communication_data_type" not in config.deepspeed(begun, "cpu", tmp_path)
