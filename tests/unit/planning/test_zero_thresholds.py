"""Promises about what ZeRO-3 gathers ahead."""

import planning_models as models
import pytest

from deepseek_sft import families
from deepseek_sft.planning.zero_thresholds import Thresholds, of_model

V3 = models.DEEPSEEK_V3


@pytest.mark.parametrize("experts", [8, 16, 32])
def test_a_whole_shard_is_gathered_ahead_while_another_is_computed(experts):
    found = of_model(V3, experts, by_shard=True, keep_layer_gathered=False)
    shard = experts * 3 * V3["hidden_size"] * V3["moe_intermediate_size"]
    assert found.prefetched >= shard
    assert found.live >= 2 * shard + found.prefetched
    assert found.reuse == Thresholds().reuse


def test_shards_smaller_than_deepspeeds_defaults_change_nothing():
    small = V3 | {"hidden_size": 64, "moe_intermediate_size": 64}
    assert of_model(small, 8, by_shard=True, keep_layer_gathered=False) == Thresholds()
    assert Thresholds().keys() == {}


def test_a_run_that_was_begun_before_has_deepspeeds_own():
    assert of_model(V3, 8, by_shard=False, keep_layer_gathered=False).keys() == {}


def test_a_layer_that_is_kept_is_within_what_may_live():
    found = of_model(V3, 8, by_shard=True, keep_layer_gathered=True)
    layer = families.of(V3).largest_layer(V3)
    assert (found.live, found.reuse) == (2 * layer, 2 * layer)
    assert set(found.keys()) == {
        "stage3_max_live_parameters",
        "stage3_max_reuse_distance",
        "stage3_prefetch_bucket_size",
    }
