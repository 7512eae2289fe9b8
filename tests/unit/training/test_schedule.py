"""Promises about steps, learning rates and the order of rows."""

import dataclasses
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


def begun(steps: int = 12, **changes) -> schedule.Schedule:
    chosen = settings(max_steps=steps, lr_schedule="cosine", warmup_ratio=0.25, micro_batch_size=2, **changes)
    return schedule.plan(chosen, rows=10, world_size=4)


def marker_of(plan: schedule.Schedule, step: int) -> dict:
    return {"step": step, "steps": plan.steps, "world_size": 4, "schedule": plan.told_after(step)}


def gone_on(plan: schedule.Schedule, step: int, **changes) -> schedule.Schedule:
    """From step ``step`` of a plan, with other settings."""
    chosen = settings(max_steps=12, lr_schedule="cosine", warmup_ratio=0.25, **changes)
    fresh = schedule.plan(chosen, rows=10, world_size=4)
    return schedule.resumed(fresh, chosen, schedule.Position.of(marker_of(plan, step), {}))


def rows_trained(plan: schedule.Schedule, first: int, last: int) -> list[int]:
    """Of the steps after ``first``, up to ``last``."""
    steps = range(first, last)
    return [row for step in steps for row in schedule.rows_from(10, 7, plan.rows_after(step), plan.global_batch)]


def test_a_run_that_goes_on_with_the_same_batch_has_the_very_schedule_of_its_beginning():
    plan = begun()
    assert plan.global_batch == 8
    assert gone_on(plan, 5, micro_batch_size=1, gradient_accumulation_steps=2) == plan
    assert gone_on(plan, 5, micro_batch_size=4, sequence_parallel_size=2) == dataclasses.replace(
        plan, data_parallel_size=2
    )


@pytest.mark.parametrize("micro_batch_size", [1, 3, 4])
def test_another_batch_trains_the_rows_that_are_left_each_as_often(micro_batch_size):
    plan = begun()
    later = gone_on(plan, 5, micro_batch_size=micro_batch_size)
    found = rows_trained(plan, 0, 5) + rows_trained(later, 5, later.steps)
    whole = rows_trained(plan, 0, plan.steps)
    assert found[: len(whole)] == whole
    assert len(found) - len(whole) < later.global_batch
    assert later.epoch(5) == plan.epoch(5)


@pytest.mark.parametrize(
    ("micro_batch_size", "other"), [(1, lambda s: 5 + 2 * (s - 5)), (4, lambda s: 5 + (s - 5) / 2)]
)
def test_the_learning_rate_follows_rows(micro_batch_size, other):
    plan = begun()
    later = gone_on(plan, 5, micro_batch_size=micro_batch_size)
    steps = [step for step in range(6, 13) if float(other(step)).is_integer() and other(step) <= later.steps]
    assert len(steps) > 2
    for step in steps:
        assert later.learning_rate(int(other(step))) == pytest.approx(plan.learning_rate(step), rel=1e-12)
    assert all(0 < later.learning_rate(step) <= plan.peak for step in range(6, later.steps + 1))


def test_a_change_within_the_warmup_goes_on_rising():
    plan = begun()
    later = gone_on(plan, 1, micro_batch_size=1)
    rates = [later.learning_rate(step) for step in range(2, 9)]
    assert (
        plan.warmup_steps == 3
        and rates[:6] == sorted(rates[:6])
        and rates[5] == pytest.approx(plan.learning_rate(3.5 + 0.5))
    )


def test_a_batch_that_was_changed_and_changed_back_keeps_rows_and_rates():
    plan = begun()
    between = gone_on(plan, 4, micro_batch_size=1)  # 4 rows a step
    back = gone_on(between, 6, micro_batch_size=2)  # 8 rows: as after step 5
    assert (back.global_batch, back.rows_after(6), back.steps) == (8, plan.rows_after(5), 13)
    assert [back.learning_rate(step + 1) for step in range(6, 13)] == [
        plan.learning_rate(step) for step in range(6, 13)
    ]


def test_a_marker_of_an_earlier_version_is_of_steps_of_one_size():
    batch = {"micro_batch_size": 2, "gradient_accumulation_steps": 3, "sequence_parallel_size": 2}
    position = schedule.Position.of({"step": 5, "steps": 9, "world_size": 8}, batch)
    assert (position.rows, position.global_batch, position.planned_steps) == (120, 24, 9)


def test_a_complete_run_stays_complete_on_any_ranks():
    plan = begun()
    assert gone_on(plan, 12, micro_batch_size=5).steps == 12
