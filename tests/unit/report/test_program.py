"""build_report.py as a program: what it writes, prints and refuses."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from unit.report import results as made

from deepseek_sft.errors import BadInputError
from deepseek_sft.report import build

REPOSITORY = Path(__file__).resolve().parents[3]


@pytest.fixture
def results(tmp_path):
    return made.write_results(tmp_path)


def run_script(*arguments, cwd):
    script = REPOSITORY / "workflow/scripts/build_report.py"
    command = [sys.executable, str(script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=cwd)


RECEIPT = ("--receipt", "results/demo/receipts/build_report.json")


def complete(results):
    """Make the chain whole: these results are of a run whose plan was not refined, and their folders are empty."""
    plan = json.loads((results / "receipts/plan.json").read_text())
    (results / "receipts/refine_plan.json").write_text(json.dumps(plan | {"rule": "refine_plan"}))
    for name in ("base", "model"):
        (results / name / "config.json").write_text("{}")


def test_script_writes_report_without_a_receipt_unless_it_is_asked_for_one(results, tmp_path):
    done = run_script("results/demo", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (results / "report.html").exists()
    assert not (results / "receipts/build_report.json").exists()


def test_receipt_for_a_chain_that_is_not_complete_is_refused_by_name(results, tmp_path):
    complete(results)
    (results / "receipts/smoke_test.json").unlink()
    done = run_script("results/demo", *RECEIPT, cwd=tmp_path)
    assert done.returncode == 2
    assert "the chain is not complete: smoke_test" in done.stderr
    assert not (results / "receipts/build_report.json").exists()


def test_script_writes_report_and_receipt(results, tmp_path):
    complete(results)
    done = run_script("results/demo", *RECEIPT, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    receipt = json.loads((results / "receipts/build_report.json").read_text())
    page = results / "report.html"
    assert receipt["rule"] == "build_report"
    assert receipt["result"] == {"report": "results/demo/report.html"}
    assert receipt["figures"]["bytes"] == page.stat().st_size
    assert receipt["figures"]["stages_complete"] == receipt["figures"]["stages"] == 9


def test_script_writes_where_it_is_told(results, tmp_path):
    complete(results)
    done = run_script("results/demo", "--output", tmp_path / "r.html", "--receipt", tmp_path / "r.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "r.html").exists()
    assert (tmp_path / "r.json").exists()
    assert not (results / "report.html").exists()


def test_summary_tells_loss_answer_verdict_and_report(results, tmp_path):
    before = sorted(results.rglob("*"))
    done = run_script("results/demo", "--summary", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for expected in ("Complete", "11.8 → 0.0421", "What is 17 + 25?", "42", "passed · 2 of 2 checks", "not built yet"):
        assert expected in done.stdout
    assert sorted(results.rglob("*")) == before
    run_script("results/demo", cwd=tmp_path)
    assert str(results / "report.html") in run_script("results/demo", "--summary", cwd=tmp_path).stdout


def test_folder_that_is_no_experiment_is_bad_input(tmp_path):
    with pytest.raises(BadInputError, match="no results folder"):
        build.build(tmp_path / "absent", None)
    done = run_script(tmp_path, cwd=tmp_path)
    assert done.returncode == 2
    assert "receipts" in done.stderr
    assert "Traceback" not in done.stderr


def test_place_that_cannot_be_written_is_bad_input(results, tmp_path):
    (tmp_path / "taken").write_text("")
    done = run_script(results, "--output", tmp_path / "taken" / "report.html", cwd=tmp_path)
    assert done.returncode == 2
    assert "cannot be written" in done.stderr
    assert not (results / "receipts/build_report.json").exists()
