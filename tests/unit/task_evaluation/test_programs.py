"""The two programs, as rules and jobs call them: who says what went wrong, and with which exit code."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from deepseek_sft import receipts

PROJECT = Path(__file__).resolve().parents[3]


class Site:
    """An experiment whose environment with lm-eval has gone."""

    def __init__(self, folder: Path):
        self.results, self.settings = folder / "results/x", folder / "settings.json"
        (folder / "items.jsonl").write_text('{"messages": [{"role": "user", "content": "1+1?"}], "answer": "2"}\n')
        tasks = {"sums": {"data": str(folder / "items.jsonl"), "min": 0.5}}
        self.settings.write_text(json.dumps({"evaluation": {"tasks": tasks, "python": "/nowhere/python"}}))
        receipts.write(
            self.results / "receipts/verify_model.json",
            "verify_model",
            inputs={},
            settings={},
            result={"model": str(folder)},
            figures={},
        )

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(PROJECT / "workflow/scripts" / words[0]), *words[1:]]
        command += ["--settings", str(self.settings), "--results", str(self.results)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    def judge(self, script: Path) -> subprocess.CompletedProcess[str]:
        receipt = self.results / "receipts/evaluate.json"
        return self.run("evaluate.py", "evaluate", "--script", str(script), "--receipt", str(receipt))


@pytest.fixture
def site(tmp_path):
    return Site(tmp_path)


def test_a_smoke_test_stays_passed_and_evaluate_says_why_the_model_was_not_evaluated(site, tmp_path):
    done = site.run("evaluate_served.py", "--url", "http://127.0.0.1:9", "--after-smoke-test")
    assert done.returncode == 0 and "warning: the model is not evaluated: /nowhere/python does not exist" in done.stderr
    script = tmp_path / "serve.sh"
    script.write_text(f"touch {tmp_path}/served\n")
    judged = site.judge(script)
    assert judged.returncode == 2 and "the smoke test's job could not evaluate the model: /nowhere/" in judged.stderr
    assert not (tmp_path / "served").exists()


def test_alone_the_same_fails_at_once(site):
    done = site.run("evaluate_served.py", "--url", "http://127.0.0.1:9")
    assert done.returncode == 2 and "error: /nowhere/python does not exist" in done.stderr


def test_the_exit_code_of_serving_is_that_of_the_stage(site, tmp_path):
    script = tmp_path / "serve.sh"
    script.write_text("exit 4\n")
    assert site.judge(script).returncode == 4


def test_serving_that_leaves_no_result_is_not_passed(site, tmp_path):
    script = tmp_path / "serve.sh"
    script.write_text("exit 0\n")
    judged = site.judge(script)
    assert judged.returncode == 3 and "sums.min: it has no result: not judged, so not passed" in judged.stderr
