"""Promises about steps, learning rates and the order of rows."""

from collections import Counter

import pytest
from training_helpers import settings

from deepseek_sft.errors import BadInputError
from deepseek_sft.training import schedule


def rows_over(steps: int, rows: int, global_batch: int) -> list[list[int]]:
    """Rows of each step."""
    return [schedule.rows_of_step(rows, 7, step, global_batch).tolist() for step in range(steps)]


def test_every_row_comes_once_an_epoch_also_where_epochs_end_inside_a_step():
    seen = [row for step in rows_over(21, rows=10, global_batch=4) for row in step]
    assert len(seen) == 84
    assert set(Counter(seen[:80]).values()) == {8}


def test_epochs_differ_in_order():
    assert list(schedule.order_of_epoch(30, 1, 0)) != list(schedule.order_of_epoch(30, 1, 1))


def test_accumulation_counted_in_samples_keeps_the_samples_of_a_step():
    chosen = settings(gradient_accumulation_steps=16, accumulate_by="samples")
    assert schedule.with_accumulation(chosen, rows=100, samples=100).gradient_accumulation_steps == 16
    assert schedule.with_accumulation(chosen, rows=100, samples=410).gradient_accumulation_steps == 4
    assert schedule.with_accumulation(chosen, rows=100, samples=9000).gradient_accumulation_steps == 1
    stays = settings(gradient_accumulation_steps=16)
    assert schedule.with_accumulation(stays, rows=100, samples=410) == stays


def test_steps_follow_from_rows_epochs_and_global_batch():
    chosen = settings(sequence_parallel_size=2, micro_batch_size=3, gradient_accumulation_steps=2, epochs=2)
    plan = schedule.plan(chosen, rows=100, world_size=8)
    assert (plan.data_parallel_size, plan.global_batch, plan.steps) == (4, 24, 9)
    assert plan.epoch(plan.steps) >= 2 > plan.epoch(plan.steps - 1)


def test_max_steps_is_the_number_of_steps_whatever_epochs_says():
    assert schedule.plan(settings(max_steps=500, epochs=1), rows=10, world_size=1).steps == 500


def test_a_single_warmup_step_is_below_the_peak():
    plan = schedule.plan(settings(warmup_ratio=0.03, max_steps=10, lr_schedule="cosine"), rows=10, world_size=1)
    rates = [plan.learning_rate(step) for step in range(1, 11)]
    assert plan.warmup_steps == 1
    assert rates[0] == pytest.approx(plan.peak / 2)
    assert max(rates) == rates[1] == plan.peak


def test_the_cosine_falls_to_just_above_the_minimum():
    chosen = settings(max_steps=100, lr_schedule="cosine", min_learning_rate=1e-4, warmup_ratio=0.1)
    plan = schedule.plan(chosen, rows=10, world_size=1)
    rates = [plan.learning_rate(step) for step in range(plan.warmup_steps + 1, 101)]
    assert rates == sorted(rates, reverse=True)
    assert plan.floor < rates[-1] < plan.floor * 1.01


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_shortest_runs_have_a_positive_learning_rate_in_every_step(steps):
    for ratio in (0.0, 0.03, 1.0):
        plan = schedule.plan(settings(warmup_ratio=ratio, max_steps=steps, lr_schedule="cosine"), 10, 1)
        assert all(0 < plan.learning_rate(step) <= plan.peak for step in range(1, steps + 1))


def test_a_sequence_parallel_size_that_does_not_divide_the_ranks_is_refused():
    with pytest.raises(BadInputError, match="does not divide the 6 ranks"):
        schedule.plan(settings(sequence_parallel_size=4), rows=10, world_size=6)
