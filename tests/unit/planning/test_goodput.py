"""Promises of the simulated share of GPU hours that train."""

import dataclasses
import math

import pytest

from deepseek_sft.planning import goodput
from deepseek_sft.planning.checkpoint_cost import young_daly

TIMES = goodput.Times(step=60, save=300, cadence=3600, start=600, noticed=30, again=120)
DAY = 86400


def test_the_rate_is_that_of_llama_3():
    assert 54 * DAY / goodput.mean_time_between_failures(16384) == pytest.approx(419)
    assert goodput.mean_time_between_failures(256) / 3600 == pytest.approx(198, abs=1)


def test_without_failures_only_saves_and_one_start_cost():
    found = goodput.simulate(TIMES, 1e15, 100 * 3600, 0)
    assert found.trained == pytest.approx(360000 / (360000 + 100 * 300 + 600))
    assert (found.lost, found.waiting) == (0, 0)


def test_shares_add_up_to_all_the_time():
    for limit in (None, 4 * 3600):
        found = goodput.expected(dataclasses.replace(TIMES, limit=limit), 5 * 3600, 5 * DAY, runs=3)
        assert sum(dataclasses.astuple(found)) == pytest.approx(1)
        assert min(dataclasses.astuple(found)) > 0
        assert found.of_gpu_hours > found.trained


def test_with_failures_the_share_is_that_of_a_poisson_process():
    """A round of training and saving that failures begin anew: M (e^(round / M) - 1) on average, and a start each."""
    times, between = goodput.Times(60, 300, 3600, 1e-6, 0, 0), 4 * 3600
    found = goodput.expected(times, between, 60 * DAY, runs=8)
    round_ = times.cadence + times.save
    assert found.trained == pytest.approx(times.cadence / (between * math.expm1(round_ / between)), rel=0.01)


def test_the_best_cadence_is_dalys():
    between = 8 * 3600
    best = young_daly(TIMES.save, between)
    shares = {
        factor: goodput.expected(
            dataclasses.replace(TIMES, step=10, cadence=factor * best), between, 30 * DAY, runs=10
        ).of_gpu_hours
        for factor in (0.25, 1.0, 4.0)
    }
    assert max(shares, key=shares.get) == 1.0


def test_a_job_saves_before_its_limit_and_is_begun_again():
    """Four hours hold a start, three rounds and half a one: no step of it is lost."""
    found = goodput.simulate(dataclasses.replace(TIMES, limit=4 * 3600), 1e15, 40 * 3600, 0)
    assert found.lost < 0.01 and found.starting == pytest.approx(found.waiting * 600 / 120, rel=0.15)


def test_a_checkpoint_that_was_not_committed_when_a_failure_came_is_lost():
    beside = dataclasses.replace(TIMES, save=0, writing=1800)  # a round of 3600 s is committed half a round later
    for fails, kept in ((3600 + 1799, 0), (3600 + 1801, 60), (7200 + 1799, 60), (7200 + 1801, 120)):
        assert goodput._job(beside, fails, 1000, 60)[0] == kept


def test_a_limit_that_leaves_no_time_for_a_step_is_refused():
    with pytest.raises(ValueError, match="no time for a start, a step and a save"):
        goodput.simulate(dataclasses.replace(TIMES, limit=900), 1e9, DAY, 0)
