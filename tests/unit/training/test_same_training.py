"""Promises of which run a start goes on with, and of when it is refused to."""

import dataclasses
import json

import pytest
from training_helpers import receipt, settings, write_checkpoint

from deepseek_sft.errors import BadInputError
from deepseek_sft.training import checkpoints, same_training, schedule
from deepseek_sft.training import settings as training_settings

INPUTS = same_training.Inputs(receipt("prepare_model"), receipt("tokenize_data"), rows=100, samples=400)
OTHER = {
    "strategy": "zero3_offload",
    "sequence_parallel_size": 2,
    "micro_batch_size": 4,
    "experts_per_shard": 8,
    "deal_rows": "order",
}


def begin(runs, step=6, steps=9, told=True, world_size=4, **changes):
    """A run that was begun with these settings and has come to ``step``; its id."""
    chosen = settings(**changes)
    run_id = training_settings.run_id(chosen, INPUTS.base, INPUTS.tokens)
    settled = schedule.with_accumulation(chosen, INPUTS.rows, INPUTS.samples)
    plan = dataclasses.replace(schedule.plan(settled, 100, world_size), steps=steps)
    folder = write_checkpoint(runs / run_id, step, run_id, world_size)
    checkpoints.amend(folder, {"steps": steps} | ({"schedule": plan.told_after(step)} if told else {}))
    kept = dataclasses.asdict(
        dataclasses.replace(settled, deal_rows="cost", zero_thresholds="shard", gradient_communication_dtype="float32")
    )
    record = {"run_id": run_id, "settings": kept}
    if told:
        batch = {key: kept[key] for key in schedule.BATCH}
        record |= {"trains": same_training.trains(chosen, INPUTS), "begun": batch}
    (runs / run_id / "settings.json").write_text(json.dumps(record))
    return run_id


def find(runs, world_size=4, **changes):
    return same_training.find(runs, settings(**changes), INPUTS, world_size)


@pytest.mark.parametrize("told", [True, False], ids=["of this version", "of an earlier version"])
@pytest.mark.parametrize("accumulate_by", ["rows", "samples"])
def test_a_run_is_found_under_other_keys_of_topology(tmp_path, told, accumulate_by):
    changes = {"accumulate_by": accumulate_by, "gradient_accumulation_steps": 13}
    run_id = begin(tmp_path, told=told, **changes)
    found = find(tmp_path, **OTHER)
    assert found.run_id == run_id != found.own_id and found.newest.step == 6
    accumulated = 13 if accumulate_by == "rows" else 3
    assert found.begun == {
        "micro_batch_size": 2,
        "gradient_accumulation_steps": accumulated,
        "sequence_parallel_size": 1,
    }


@pytest.mark.parametrize("change", [{"learning_rate": 2e-3}, {"seed": 1}, {"run_name": "anew"}, {"max_steps": 5}])
def test_a_run_that_trains_something_else_is_not_gone_on_with(tmp_path, change):
    begin(tmp_path)
    found = find(tmp_path, **OTHER | change)
    assert found.run_id == found.own_id and found.newest is None


def test_a_run_of_other_inputs_is_not_gone_on_with(tmp_path):
    begin(tmp_path, told=False)
    moved = dataclasses.replace(INPUTS, tokens=receipt("tokenize_data", settings={"s": 2}))
    assert same_training.find(tmp_path, settings(**OTHER), moved, 4).newest is None


def test_the_own_run_comes_first_and_then_the_one_that_has_come_furthest(tmp_path):
    begin(tmp_path, step=8)
    further = begin(tmp_path, step=8, micro_batch_size=3)
    assert find(tmp_path, **OTHER).run_id == further
    own = begin(tmp_path, step=2, **OTHER)
    assert find(tmp_path, **OTHER).run_id == own


def test_a_start_without_a_checkpoint_goes_on_with_the_run_that_has_one(tmp_path):
    run_id = begin(tmp_path)
    own = find(tmp_path, **OTHER).own_id
    (tmp_path / own).mkdir()
    (tmp_path / own / "settings.json").write_text(json.dumps({"trains": "x", "begun": {}}))
    assert find(tmp_path, **OTHER).run_id == run_id


@pytest.mark.parametrize("torn", ["", "{", "[]", '{"settings": {}}', '{"trains": 3, "begun": 4, "settings": 5}'])
def test_a_folder_whose_settings_are_torn_is_no_run_of_this_training(tmp_path, torn):
    run_id = begin(tmp_path)
    (tmp_path / run_id / "settings.json").write_text(torn)
    assert find(tmp_path, **OTHER).newest is None


def test_a_complete_run_is_what_its_batch_trains_and_no_other(tmp_path):
    run_id = begin(tmp_path, step=9, steps=9)
    assert find(tmp_path, sequence_parallel_size=2, micro_batch_size=4).run_id == run_id, "also steps of 8 rows"
    assert find(tmp_path, micro_batch_size=4).newest is None, "another experiment"


def go_on(newest, begun, world_size=4, **changes):
    chosen = settings(max_steps=9, **changes)
    fresh = schedule.plan(chosen, 100, world_size)
    return same_training.schedule_from(fresh, chosen, newest, begun)


def test_another_batch_is_refused_with_the_schedule_that_it_would_have(tmp_path):
    begin(tmp_path)
    found = find(tmp_path)
    with pytest.raises(BadInputError, match="steps of 8 rows, this start would go on with 4") as refused:
        go_on(found.newest, found.begun, world_size=2)
    assert "12 steps in all" in refused.value.problem and "on_new_topology: continue" in refused.value.fix
    plan = go_on(found.newest, found.begun, world_size=2, on_new_topology="continue")
    assert (plan.steps, plan.rows_after(6)) == (12, 48)


def test_the_same_batch_goes_on_whatever_the_ranks(tmp_path):
    begin(tmp_path, told=False)
    found = find(tmp_path)
    assert go_on(found.newest, found.begun, world_size=2, micro_batch_size=4).steps == 9
    assert go_on(found.newest, found.begun, world_size=8, sequence_parallel_size=2).steps == 9


def test_a_marker_whose_schedule_was_edited_does_not_count(tmp_path):
    run_id = begin(tmp_path)
    checkpoints.amend(tmp_path / run_id / "step_6", {"schedule": {"rows_done": "many"}})
    assert isinstance(checkpoints.judge(tmp_path / run_id / "step_6", run_id), checkpoints.NotCommitted)
