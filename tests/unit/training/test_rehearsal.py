"""Each gate of a rehearsal fails on its fault and is silent on a healthy run; a checkpoint that is held stays."""

import copy
import os
import types

import pytest
from training_helpers import settings as make_settings
from training_helpers import write_checkpoint

from deepseek_sft.errors import BadInputError
from deepseek_sft.planning import duration, rehearsed
from deepseek_sft.training import checkpoints, rehearsal, snapshot
from deepseek_sft.training import settings as training_settings

GIB = 1 << 30
PLAN = {
    "step_fastest_s": 200.0,
    "step_slowest_s": 700.0,
    "checkpoint_s": 800.0,
    "rank_memory_bytes": 60 * GIB,
    "limits": {"GPU memory per rank": {"have_bytes": 79 * GIB}},
}
RESOURCES = {"mem_mb": 1_900_000, "signal_lead_s": 3600}
OPTIONS = {"accelerator": "cuda", "loss_tolerance": 1e-4, "cost_per_gpu_hour": 2.0}
SETTINGS = {"save_every_steps": 100, "save_every_minutes": None, "max_hours": None}
EXACT = "a resumed run goes on as an unbroken one"


def line(step, **changes):
    values = {"loss": 2 - step / 10, "grad_norm": 1.0, "learning_rate": 1e-6, "tokens": 100, "trained_tokens": 50}
    values |= {"seconds": 600.0, "seconds_save": 0.0, "memory_gib": 61.0, "host_memory_gib": 70.0}
    return {"step": step} | values | changes


def record(steps, **changes):
    metrics = [line(step, seconds_save=700.0 if step == 4 else 0.0) for step in steps]
    return {
        "metrics": metrics,
        "ranks": 256,
        "ranks_per_node": 8,
        "planned_steps": 400,
        "start_seconds": 500.0,
        "checkpoint_bytes": 8e12,
        "limits": {"start": 3600, "step": 1800, "save": 3600},
        "run_id": "abc",
    } | changes


def judged(change=lambda unbroken, resumed: None, **options):
    unbroken, resumed = record(range(1, 6)), record((4, 5))
    change(unbroken, resumed)
    options = {"plan": PLAN, "settings": SETTINGS, "resources": RESOURCES, "options": OPTIONS} | options
    return rehearsed.judge(unbroken, resumed, **copy.deepcopy(options))


def failing(verdict):
    return [check.name for check in verdict.failed]


def test_a_healthy_rehearsal_is_ready_and_projects_end_and_cost():
    verdict = judged()
    assert failing(verdict) == [] and not verdict.figures["skipped"]
    seconds = 500 + 400 * 600 + 4 * 700
    assert verdict.figures["run_seconds"] == seconds
    assert verdict.figures["cost"] == round(2 * 256 * seconds / 3600)
    assert rehearsed.page(verdict, ["n1", "n2"], "soon").endswith("verdict: ready\n")


def test_saves_by_minutes_and_an_end_by_hours_are_projected():
    settings = {"save_every_steps": 100, "save_every_minutes": 100, "max_hours": 10}
    assert judged(settings=settings).figures["run_seconds"] == 500 + 36_000 + 6 * 700


def resumed_loss(factor):
    def change(unbroken, resumed):
        resumed["metrics"][1]["loss"] *= factor

    return change


def set_in(part, step, **values):
    def change(unbroken, resumed):
        lines = (unbroken if part == "unbroken" else resumed)["metrics"]
        next(one for one in lines if one["step"] == step).update(values)

    return change


def set_of(**values):
    def change(unbroken, resumed):
        unbroken.update(values)

    return change


FAULTS = {
    "loss": (resumed_loss(1.001), EXACT),
    "norm": (set_in("resumed", 4, grad_norm=1.002), EXACT),
    "not finite": (set_in("resumed", 5, loss=None), EXACT),
    "other rows": (set_in("resumed", 4, trained_tokens=51), EXACT),
    "other rate": (set_in("resumed", 4, learning_rate=2e-6), EXACT),
    "short step limit": (set_of(limits={"start": 3600, "step": 900, "save": 3600}), "a step is no hang"),
    "short save limit": (set_of(limits={"start": 3600, "step": 1800, "save": 1200}), "a save is no hang"),
    "slow start": (set_of(start_seconds=2000.0), "a start is no hang"),
    "GPU memory": (set_in("unbroken", 2, memory_gib=79.5), "memory of a GPU"),
    "host memory": (set_in("resumed", 5, host_memory_gib=250.0), "memory of a node"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_gate_fails_on_its_fault_alone(fault):
    change, name = FAULTS[fault]
    verdict = judged(change)
    assert failing(verdict) == [name]
    assert rehearsed.page(verdict, ["n1"], "soon").endswith(f"verdict: not ready: {name}\n")


def test_a_step_above_the_plan_and_a_late_signal_are_named():
    assert failing(judged(plan=PLAN | {"step_slowest_s": 500.0})) == ["step as planned"]
    assert failing(judged(plan=PLAN | {"checkpoint_s": 300.0})) == ["save as planned"]
    late = judged(resources=RESOURCES | {"signal_lead_s": 1200})
    assert failing(late) == ["the time limit's signal comes early enough"]
    assert "--signal=USR1@1625" in late.failed[0].detail


def test_a_cpu_allows_no_difference_and_a_gpu_a_small_one():
    change = resumed_loss(1 + 1e-6)
    assert failing(judged(change)) == []
    assert failing(judged(change, options=OPTIONS | {"accelerator": "cpu"})) == [EXACT]


def test_what_cannot_be_judged_is_not_passed():
    verdict = judged(plan={}, resources={}, options=OPTIONS | {"cost_per_gpu_hour": None})
    assert failing(verdict) == [] and verdict.figures["cost"] is None
    assert len(verdict.figures["skipped"]) == 5 and EXACT in verdict.figures["checks"]


def test_a_time_limit_that_is_too_short_is_said_with_the_one_to_write():
    step = duration.Range("one step", 100.0, 600.0, "")
    found = types.SimpleNamespace(step=step, loading_s=60.0, checkpoint_s=400.0)
    assert rehearsed.too_long(found, 90) == ""
    assert "runtime: 90" in rehearsed.too_long(found, 60)
    assert rehearsed.too_long(types.SimpleNamespace(step=None), 1) == ""


def test_a_rehearsal_is_another_run_of_the_same_steps():
    chosen = make_settings(max_hours=3.0, save_every_minutes=5.0)
    other = rehearsal.settings_of(chosen)
    inputs = {"rule": "made", "inputs": {}, "settings": {}, "figures": {}}
    assert training_settings.run_id(other, inputs, inputs) != training_settings.run_id(chosen, inputs, inputs)
    shaping, changed = chosen.shaping(), other.shaping()
    assert {key for key in shaping if shaping[key] != changed[key]} == {"run_name"}


def test_checkpoints_of_earlier_rehearsals_go_and_their_records_stay(tmp_path):
    folder = write_checkpoint(tmp_path / "7-0/runs/abc", 3)
    (tmp_path / "7-0/unbroken.json").write_text("{}")
    assert rehearsal.remove_checkpoints(tmp_path) == [folder]
    assert (tmp_path / "7-0/unbroken.json").exists() and not folder.exists()


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "train/runs/abc"
    for step in (100, 200, 300):
        write_checkpoint(folder, step)
    (folder / "settings.json").write_text("{}")
    return folder


def test_a_held_checkpoint_outlives_its_removal_and_is_given_up_afterwards(run, tmp_path):
    before = {path: path.read_bytes() for path in (run / "step_300").iterdir()}
    taken = snapshot.hold(tmp_path, "step_100")
    checkpoints.prune(run, "abc", 1)
    assert not (run / "step_100").exists()
    assert isinstance(checkpoints.judge(taken.held, "abc"), checkpoints.Checkpoint)
    taken.release()
    assert not taken.held.exists()
    assert {path: path.read_bytes() for path in (run / "step_300").iterdir()} == before


def test_the_newest_is_that_of_the_run_which_was_started_last(run, tmp_path):
    other = tmp_path / "train/runs/def"
    write_checkpoint(other, 50, run_id="def")
    (other / "settings.json").write_text("{}")
    os.utime(run / "settings.json", (1, 1))
    assert snapshot.find(tmp_path, "newest")[1].step == 50
    assert snapshot.find(tmp_path, "step_200")[0] == run


def test_a_checkpoint_that_is_not_there_is_told_with_those_that_are(run, tmp_path):
    with pytest.raises(BadInputError, match="step_150") as caught:
        snapshot.find(tmp_path, "step_150")
    assert "step_100, step_200, step_300" in caught.value.fix


def test_a_checkpoint_removed_while_it_is_taken_is_told(run, tmp_path, monkeypatch):
    found = snapshot.find(tmp_path, "step_100")
    monkeypatch.setattr(snapshot, "find", lambda *_: found)
    checkpoints.prune(run, "abc", 1)
    with pytest.raises(BadInputError, match=r"removed .*step_100 meanwhile"):
        snapshot.hold(tmp_path, "step_100")
    assert not list((tmp_path / "snapshots").glob("*/step_100"))


def test_without_links_the_checkpoint_itself_is_read_and_stays(run, tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(snapshot.os, "link", refuse)
    taken = snapshot.hold(tmp_path, "step_200")
    taken.release()
    assert taken.held == run / "step_200" and (taken.held / "committed.json").exists()
    assert "may remove it meanwhile" in capsys.readouterr().err
