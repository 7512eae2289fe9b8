"""Promises about what the plan says would be faster, and about the time that it counts."""

import dataclasses

import numpy as np
import planning_plans as plans
import pytest

from deepseek_sft.data import dealing
from deepseek_sft.planning import plan as planning
from deepseek_sft.planning.recommend import recommend
from deepseek_sft.planning.settings import Samples, Training, estimate

SHAPE = ("zero3_offload", 4, 2, 16, 1, None, 8, "bfloat16", True, 100, 2)  # of config/config.yaml


def planned(samples: Samples, where=None, **changes) -> planning.Plan:
    training = dataclasses.replace(Training(*SHAPE), **changes).for_rows(samples)
    return planning.make(plans._counted("DEEPSEEK_V3"), training, samples, where or plans.cluster(32))


def loose(mean: int) -> Samples:
    return Samples(100_000, mean, 32_768, "estimated", spread=estimate(mean, 32_768))


def packed(mean: int) -> Samples:
    lengths = np.full(256, 31_785, np.int64)
    spread = dealing.Rows(lengths, lengths * (mean + 1) // 2)
    return Samples(25_000, 31_785, 32_768, "estimated", 31_785 / mean, True, spread)


def test_dealing_and_packing_shorten_the_step_of_the_published_batch():
    order, dealt = (planned(loose(7_800), deal_rows=how) for how in ("order", "cost"))
    together = planned(packed(7_800), accumulate_by="samples")
    steps = [plan.duration.expected_step_s for plan in (order, dealt, together)]
    assert steps == sorted(steps, reverse=True)
    assert order.duration.turns.useful_slots < 0.3
    assert dealt.duration.turns.useful_slots >= 0.85
    assert together.duration.turns.useful_slots >= 0.95
    assert together.duration.tokens_per_step == pytest.approx(order.duration.tokens_per_step, rel=0.03)


@pytest.mark.parametrize("samples", [loose(7_800), packed(7_800), Samples(100_000, 32_768, 32_768, "estimated")])
def test_the_slowest_step_is_at_most_twice_the_fastest_and_none_is_below_the_least(samples):
    found = planned(samples).duration
    assert found.step.slowest <= 2 * found.step.fastest
    assert found.limit_s[0] <= found.step.fastest * 1.001


def test_where_memory_is_left_fewer_gathers_are_advised_with_the_same_rows_a_step():
    plan = planned(packed(7_800), accumulate_by="samples")
    first, *_ = recommend(plan)
    assert first.settings == {"micro_batch_size": 4, "gradient_accumulation_steps": 2}
    assert first.plan.duration.global_batch == plan.duration.global_batch
    assert first.plan.duration.expected_step_s < 0.98 * plan.duration.expected_step_s
    assert first.plan.device_bytes <= 0.93 * first.plan.cluster.gpu_bytes
    assert "fewer gathers" in first.text


def test_nothing_is_advised_that_memory_has_no_room_for_and_nothing_on_cpu():
    small = plans.cluster(32, gpu_bytes=40 * 2**30)
    assert not [one for one in recommend(planned(packed(7_800), small)) if "micro_batch_size" in one.settings]
    assert recommend(planned(packed(7_800), plans.cluster(32, gpu_bytes=None))) == []


def test_attention_that_is_kept_is_not_computed_again():
    full, kept = (planned(loose(30_000), recompute=how).duration.parts[0] for how in ("full", "without_attention"))
    assert 0.8 < kept.fastest / full.fastest < 0.95
