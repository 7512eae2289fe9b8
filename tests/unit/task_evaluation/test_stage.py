"""The stages: what needs nodes, what is kept for whom, what is left when a gate fails."""

import json
from pathlib import Path
from typing import Any

import pytest

from deepseek_sft import receipts
from deepseek_sft.errors import BadInputError, CrashError, GateError
from deepseek_sft.settings import reading
from deepseek_sft.settings.served_evaluation import ServedEvaluation
from deepseek_sft.slurm import sbatch
from deepseek_sft.task_evaluation import measured, stage

BOTH = {"evaluate", "evaluate_base"}


class Site:
    """An experiment with a verified model, a base and one task of two items."""

    def __init__(self, folder: Path):
        self.results = folder / "results" / "x"
        self.items = folder / "items.jsonl"
        lines = [{"id": f"i{n}", "messages": [{"role": "user", "content": f"{n}"}], "answer": f"{n}"} for n in range(2)]
        self.items.write_text("".join(json.dumps(line) + "\n" for line in lines))
        self.receipt("verify_model", {"model": "m"})
        self.receipt("prepare_model", {"base": "b"}, fingerprint="base-1")
        self.receipt("evaluate_base", {})
        self.verdict = self.results / "receipts" / "evaluate.json"

    def receipt(self, rule: str, result: dict[str, str], **figures: Any) -> None:
        places = {name: self.results / place for name, place in result.items()}
        for place in places.values():
            place.mkdir(parents=True, exist_ok=True)
        path = self.results / "receipts" / f"{rule}.json"
        receipts.write(path, rule, inputs={}, settings={}, result=places, figures=figures)

    def settings(self, **task: Any) -> ServedEvaluation:
        return reading.parse(ServedEvaluation, {"tasks": {"sums": {"data": str(self.items)} | task}}, "x")

    def measure(self, settings: ServedEvaluation, rule: str, scores: list[int]) -> Path:
        of = stage.subject(settings, rule, stage.receipt_of(self.results, rule)).of("sums", settings.by_name["sums"])
        path = measured.place(stage.folder(self.results, rule), "sums", of)
        found = {"items": {f"i{n}": [score] for n, score in enumerate(scores)}, "metric": "exact"}
        measured.write(path, of, found | {"answers": 2, "truncated": 0})
        return path


@pytest.fixture
def site(tmp_path):
    return Site(tmp_path)


def test_what_the_smoke_tests_job_makes_needs_no_nodes_of_its_own(site):
    assert stage.without_nodes(site.settings(), site.results, {"smoke_test", *BOTH}) == {"evaluate"}


def test_what_is_not_measured_is_served(site):
    assert stage.without_nodes(site.settings(), site.results, BOTH) == set()


def test_what_is_measured_is_judged_without_nodes_under_any_gate(site):
    site.measure(site.settings(), stage.MODEL, [1, 1])
    site.measure(site.settings(), stage.BASE, [0, 0])
    assert stage.without_nodes(site.settings(min=0.5), site.results, BOTH) == BOTH


def test_another_model_base_or_content_of_the_task_is_measured_anew(site):
    site.measure(site.settings(), stage.MODEL, [1, 1])
    site.measure(site.settings(), stage.BASE, [0, 0])
    site.receipt("prepare_model", {"base": "b"}, fingerprint="base-2")
    assert stage.without_nodes(site.settings(), site.results, BOTH) == {"evaluate"}
    site.receipt("verify_model", {"model": "m"}, steps=2)
    assert stage.without_nodes(site.settings(), site.results, BOTH) == set()


def test_a_model_that_is_still_to_be_made_is_not_taken_for_its_predecessor(site):
    site.measure(site.settings(), stage.MODEL, [1, 1])
    assert stage.without_nodes(site.settings(), site.results, {"verify_model", "evaluate"}) == set()


def test_a_base_serves_every_experiment_beside(site):
    path = site.measure(site.settings(), stage.BASE, [0, 0])
    assert path.parent == site.results.parent / "evaluated_bases"


def test_a_torn_result_is_none(site):
    path = site.measure(site.settings(), stage.MODEL, [1, 1])
    path.write_text(path.read_text()[:60])
    assert not stage.is_measured(site.settings(), site.results, stage.MODEL)


def test_a_passed_gate_leaves_a_receipt_with_the_figures(site):
    settings = site.settings(min=0.5)
    site.measure(settings, stage.MODEL, [1, 0])
    stage.judge(settings, site.results, site.verdict)
    figures = receipts.read(site.verdict, "evaluate")["figures"]
    assert figures["checks"]["sums.min"]["passed"] and figures["tasks"]["sums"]["score"]["mean"] == 0.5


def test_a_failed_gate_fails_the_stage_with_its_sentence_and_leaves_figures_and_no_receipt(site):
    settings = site.settings(min=0.9)
    site.measure(settings, stage.MODEL, [1, 0])
    with pytest.raises(GateError, match=r"failed 1 of 1 gates of its evaluation:\n  sums.min: 0.500 .* is below 0.9"):
        stage.judge(settings, site.results, site.verdict)
    left = json.loads(receipts.failed_path(site.verdict).read_text())
    assert not site.verdict.exists() and left["figures"]["tasks"]["sums"]["items"] == 2


def test_a_drop_is_held_against_the_base(site):
    settings = site.settings(max_drop=0.1)
    site.measure(settings, stage.MODEL, [0, 0])
    site.measure(settings, stage.BASE, [1, 1])
    with pytest.raises(GateError, match=r"from the base.s 1\.000 it fell by 1\.000"):
        stage.judge(settings, site.results, site.verdict)


def test_a_base_without_a_result_is_no_success(site):
    with pytest.raises(CrashError, match="no result of sums"):
        stage.record_base(site.settings(), site.results, site.results / "receipts/evaluate_base.json")


@pytest.mark.parametrize("kind", [BadInputError, CrashError])
def test_what_kept_the_smoke_tests_job_from_evaluating_is_told_by_evaluate(kind, site):
    stage.keep_reason(site.results, kind("a request was refused", "mend it"))
    with pytest.raises(kind, match="smoke test's job could not evaluate the model: a request was refused"):
        stage.raise_reason(site.results)


@pytest.mark.parametrize(
    "rule, evaluated, words",
    [
        ("smoke_test", False, ["--model-receipt results/x/receipts/verify_model.json"]),
        ("smoke_test", True, ["--smoke-test results/x/receipts/smoke_test.json", "--evaluate results/x"]),
        ("evaluate", True, ["--model-receipt results/x/receipts/verify_model.json", "--evaluate results/x"]),
        ("evaluate_base", True, ["--base-receipt results/x/receipts/prepare_model.json", "--evaluate results/x"]),
    ],
)
def test_a_job_asks_the_tasks_where_they_are_configured_and_of_whom_it_is_to(rule, evaluated, words):
    context = {"project": "/p", "results": "results/x", "logs": "logs/x", "python": "python", "activate": ""}
    context |= {"experiment": "x", "environment": {}, "evaluated": evaluated}
    script = sbatch.render(rule, sbatch.Allocation(nodes=2), context)
    assert all(word in script for word in words) and ("--evaluate" in script) is evaluated
    assert ("--smoke-test" in script) is (rule == "smoke_test")
