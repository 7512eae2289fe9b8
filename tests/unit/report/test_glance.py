"""The first minute with a report: why it failed, what ran with which settings, what was not used."""

import json
import re

import pytest
from unit.report import results as made
from unit.report.page import Page, section

from deepseek_sft import receipts
from deepseek_sft.report import build, collect, glance


def top(page: str) -> str:
    """Text before the first stage's section."""
    return Page(page[: page.index('<section id="prepare_data"')]).text


@pytest.fixture
def results(tmp_path):
    folder = made.write_results(tmp_path)
    config = {
        "experiment": "demo",
        "data": {"template": "deepseek-v3"},
        "model": {"base": "/models/DeepSeek-R1"},
        "train": {
            "learning_rate": 5e-3,
            "lr_schedule": "cosine",
            "micro_batch_size": 4,
            "gradient_accumulation_steps": 3,
            "sequence_parallel_size": 2,
        },
    }
    (folder / "config.yaml").write_text(json.dumps(config))
    return folder


@pytest.fixture
def logs(tmp_path):
    folder = tmp_path / "logs/demo"
    folder.mkdir(parents=True)
    return folder


def fail(results, logs, rule: str, log: str) -> None:
    """Leave what a stage leaves that ended with exit code 3."""
    (results / f"receipts/{rule}.json").unlink()
    (logs / rule).mkdir()
    (logs / rule / "do-not-retry").write_text("attempt 1 ended with exit code 3, see the log")
    (logs / f"{rule}.log").write_text(log)


def test_top_tells_learning_rate_batch_nodes_base_template_and_date(results):
    stages = collect.stages(results, None)
    metrics = collect.training_metrics(results, stages["train"])
    facts = dict(glance.facts(stages, collect.config(results), metrics))
    assert facts == {
        "learning rate": "2e-07 at most, cosine",  # as the receipt has it: a changed configuration has not run
        "batch": "24 samples a step, 3,000 tokens a step",
        "nodes": "2, 4 ranks",
        "base": "/models/DeepSeek-R1, 8.4 M parameters",
        "template": "deepseek-v3",
        "when": "2026-01-31 12:00 to 12:07 UTC, 7 min 30 s in all",
    }
    shown = top(build.build(results, None).html)
    for text in facts.values():
        assert text in shown


def test_loss_curve_stands_at_the_top_and_nowhere_else(results):
    page = build.build(results, None).html
    assert page.count('data-plot="loss"') == 1
    assert page.index('data-plot="loss"') < page.index('<section id="prepare_data"')


def test_failed_gate_without_receipt_shows_its_checks_and_the_fix(results, logs):
    error = "error: the served model failed 1 of 2 checks:\n  held_out_loss: 3.1\n  fix: look at training\n"
    fail(results, logs, "smoke_test", f"starting\n{error}")
    checks = {
        "health": {"passed": True, "detail": "200"},
        "held_out_loss": {"passed": False, "detail": "3.1, at most 1"},
    }
    receipts.write_failed(results / "receipts/smoke_test.json", "smoke_test", {"checks": checks})
    page = build.build(results, logs).html
    shown = top(page)
    assert re.search(r"held_out_loss.*failed.*3\.1, at most 1", shown, re.DOTALL)
    assert "fix: look at training" in shown and "1 passed" in shown
    text = Page(section(page, "smoke_test")).text
    assert "health" in text and "held_out_loss" in text and "failed/smoke_test.json" in text


def test_training_that_failed_says_its_error_at_the_top(results, logs):
    log = "0: step 1\n0: error: the first loss is 9, above train.first_loss_max 3\n0:   fix: look at the base\n"
    fail(results, logs, "train", log)
    shown = top(build.build(results, logs).html)
    assert "the first loss is 9, above train.first_loss_max 3" in shown
    assert "fix: look at the base" in shown


def test_checks_of_an_earlier_failure_are_not_shown_once_the_stage_runs_again(results, logs):
    fail(results, logs, "smoke_test", "error: old\n")
    receipts.write_failed(results / "receipts/smoke_test.json", "smoke_test", {"checks": {"a": {"passed": False}}})
    (logs / "smoke_test/do-not-retry").unlink()  # as stage.sh does at each start
    (logs / "smoke_test.log").write_text("starting\n")
    stage = collect.stages(results, logs)["smoke_test"]
    assert stage.state == "not finished" and stage.checks == []


def test_receipt_removes_what_an_earlier_failure_left(tmp_path):
    receipt = tmp_path / "receipts/verify_model.json"
    receipts.write_failed(receipt, "verify_model", {"checks": {}})
    assert receipts.failed_path(receipt).exists()
    receipts.write(receipt, "verify_model", inputs={}, settings={}, result={}, figures={})
    assert not receipts.failed_path(receipt).exists()


@pytest.mark.parametrize(("rejected", "told"), [(391, True), (30, False)])
def test_many_rejects_are_told_at_the_top(results, rejected, told):
    figures = {"records": 480, "accepted": 480 - rejected, "rejected": rejected, "rejects": {"duplicate": rejected}}
    made.write_receipt(results, "prepare_data", figures=figures)
    shown = top(build.build(results, None).html)
    assert (f"{rejected} of 480 records were rejected" in shown) == told


def test_answer_that_was_cut_keeps_its_reasoning_and_says_so(results):
    cut = made.held_out(3) | {"answer": "", "reasoning": "7 + 5 and so on", "finish_reason": "length", "tokens": 128}
    (results / "serve/evaluation.jsonl").write_text(json.dumps(cut) + "\n")
    page = section(build.build(results, None).html, "smoke_test")
    assert re.search(r"<details><summary>reasoning, 15 characters</summary>.*7 \+ 5 and so on", page, re.DOTALL)
    text = Page(page).text
    assert "(no answer: cut after 128 tokens, still reasoning)" in text
    assert "(none)" not in text


def test_plan_is_not_told_twice(results):
    refined = made.FIGURES["plan"] | {"steps": 60, "nodes": 2}
    made.FIGURES["refine_plan"] = refined
    try:
        made.write_receipt(results, "refine_plan")
    finally:
        del made.FIGURES["refine_plan"]
    page = build.build(results, None).html
    first = section(page, "plan")
    assert "<svg" not in first and "host memory" not in Page(first).text
    assert "120 → 60" in Page(first).text
    assert section(page, "refine_plan").count("<svg") == 1
