"""Promises of what experiment trackers are given: the run's own numbers, and nothing that names places or people."""

import json

import pytest
from unit.report import results as made

from deepseek_sft.report import tracked


@pytest.fixture
def results(tmp_path):
    folder = made.write_results(tmp_path)
    run = next((folder / "train/runs").iterdir())
    settings = {"learning_rate": 5e-3, "run_name": "for Ann", "environment": {"TOKEN": "hunter2"}, "secrets_file": "/s"}
    (run / "settings.json").write_text(json.dumps({"settings": settings}))
    return folder


def test_every_step_comes_with_its_numbers_and_a_time(results):
    found = tracked.of(results)
    assert [step for step, _, _ in found.steps] == list(range(1, made.STEPS + 1))
    line = made.line(7)
    values = found.steps[6][2]
    assert values["loss"] == line["loss"] and "step" not in values
    assert all(isinstance(value, float) for _, _, one in found.steps for value in one.values())
    times = [at for _, at, _ in found.steps]
    assert times == sorted(times) and times[1] - times[0] == pytest.approx(made.line(2)["seconds"])


def test_settings_that_may_name_places_or_people_stay_here(results):
    assert tracked.of(results).settings == {"train.learning_rate": "0.005"}


def test_figures_are_the_numbers_of_the_receipts(results):
    found = tracked.of(results)
    receipt = json.loads((results / "receipts/train.json").read_text())
    assert found.figures["train/steps"] == receipt["figures"]["steps"]
    assert all(isinstance(value, float) for value in found.figures.values())


def test_a_run_without_a_receipt_goes_on(results):
    assert tracked.of(results).ended
    (results / "receipts/train.json").unlink()
    (results / "train/runs/3f9c01d2ab45/metrics.jsonl").write_text(json.dumps(made.line(1)) + "\n")
    found = tracked.of(results)
    assert found is None or not found.ended


def test_before_the_first_step_there_is_nothing_to_give(tmp_path):
    assert tracked.of(tmp_path) is None
