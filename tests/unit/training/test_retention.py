"""Promises of the `clean` target: what goes, what stays, and when nothing may go."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from finished_run import Finished
from training_helpers import write_checkpoint

from deepseek_sft.errors import BadInputError, GateError
from deepseek_sft.training import lock, retention


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
    finished.file.unlink()
    with pytest.raises(GateError, match="has gone since it was verified"):
        retention.choose(finished.results)
    finished.model.rmdir()
    with pytest.raises(BadInputError, match="which has gone"):
        retention.choose(finished.results)


def test_model_that_changed_or_was_converted_again_since_it_was_verified_refuses(finished, monkeypatch):
    finished.convert(finished="2026-01-04")
    with pytest.raises(GateError, match="converted again after it was verified"):
        retention.choose(finished.results)
    finished.convert(fingerprint="another")
    with pytest.raises(GateError, match="converted again after it was verified"):
        retention.choose(finished.results)
    finished.convert()
    finished.file.write_bytes(b"strange")
    with pytest.raises(GateError, match="has changed since it was verified"):
        retention.choose(finished.results)
    monkeypatch.setattr(retention, "HASHED", 0)  # as a large file is judged, by its time
    with pytest.raises(GateError, match="has changed since it was verified"):
        retention.choose(finished.results)
    os.utime(finished.file, (0, 0))
    assert retention.choose(finished.results).items


def test_dry_run_says_what_would_go_or_why_nothing_may(finished):
    assert "would remove" in retention.preview(finished.results)
    finished.verify(step=20)
    assert retention.preview(finished.results).startswith("would refuse: the verified model was made from")


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
