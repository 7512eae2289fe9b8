"""Intervals against published numbers, and how often they hold what they say."""

import random

import pytest

from deepseek_sft.task_evaluation import intervals


def test_the_interval_of_a_share_is_wilsons():
    found = intervals.mean([1.0] * 81 + [0.0] * 182)
    assert (found.low, found.high) == pytest.approx((0.2553, 0.3662), abs=5e-5)  # Newcombe 1998, table I, 81/263


def test_all_right_is_not_certain():
    found = intervals.mean([1.0] * 20)
    assert found.mean == found.high == 1 and found.low == pytest.approx(0.8389, abs=1e-4)


def test_equal_results_on_few_items_are_not_taken_for_certainty():
    found = intervals.drop([1.0] * 50, [1.0] * 50)
    assert found.mean == 0 and found.high == pytest.approx(1.959964 * 2**0.5 / 52, rel=1e-6)


def test_scores_beyond_shares_get_the_standard_errors_interval():
    found = intervals.mean([2.0, 4.0, 6.0, 8.0])
    assert (found.low, found.high) == pytest.approx((5 - 2.5303, 5 + 2.5303), abs=1e-3)


def test_one_item_of_such_scores_has_no_interval():
    assert intervals.mean([7.0]).low is None


@pytest.mark.parametrize("right", [0.05, 0.5, 0.97])
@pytest.mark.parametrize("samples", [1, 4])
def test_the_true_mean_lies_in_the_interval_as_often_as_said(right, samples):
    chance = random.Random(7)
    held = 0
    for _ in range(600):
        scores = [sum(chance.random() < right for _ in range(samples)) / samples for _ in range(100)]
        found = intervals.mean(scores)
        held += found.low <= right <= found.high
    assert held / 600 > 0.92


def test_the_true_drop_lies_in_the_interval_as_often_as_said():
    chance, held = random.Random(7), 0
    for _ in range(600):
        before = [float(chance.random() < 0.8) for _ in range(100)]
        after = [one if chance.random() < 0.9 else 0.0 for one in before]
        found = intervals.drop(before, after)
        held += found.low <= 0.08 <= found.high
    assert held / 600 > 0.92
