"""The report of an experiment with stages that are missing, broken, failed or out of date."""

import copy
import json
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from unit.report import results as made
from unit.report.page import Page, section

from deepseek_sft.report import build, drawing, overview

RECEIPT_KEYS = (
    "inputs",
    "settings",
    "result",
    "figures",
    "hosts",
    "slurm",
    "versions",
    "command",
    "seconds",
    "finished",
)


@pytest.fixture
def results(tmp_path):
    return made.write_results(tmp_path)


@pytest.fixture(autouse=True)
def quick_drawings(monkeypatch):
    """Figures are made, but not laid out and written: that takes most of a report's time and is tested elsewhere."""
    monkeypatch.setattr(drawing, "svg", lambda figure, name, description: f'<svg data-plot="{name}"></svg>')


def test_missing_stages_are_shown_as_not_run(tmp_path):
    results = made.write_results(tmp_path, ("prepare_data", "tokenize_data", "prepare_model"))
    page = build.build(results, None).html
    for rule in ("plan", "train", "convert_checkpoint", "verify_model", "smoke_test"):
        assert "not run" in section(page, rule)
    assert "Not complete: train is next" in page


def test_an_experiment_without_plan_is_complete(tmp_path):
    results = made.write_results(tmp_path, tuple(rule for rule in made.FIGURES if rule != "plan"))
    report = build.build(results, None)
    assert "not run" in section(report.html, "plan")
    assert report.figures["verdict"] == "Complete: every stage passed"


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"rule": "plan"}', "\x00\xff", "[" * 100_000])
def test_unreadable_receipt_is_shown_as_such(results, content):
    (results / "receipts/train.json").write_text(content)
    report = build.build(results, None)
    assert "unreadable" in section(report.html, "train")
    assert report.figures["verdict"] == "Unreadable: train"


def test_receipt_with_keys_absent_is_rendered(results):
    for rule in made.FIGURES:
        (results / f"receipts/{rule}.json").write_text(json.dumps({"schema": 1, "rule": rule}))
    assert build.build(results, None).figures["stages_complete"] == len(made.FIGURES)


def test_receipt_with_values_of_wrong_types_is_rendered(results):
    broken = dict.fromkeys(("inputs", "settings", "result", "figures", "hosts", "slurm", "versions", "command"), 7)
    made.write_receipt(results, "train", **broken)
    figures = {
        "world_size": "x",
        "seconds": None,
        "first_loss": "low",
        "checks": {},
        "steps": [[1], {"a": 2}],
        "example": 3,
    }
    made.write_receipt(results, "smoke_test", figures=figures)
    page = build.build(results, None).html
    assert re.findall(r'<section id="(\w+)">', page)[-2:] == ["versions", "commands"]
    assert "low" in section(page, "smoke_test")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
KEYS = st.sampled_from(["checks", "verdict", "example", "seconds", "world_size", "first_loss", "parameters", "rejects"])
CHECKS = st.fixed_dictionaries({"checks": st.dictionaries(st.text(), st.fixed_dictionaries({"passed": JSON}))})


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(receipt=st.dictionaries(st.sampled_from(RECEIPT_KEYS), JSON), figures=CHECKS | st.dictionaries(KEYS, JSON))
def test_no_content_of_a_receipt_stops_the_report(tmp_path_factory, receipt, figures):
    results = tmp_path_factory.mktemp("any") / "results" / "any"
    (results / "receipts").mkdir(parents=True)
    for rule in ("plan", "train", "tokenize_data", "smoke_test"):
        content = {"figures": figures, **receipt, "rule": rule}
        (results / f"receipts/{rule}.json").write_text(json.dumps(content))
    build.build(results, None)
    overview.summary(results, None)


def test_last_lines_of_the_log_explain_a_stage_without_receipt(tmp_path):
    results = made.write_results(tmp_path, ("prepare_data",))
    logs = tmp_path / "logs/demo"
    logs.mkdir(parents=True)
    lines = [f"step {number} \x1b[31m<loss>\x1b[0m" for number in range(500)]
    (logs / "train.log").write_text("\n".join(lines) + "\nerror: node2 died\n")
    shown = section(build.build(results, logs).html, "train")
    text = Page(shown).text
    assert "not finished" in text
    assert "error: node2 died" in text
    assert "step 499 <loss>" in text
    assert "step 400 " not in text


def test_gate_that_failed_says_so_and_keeps_its_answers(results, tmp_path):
    (results / "receipts/smoke_test.json").unlink()
    folder = tmp_path / "logs/demo/smoke_test"
    folder.mkdir(parents=True)
    (folder / "do-not-retry").write_text("attempt 1 ended with exit code 3, see logs/demo/smoke_test/17-1.log\n")
    (folder / "17-1.log").write_text("  FAILED logprobs: off by 0.8\n")
    (folder.parent / "smoke_test.log").symlink_to("smoke_test/17-1.log")
    report = build.build(results, tmp_path / "logs/demo")
    assert report.figures["verdict"] == "Failed: smoke_test"
    text = Page(section(report.html, "smoke_test")).text
    for expected in ("exit code 3", "FAILED logprobs: off by 0.8", "的 zoo|| untrained"):
        assert expected in text
    (results / "serve/evaluation.jsonl").unlink()
    shown = section(build.build(results, tmp_path / "logs/demo").html, "smoke_test")
    assert "9.11 和 9.2 哪个大?" in Page(shown).text


def test_training_without_receipt_still_shows_its_loss(tmp_path):
    results = made.write_results(tmp_path, ("prepare_data",))
    logs = tmp_path / "logs/demo"
    logs.mkdir(parents=True)
    (logs / "train.log").write_text("step 120\n")
    page = build.build(results, logs).html
    assert 'data-plot="loss"' in page[: page.index('<section id="prepare_data"')]
    assert section(page, "train").count("<svg") == 5


def test_failed_check_fails_the_stage_and_the_report(results):
    figures = copy.deepcopy(made.FIGURES["smoke_test"])
    figures["checks"]["logprobs"] = {"passed": False, "detail": "off by 0.8"}
    made.write_receipt(results, "smoke_test", figures=figures, finished="2026-01-31T12:07:30+00:00")
    report = build.build(results, None)
    assert report.figures["verdict"] == "Failed: smoke_test"
    assert "off by 0.8" in section(report.html, "smoke_test")


def test_stage_older_than_its_input_is_out_of_date(results):
    made.write_receipt(results, "convert_checkpoint", finished="2026-01-31T23:00:00+00:00")
    report = build.build(results, None)
    assert report.figures["verdict"] == "Out of date: verify_model, smoke_test"


def test_result_that_has_gone_is_named(results):
    (results / "model").rmdir()
    page = build.build(results, None).html
    assert "no longer there: results/demo/model" in section(page, "convert_checkpoint")


def test_plan_that_does_not_fit_fails(results):
    made.write_receipt(results, "plan", figures={"verdict": "does not fit"})
    report = build.build(results, None)
    assert report.figures["verdict"] == "Failed: plan"
    assert "does not fit" in section(report.html, "plan")


def test_experiment_of_the_same_name_in_the_working_folder_is_not_mixed_in(results, tmp_path, monkeypatch):
    before = build.build(results, None).html
    other = tmp_path / "checkout" / "results" / "demo"
    (other / "model").mkdir(parents=True)
    (other / "serve").mkdir()
    (other / "serve" / "transcript.jsonl").write_text("{}\n")
    monkeypatch.chdir(tmp_path / "checkout")
    assert Page(section(build.build(results, None).html, "smoke_test")).text == Page(section(before, "smoke_test")).text
    (results / "model").rmdir()
    assert "no longer there: results/demo/model" in section(build.build(results, None).html, "convert_checkpoint")


def test_copied_results_folder_gives_the_same_plots(results, tmp_path):
    moved = tmp_path / "elsewhere" / "demo"
    moved.parent.mkdir()
    results.rename(moved)
    report = build.build(moved, None)
    assert report.figures["plots"] == 11
    assert report.figures["verdict"] == "Complete: every stage passed"
