"""Promises of the `clean` target: what goes, what stays, and when nothing may go."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from training_helpers import write_checkpoint

from deepseek_sft.errors import BadInputError, GateError
from deepseek_sft.training import lock, retention


class Finished:
    """Results of an experiment whose model is verified, with four checkpoints."""

    def __init__(self, folder: Path):
        self.results = folder / "results" / "one"
        self.run = self.results / "train" / "runs" / "abc"
        for step in (10, 20, 30):
            write_checkpoint(self.run, step)
        write_checkpoint(self.run, 15, commit=False)
        (self.run / "step_5.incomplete").mkdir()
        (self.run / "metrics.jsonl").write_text("{}\n")
        (self.results / "model").mkdir()
        last = self.run / "step_30"
        model = {"model": str(self.results / "model")}
        self.receipt("train", "2026-01-01", {"run": str(self.run), "checkpoint": str(last)}, {"run_id": "abc"})
        self.receipt("convert_checkpoint", "2026-01-02", model, {})
        self.verified = {"checks": {"names": {"passed": True, "detail": ""}}}
        self.verify()

    def receipt(self, rule: str, finished: str, result: dict, figures: dict, **more) -> None:
        path = self.results / "receipts" / f"{rule}.json"
        path.parent.mkdir(exist_ok=True)
        content = {"schema": 1, "rule": rule, "finished": finished, "result": result, "figures": figures, "inputs": {}}
        path.write_text(json.dumps(content | more))

    def verify(self, step: int = 30, finished: str = "2026-01-03", figures: dict | None = None) -> None:
        inputs = {"checkpoint": {"path": str(self.run / f"step_{step}"), "fingerprint": "f"}}
        model = {"model": str(self.results / "model")}
        self.receipt("verify_model", finished, model, figures or self.verified, inputs=inputs)

    def folders(self) -> set[str]:
        return {path.name for path in self.run.iterdir() if path.is_dir()}


@pytest.fixture
def finished(tmp_path: Path) -> Finished:
    return Finished(tmp_path)


def test_all_but_the_newest_committed_checkpoint_go(finished):
    removal = retention.choose(finished.results)
    retention.remove(removal)
    assert finished.folders() == {"step_30"}
    assert (finished.run / "step_30" / "committed.json").exists()
    assert (finished.run / "metrics.jsonl").exists()
    assert removal.bytes > 0


def test_newest_goes_only_when_told(finished):
    retention.remove(retention.choose(finished.results, newest=True))
    assert finished.folders() == set()


def test_choosing_removes_nothing(finished):
    before = finished.folders()
    retention.choose(finished.results)
    assert finished.folders() == before


def test_unverified_model_refuses(finished):
    finished.verify(figures={"checks": {"names": {"passed": False, "detail": ""}}})
    with pytest.raises(GateError, match="not verified: names"):
        retention.choose(finished.results)
    (finished.results / "receipts" / "verify_model.json").unlink()
    with pytest.raises(BadInputError, match="no receipt of verify_model"):
        retention.choose(finished.results)


def test_model_of_an_older_checkpoint_or_of_an_earlier_training_refuses(finished):
    finished.verify(step=20)
    with pytest.raises(GateError, match="made from"):
        retention.choose(finished.results)
    finished.verify(finished="2025-12-31")
    with pytest.raises(GateError, match="made from"):
        retention.choose(finished.results)


def test_run_with_a_newer_checkpoint_refuses(finished):
    write_checkpoint(finished.run, 40)
    with pytest.raises(GateError, match="newer checkpoint than the verified one, step_40"):
        retention.choose(finished.results)


def test_missing_model_refuses(finished):
    (finished.results / "model").rmdir()
    with pytest.raises(BadInputError, match="which has gone"):
        retention.choose(finished.results)


def test_run_in_use_is_left_alone(finished):
    removal = retention.choose(finished.results)
    with lock.hold(finished.run), pytest.raises(BadInputError, match="in use"):
        retention.remove(removal)
    assert "step_10" in finished.folders()


def test_command_shows_first_and_frees_on_demand(finished, project):
    command = [sys.executable, str(project / "workflow/scripts/clean.py"), str(finished.results)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "would remove" in shown
    assert "nothing was removed: add --free" in shown
    assert "step_10" in finished.folders()
    freed = subprocess.run([*command, "--free"], capture_output=True, text=True, check=True).stdout
    assert f"keep  {finished.run / 'step_30'}" in freed
    assert finished.folders() == {"step_30"}


def test_refusal_is_exit_code_3_and_a_message(finished, project):
    finished.verify(step=20)
    command = [sys.executable, str(project / "workflow/scripts/clean.py"), str(finished.results), "--free"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert done.stderr.startswith("error: the verified model was made from")
    assert "step_10" in finished.folders()
