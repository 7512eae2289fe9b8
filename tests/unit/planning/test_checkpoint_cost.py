"""Promises of what a checkpoint is planned to cost."""

import dataclasses

import planning_models as models
import planning_plans as plans
import pytest

from deepseek_sft.planning import checkpoint_cost, duration

OFF = dataclasses.replace(plans.training(4, "zero3_offload", 2), stock_experts=False, async_save="off")
AUTO = dataclasses.replace(OFF, async_save=None)


def test_a_checkpoint_for_which_training_stops_costs_what_it_takes_to_write():
    assert checkpoint_cost.stops(OFF, 400, (500, 900)) == (400, 400)


def test_beside_a_step_it_costs_what_is_left_to_write_before_the_update_and_no_less_than_a_tenth():
    assert checkpoint_cost.stops(AUTO, 400, (100, 390)) == (300, 40)
    assert checkpoint_cost.stops(AUTO, 400, (500, 900)) == (40, 40)


def test_stock_xtuner_is_planned_to_stop_for_it():
    assert not dataclasses.replace(AUTO, stock_experts=True).saves_beside_steps


def test_one_checkpoint_is_written_at_a_time():
    assert checkpoint_cost.cadence(1, 1e4, writing=400) == 400
    assert checkpoint_cost.cadence(400, 1e6, writing=400) == checkpoint_cost.young_daly(400, 1e6) > 400


def test_all_checkpoints_of_a_planned_run_but_the_last_cost_their_stop_and_limits_stay():
    off, auto = (
        plans.make(models.DEEPSEEK_V3, dataclasses.replace(one, save_every_steps=7), plans.cluster(32)).duration
        for one in (OFF, AUTO)
    )
    others = -(-off.steps // 7) - 1
    saved = [getattr(off.run, end) - getattr(auto.run, end) for end in ("fastest", "slowest")]
    assert saved == pytest.approx([others * (off.checkpoint_s - stop) for stop in auto.stop_s])
    assert auto.stop_s < off.stop_s and others > 3
    assert duration.planned(auto) == duration.planned(off)
