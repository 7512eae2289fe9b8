"""Promises about settings, run ids, checkpoints and the other files of a run folder."""

import json
import re
import threading

import pytest
from training_helpers import SETTINGS, receipt, replaced, settings, write_checkpoint, write_settings

from deepseek_sft.errors import BadInputError, GateError, StoppedError
from deepseek_sft.training import checkpoints, run_folder
from deepseek_sft.training import settings as training_settings
from deepseek_sft.training.run_folder import Status

BASE, TOKENS = receipt("prepare_model"), receipt("tokenize_data")


def run_id(**changes):
    return training_settings.run_id(settings(**changes), BASE, TOKENS)


@pytest.mark.parametrize("key", sorted(SETTINGS.keys() - training_settings.SAME_RUN))
def test_every_shaping_setting_makes_another_run(key):
    value = getattr(settings(), key)
    other = value + "x" if isinstance(value, str) else [0.5, 0.5] if isinstance(value, tuple) else (value or 0) + 1
    changed = settings()
    object.__setattr__(changed, key, other)  # whether it is allowed or not
    assert training_settings.run_id(changed, BASE, TOKENS) != run_id()


def test_operational_settings_keep_the_run():
    others = {
        "save_every_steps": 7,
        "save_every_minutes": 5.0,
        "keep_checkpoints": 9,
        "log_every_steps": 3,
        "first_loss_max": 4.0,
        "keep_layer_gathered": True,
        "on_not_finite": "skip",
        "spike_factor": 3.0,
        "on_spike": "stop",
        "hang_minutes": {"start": 1, "step": 1, "save": 1},
        "gpu_tflops": 989,
        "max_hours": 2.0,
        "slow_rank_percent": 25.0,
        "check_base": "never",
        "recompute": "without_attention",
        "exchange_rows": 1000,
        "on_new_topology": "continue",
        "validation": {"every_steps": 10, "early_stop": {"patience": 2}},
        "async_save": "off",
        "checkpoints": [{"path": "/local", "every_minutes": 5}, {"every_minutes": 60}],
    }
    assert others.keys() == training_settings.SAME_RUN
    assert run_id(**others) == run_id()


def test_other_inputs_make_another_run_but_not_their_paths_or_timings():
    moved = receipt("prepare_model", inputs={"a": {"path": "elsewhere", "fingerprint": "f"}}, figures={"seconds": 3})
    changed = receipt("prepare_model", inputs={"a": {"path": "x", "fingerprint": "g"}})
    ids = [training_settings.run_id(settings(), base, TOKENS) for base in (BASE, moved, changed)]
    assert ids[0] == ids[1] != ids[2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 0}, "learning_rate: 0 is not allowed, expected a number above 0. Peak learning rate"),
        ({"micro_batch_size": 0}, "micro_batch_size: 0 is not allowed, expected an integer of at least 1"),
        ({"max_steps": 0}, "max_steps: 0 is not allowed, expected an integer of at least 1 or null"),
        ({"adam_betas": [0.9]}, "adam_betas: [0.9] is not allowed, expected a list: 2 values, each a number"),
        ({"warmup_ratio": 2}, "warmup_ratio: 2 is not allowed, expected a number of at least 0 and at most 1"),
        ({"min_learning_rate": 1}, "min_learning_rate: is above learning_rate"),
        ({"hang_minutes": {"step": 3}}, "missing settings: hang_minutes.start, hang_minutes.save"),
        ({"spike_factor": 0}, "spike_factor: 0 is not allowed, expected a number above 1 or null"),
        ({"on_spike": "pray"}, "expected one of warn, skip, stop"),
        ({"attention": "xformers"}, "expected one of auto, sdpa, flash"),
        ({"learning_rat": 1}, "learning_rat: unknown key; did you mean `learning_rate`?"),
    ],
)
def test_wrong_settings_are_named(tmp_path, change, message):
    with pytest.raises(BadInputError, match=re.escape(message)):
        training_settings.read(write_settings(tmp_path / "settings.json", **change))


def test_a_missing_setting_is_named(tmp_path):
    path = tmp_path / "settings.json"
    path.write_text(json.dumps({key: value for key, value in SETTINGS.items() if key != "seed"}))
    with pytest.raises(BadInputError, match="missing settings: seed"):
        training_settings.read(path)


def test_settings_read_back_as_written(tmp_path):
    assert training_settings.read(write_settings(tmp_path / "s.json", seed=3)) == replaced(settings(), seed=3)


def test_only_a_committed_checkpoint_counts(tmp_path):
    write_checkpoint(tmp_path, 10)
    write_checkpoint(tmp_path, 20, commit=False)
    assert checkpoints.newest(tmp_path, "abc").step == 10


def test_the_newest_step_wins_by_number_not_by_name(tmp_path):
    write_checkpoint(tmp_path, 9)
    write_checkpoint(tmp_path, 10)
    assert checkpoints.newest(tmp_path, "abc").step == 10


def test_a_checkpoint_of_another_run_does_not_count(tmp_path):
    write_checkpoint(tmp_path, 10, run_id="other")
    assert checkpoints.newest(tmp_path, "abc") is None


@pytest.mark.parametrize("damage", ["truncate", "remove", "marker", "torn marker"])
def test_a_damaged_checkpoint_does_not_count_and_is_set_aside(tmp_path, damage):
    write_checkpoint(tmp_path, 10)
    folder = write_checkpoint(tmp_path, 20)
    file = folder / "zero_pp_rank_1_mp_rank_00_model_states.pt"
    marker = folder / checkpoints.MARKER
    if damage == "truncate":
        file.write_bytes(b"mod")
    elif damage == "remove":
        file.unlink()
    elif damage == "marker":
        marker.unlink()
    else:
        marker.write_text(marker.read_text()[:40])
    assert checkpoints.newest(tmp_path, "abc").step == 10
    assert [path.name for path in checkpoints.set_aside(tmp_path, "abc")] == ["step_20.incomplete"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_10", "step_20.incomplete"]


def test_a_renamed_checkpoint_does_not_count(tmp_path):
    write_checkpoint(tmp_path, 10).rename(tmp_path / "step_99")
    assert checkpoints.newest(tmp_path, "abc") is None


def test_a_checkpoint_without_all_ranks_cannot_be_committed(tmp_path):
    folder = write_checkpoint(tmp_path, 10, world_size=2, commit=False)
    with pytest.raises(RuntimeError, match="not complete: 2 of 4 ranks"):
        checkpoints.commit(folder, {"run_id": "abc", "step": 10, "world_size": 4}, checkpoints.sizes(folder))
    assert not (folder / checkpoints.MARKER).exists()


def test_a_checkpoint_whose_files_are_not_as_their_ranks_wrote_them_cannot_be_committed(tmp_path):
    folder = write_checkpoint(tmp_path, 10, commit=False)
    written = checkpoints.files_of_rank(folder, 0) | checkpoints.files_of_rank(folder, 1)
    (folder / "zero_pp_rank_1_mp_rank_00_model_states.pt").write_bytes(b"mod")
    marker = {"run_id": "abc", "step": 10, "world_size": 2}
    with pytest.raises(RuntimeError, match=r"rank_1.*3 bytes here, 5 written"):
        checkpoints.commit(folder, marker, written, patience=0)
    assert not (folder / checkpoints.MARKER).exists()


def test_a_file_that_shows_up_late_on_a_network_file_system_is_waited_for(tmp_path):
    folder = write_checkpoint(tmp_path, 10, commit=False)
    written = checkpoints.sizes(folder)
    file = folder / "zero_pp_rank_1_mp_rank_00_model_states.pt"
    file.rename(tmp_path / "late")
    threading.Timer(0.3, (tmp_path / "late").rename, [file]).start()
    marker = {"run_id": "abc", "step": 10, "world_size": 2}
    assert checkpoints.commit(folder, marker, written, patience=20).step == 10


def test_what_was_set_aside_gives_way_only_when_the_next_checkpoint_needs_the_space(tmp_path):
    aside = tmp_path / "step_12.incomplete"
    aside.mkdir()
    checkpoints.make_room(tmp_path, expected=0)
    assert aside.exists()
    checkpoints.make_room(tmp_path, expected=1 << 62)
    assert not aside.exists()


def test_pruning_keeps_the_newest_and_removes_what_was_set_aside(tmp_path):
    for step in (5, 10, 15):
        write_checkpoint(tmp_path, step)
    (tmp_path / "step_12.incomplete").mkdir()
    checkpoints.prune(tmp_path, "abc", keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_10", "step_15"]


@pytest.mark.parametrize("name", [run_folder.METRICS, run_folder.EXPERT_LOAD])
def test_metrics_after_the_resumed_step_and_torn_lines_are_dropped(tmp_path, name):
    lines = [json.dumps({"step": step}) for step in range(1, 8)]
    (tmp_path / name).write_text("\n".join(lines) + '\n{"step": 8, "lo')
    run_folder.cut_metrics(tmp_path, 5)
    kept = (tmp_path / name).read_text().splitlines()
    assert [json.loads(line)["step"] for line in kept] == [1, 2, 3, 4, 5]


def test_a_first_loss_gate_stands_until_its_limit_is_raised(tmp_path):
    run_folder.write_gate(tmp_path, "first_loss", "too high", 5.0)
    with pytest.raises(GateError, match="too high"):
        run_folder.check_gate(tmp_path, settings(first_loss_max=4.0))
    run_folder.check_gate(tmp_path, settings(first_loss_max=6.0))
    run_folder.check_gate(tmp_path, settings(first_loss_max=4.0))  # forgotten: this start measures anew


@pytest.mark.parametrize(
    ("kind", "opened"),
    [("not_finite", {"on_not_finite": "skip"}), ("spike", {"spike_factor": 9.0, "on_spike": "warn"})],
)
def test_a_bad_step_stops_every_later_start_until_the_policy_changes(tmp_path, kind, opened):
    closed = settings(spike_factor=9.0, on_spike="stop")
    run_folder.write_gate(tmp_path, kind, "the loss of step 3 is nan", None)
    with pytest.raises(GateError, match="step 3"):
        run_folder.check_gate(tmp_path, closed)
    run_folder.check_gate(tmp_path, settings(**opened))
    run_folder.check_gate(tmp_path, closed)  # forgotten: trained anew


def test_the_status_of_an_earlier_start_is_not_taken_for_this_one(tmp_path):
    run_folder.write_status(tmp_path, Status("first", "finished"))
    assert run_folder.read_status(tmp_path, "second", patience=0) is None
    assert run_folder.read_status(tmp_path, "first", patience=0).error() is None


def test_a_stopped_start_is_the_error_with_exit_code_4():
    error = Status("a", "stopped", "stopped after step 3").error()
    assert isinstance(error, StoppedError)
    assert error.exit_code == 4
