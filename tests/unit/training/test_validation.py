"""Promises of the validation loss: what ends a run, which checkpoint is its result, what is refused, what it takes."""

import dataclasses
import json

import pytest
import yaml
from planning_plans import cluster, training
from training_helpers import settings, write_checkpoint

from deepseek_sft import config as configuration
from deepseek_sft import receipts
from deepseek_sft.errors import BadInputError
from deepseek_sft.experiment import Experiment
from deepseek_sft.planning import validation_time
from deepseek_sft.planning.disk import disk
from deepseek_sft.planning.settings import Samples
from deepseek_sft.planning.settings import Validation as Planned
from deepseek_sft.report import plots, status, validation_rows
from deepseek_sft.settings.train import EarlyStop, Validation
from deepseek_sft.training import checkpoints, gpu_hours, rehearsal, retention, run_folder, stage, validation

FALLING = [[10, 3.0], [20, 2.0], [30, 2.5], [40, 2.4]]
STOPS = Validation(every_steps=10, early_stop=EarlyStop(patience=2))


def resolved(project, **changes):
    config = yaml.safe_load((project / "config/config.yaml").read_text())
    mine = {"experiment": "mine", "data": {"sources": ["chats.jsonl"]}, "model": {"base": "/models/R1"}}
    return Experiment.from_config(configuration.merge(configuration.merge(config, mine), changes))


def saved(run, step, measured, steps=100):
    """A committed checkpoint that keeps what was measured up to it."""
    folder = write_checkpoint(run, step)
    file = folder / "committed.json"
    marker = json.loads(file.read_text())
    progress = {validation.KEY: [one for one in measured if one[0] <= step], "validation_seconds": 6.0}
    file.write_text(json.dumps(marker | {"steps": steps, "progress": progress}))
    return folder


@pytest.mark.parametrize(
    ("losses", "min_delta", "count"),
    [
        ([], 0.0, 0),
        ([3.0, 2.0], 0.0, 0),
        ([3.0, 2.0, 2.0], 0.0, 1),
        ([3.0, 2.0, 2.5, 1.9], 0.0, 0),
        ([3.0, 2.95, 2.92, 2.85], 0.1, 0),  # together they fell
        ([3.0, 2.95, 2.92], 0.1, 2),
        ([3.0, None, None], 0.0, 2),
    ],
)
def test_measurements_count_until_the_loss_is_lower_than_all_before(losses, min_delta, count):
    measured = [[10 * number, loss] for number, loss in enumerate(losses, 1)]
    assert validation.without_a_lower_loss(measured, min_delta) == count


def test_a_run_ends_after_as_many_measurements_as_its_patience():
    ends = [validation.has_ended(FALLING[:count], EarlyStop(patience=2)) for count in range(5)]
    assert ends == [False, False, False, False, True]
    assert not validation.has_ended(FALLING, None)


def test_the_result_is_the_committed_checkpoint_of_the_lowest_loss(tmp_path):
    for step in (20, 30, 40):
        saved(tmp_path, step, FALLING)
    found = checkpoints.committed(tmp_path, "abc")
    assert validation.result(found, STOPS).step == 20
    assert validation.result(found[1:], STOPS).step == 40, "the lowest was not saved"
    assert validation.result(found, None).step == 40
    assert validation.result(found, Validation(every_steps=10)).step == 40, "measured, without a rule"


def test_a_checkpoint_between_two_measurements_is_not_the_result(tmp_path):
    for step in (15, 20, 40):
        saved(tmp_path, step, FALLING)
    assert validation.result(checkpoints.committed(tmp_path, "abc")[:1], STOPS).step == 15, "the only one"
    assert validation.result(checkpoints.committed(tmp_path, "abc"), STOPS).step == 20


def test_the_best_checkpoint_is_kept_beside_the_newest(tmp_path):
    for step in (10, 20, 30, 40):
        saved(tmp_path, step, FALLING)
    best = validation.result(checkpoints.committed(tmp_path, "abc"), STOPS)
    checkpoints.prune(tmp_path, "abc", 1, best)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_20", "step_40"]


def test_a_larger_patience_goes_on_with_a_run_that_has_ended(tmp_path):
    saved(tmp_path, 40, FALLING)
    newest = checkpoints.newest(tmp_path, "abc")
    schedule = stage.schedule.plan(settings(max_steps=100), 1000, 2)
    ends = []
    for patience in (2, 3):
        chosen = settings(validation={"every_steps": 10, "early_stop": {"patience": patience}})
        run = stage.Run("abc", tmp_path, tmp_path, tmp_path, tmp_path, chosen, schedule, {})
        ends.append(run.ends_with(newest))
    assert ends == [True, False]


def test_the_receipt_names_what_is_converted_and_why(tmp_path):
    for step in (20, 40):
        saved(tmp_path, step, FALLING)
    found = checkpoints.committed(tmp_path, "abc")
    told = validation.figures(found[-1], found[0], STOPS)
    assert told == {
        "validation_loss": 2.4,
        "validation_first_loss": 3.0,
        "validation_first_step": 10,
        "validation_lowest_loss": 2.0,
        "validation_lowest_step": 20,
        "validation_seconds": 6.0,
        "ended_early": True,
        "converted_step": 20,
        "converted_validation_loss": 2.0,
    }
    assert validation.figures(found[-1], found[-1], None)["validation_loss"] == 2.4


BASE_IS_BEST = [[0, 1.5], *FALLING]


def test_the_bases_loss_is_told_first_and_judged_by_no_rule(tmp_path):
    counts = [validation.without_a_lower_loss(BASE_IS_BEST[:count], 0.0) for count in range(6)]
    assert counts == [0, 0, 0, 0, 1, 2]
    saved(tmp_path, 20, BASE_IS_BEST)
    saved(tmp_path, 40, BASE_IS_BEST)
    found = checkpoints.committed(tmp_path, "abc")
    assert validation.result(found, STOPS).step == 20, "there is no checkpoint of the base"
    told = validation.figures(found[-1], found[0], STOPS)
    assert (told["validation_first_loss"], told["validation_first_step"]) == (1.5, 0)
    assert (told["validation_lowest_loss"], told["validation_lowest_step"]) == (2.0, 20)
    assert validation.best([[0, 1.5]]) is None


@pytest.mark.parametrize("edited", [None, 3, {"20": 2.0}, [[20]], [["20", 2.0]], [[20, "low"]], [20]])
def test_an_edited_marker_counts_as_not_measured(edited):
    assert validation.of({validation.KEY: edited}) == []


def test_validation_begins_no_other_run():
    """Training is the same to the bit: a begun run goes on."""
    assert settings(validation={"every_steps": 5}).shaping() == settings().shaping()


def test_a_rehearsal_measures_nothing():
    assert rehearsal.settings_of(settings(validation={"every_steps": 1})).validation is None


def test_tokens_of_the_held_out_samples_are_made_only_for_validation(project):
    held = {"data": {"held_out": 0.01}}
    without = resolved(project, **held)
    measured = resolved(project, **held, train={"validation": {"every_steps": 50}})
    assert "--held-out" not in without.arguments("tokenize_data")
    assert "--held-out results/mine/data/held_out.jsonl" in measured.arguments("tokenize_data")
    assert json.loads(measured.settings("train"))["validation"]["every_steps"] == 50
    assert "validation" not in json.loads(without.settings("train"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train": {"validation": {"every_steps": 50}}}, "train.validation: there are no samples to measure"),
        (
            {
                "data": {"held_out": 0.01},
                "train": {"save_every_steps": 100, "validation": {"every_steps": 30, "early_stop": {"patience": 2}}},
            },
            "train.validation.early_stop: checkpoints of steps that are not measured could not be chosen",
        ),
    ],
    ids=["nothing is held out", "saves between measurements"],
)
def test_what_training_could_not_measure_is_refused_at_start(project, changes, said):
    with pytest.raises(BadInputError, match=said):
        resolved(project, **changes)


def test_a_receipt_without_held_out_tokens_is_refused_with_what_to_do(tmp_path):
    receipts.write(
        tmp_path / "r.json", "tokenize_data", inputs={}, settings={}, result={"tokens": str(tmp_path)}, figures={}
    )
    with pytest.raises(BadInputError, match="names no held-out tokens"):
        stage._held_out(receipts.read(tmp_path / "r.json", "tokenize_data"), tmp_path / "r.json")


def test_a_measurement_is_planned_by_the_passes_of_its_samples():
    chosen = dataclasses.replace(training(4, "zero3_offload", 2), validation=Planned(100, 1000))
    samples = Samples(100_000, 8_000, 16_000, "counted", held_out=130)
    assert validation_time.measurements(chosen, 1001) == 12  # the base, then ten by their number, and the last step
    assert validation_time.turns(chosen, samples, groups=64) == 2  # 65 micro batches
    assert validation_time.turns(chosen, dataclasses.replace(samples, held_out=None), groups=64) == 8
    accumulated = chosen.gradient_accumulation_steps
    assert validation_time.seconds(chosen, samples, 64, 80.0) == pytest.approx(2 * 80 / accumulated * 0.25)


def test_the_best_checkpoint_has_its_place_on_the_disk():
    from planning_plans import _counted

    plain, model = training(4, "zero3_offload", 2), _counted("MOONLIGHT_16B")
    kept = [
        disk(model, dataclasses.replace(plain, validation=Planned(10, 10, best)), cluster(2), "bf16")[0].value
        for best in (False, True)
    ]
    assert kept[1] / kept[0] == pytest.approx(4 / 3)


def test_gpu_hours_of_measurements_are_neither_training_nor_lost(tmp_path):
    gpu_hours.note_start(tmp_path, "1", 8, 0.0, 100.0, 0, None)
    lines = [{"step": 1, "seconds": 10.0}, {"step": 2, "seconds": 10.0, "seconds_validation": 450.0}]
    (tmp_path / run_folder.METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = gpu_hours.read(tmp_path)
    assert (found.validated, found.trained) == (1.0, 8 * 20 / 3600)
    assert "1.00 validating" in found.text()
    left = gpu_hours.left_behind(tmp_path, 1)
    assert left["seconds"] == 460.0, "what is trained again, is measured again"


def test_gpu_hours_of_the_bases_measurement_count_with_the_start_that_made_it(tmp_path):
    base = {"step": 0, "validation_loss": 3.0, "seconds_validation": 450.0}
    lines = [base, {"step": 1, "seconds": 10.0}]
    (tmp_path / run_folder.METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    left = gpu_hours.left_behind(tmp_path, 0)
    assert (left["seconds"], left["steps"]) == (460.0, 1), "without a checkpoint the base is measured again"
    assert gpu_hours.left_behind(tmp_path, 1)["seconds"] == 0.0
    gpu_hours.note_start(tmp_path, "1", 4, 0.0, 100.0, 0, None)
    gpu_hours.note_start(tmp_path, "2", 8, 1000.0, 1100.0, 0, left)
    found = gpu_hours.read(tmp_path)
    assert (found.validated, found.trained) == (8 * 450 / 3600, 8 * 10 / 3600)


def test_a_run_that_begins_anew_drops_the_bases_line_too(tmp_path):
    (tmp_path / run_folder.METRICS).write_text('{"step": 0, "validation_loss": 3.0}\n{"step": 1}\n')
    run_folder.cut_metrics(tmp_path, -1)
    assert (tmp_path / run_folder.METRICS).read_text() == ""


def test_status_tells_the_base_apart(tmp_path):
    lines = [{"step": step, "validation_loss": loss} for step, loss in [[0, 4.0], *FALLING]]
    said = [validation_rows.row(lines[:count])[0][1] for count in (1, 2, 5)]
    assert said == [
        "loss 4.0000 of the base",
        "loss 3.0000 after step 10, the lowest, 4.0000 of the base",
        "loss 2.4000 after step 40, lowest 2.0000 after step 20, 4.0000 of the base",
    ]
    rows = dict(status.training_rows(tmp_path, None, lines[:1]))
    assert rows["step"].startswith("none of") and rows["validation"] == "loss 4.0000 of the base"
    lines[0]["validation_loss"] = 1.5
    assert validation_rows.row(lines)[0][1] == "loss 2.4000 after step 40, never below the 1.5000 of the base"
    told = {"validation_first_loss": 4.0, "validation_first_step": 0, "validation_loss": 2.4}
    assert validation_rows.of_receipt(told) == ", validation loss 4 (of the base) → 2.4"


def test_the_curve_of_the_validation_loss_starts_at_the_base():
    lines = [{"step": 0, "validation_loss": 4.0}] + [{"step": n, "loss": 3.0, "learning_rate": 1e-3} for n in (1, 2)]
    lines[-1]["validation_loss"] = 2.0
    assert [values.tolist() for values in plots.series(lines, "validation_loss")] == [[0, 2], [4.0, 2.0]]
    (drawn,) = plots.training(lines)
    assert "circles: validation loss" in drawn.caption


def test_status_tells_the_loss_and_the_lowest():
    lines = [{"step": step, "validation_loss": loss, "seconds_validation": 7.0} for step, loss in FALLING]
    ((name, text),) = validation_rows.row(lines)
    assert (name, text) == ("validation", "loss 2.4000 after step 40, lowest 2.0000 after step 20, 3.0000 at first")
    assert validation_rows.row([{"step": 1, "loss": 2.0}]) == []
    assert validation_rows.seconds_left(lines, 25, {"validation": {"every_steps": 10}}) == 21.0


def test_a_finished_run_tells_what_is_converted():
    told = {"validation_first_loss": 3.0, "validation_loss": 2.4}
    assert validation_rows.of_receipt(told) == ", validation loss 3 → 2.4"
    chosen = told | {"converted_step": 20, "converted_validation_loss": 2.0}
    assert validation_rows.of_receipt(chosen).endswith("; converted is step 20 with 2")
    assert validation_rows.of_receipt({"steps": 3}) == ""


def test_clean_keeps_the_checkpoint_that_was_converted_and_the_newest(tmp_path, monkeypatch):
    run = tmp_path / "train/runs/abc"
    for step in (10, 20, 40):
        saved(run, step, FALLING)
    told = {"run_id": "abc", "steps": 40, "converted_step": 20}
    chosen = {"inputs": {"checkpoint": {"path": str(run / "step_20")}}, "figures": {"checks": {"a": {"passed": True}}}}
    of_rule = {
        "train": {"result": {"run": str(run), "checkpoint": str(run / "step_20")}, "figures": told, "finished": "1"},
        "convert_checkpoint": {},
        "verify_model": chosen | {"finished": "2"},
    }
    monkeypatch.setattr(retention, "_read", lambda results, rule, needs: of_rule[rule])
    monkeypatch.setattr(retention, "_check_model", lambda converted, verified: None)
    found = retention.choose(tmp_path)
    assert [one.folder.name for one in found.items] == ["step_10"]
    assert [folder.name for folder in found.kept] == ["step_20", "step_40"]
