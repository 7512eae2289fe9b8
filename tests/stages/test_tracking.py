"""Promises of `make track`: MLflow and Weights & Biases, by their own libraries, hold what the run's files hold."""

import json
import os
import sqlite3
import subprocess
from pathlib import Path

import pytest
import yaml
from unit.report import results as made

BUILT = Path(__file__).resolve().parents[2] / ".envs/track/bin/python"
pytestmark = [
    pytest.mark.stage("track"),
    pytest.mark.skipif(not BUILT.exists(), reason="optional: python3 workflow/scripts/build_env.py track"),
]
SECRET, PLACE = "hunter2", "/somewhere/private"


@pytest.fixture(scope="module")
def tracked(project, tmp_path_factory):
    """An experiment's folder, twice given to both trackers, and what was said each time."""
    folder = tmp_path_factory.mktemp("tracked")
    results = made.write_results(folder)
    config = yaml.safe_load((results / "config.yaml").read_text())
    trackers = {"mlflow": {"uri": None, "experiment": "ours"}, "wandb": {"project": "ours", "entity": None}}
    (results / "config.yaml").write_text(json.dumps(config | {"tracking": trackers}))
    run = next((results / "train/runs").iterdir())
    settings = {"learning_rate": 5e-3, "environment": {"HF_TOKEN": SECRET}, "secrets_file": PLACE}
    (run / "settings.json").write_text(json.dumps({"settings": settings, "base": PLACE}))
    command = [str(BUILT), str(project / "workflow/scripts/track.py"), str(results)]
    said = []
    for _ in range(2):
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=folder, env=os.environ | {"HOME": str(folder)}
        )
        assert done.returncode == 0, done.stderr
        said.append(done.stderr)
    return results, run.name, said


def test_mlflow_holds_every_step_once_settings_and_figures(tracked):
    results, run_id, _ = tracked
    with sqlite3.connect(results / "tracking/mlflow.db") as database:
        losses = database.execute("select step, value from metrics where key = 'loss' order by step").fetchall()
        assert losses == [(step, made.line(step)["loss"]) for step in range(1, made.STEPS + 1)]
        assert database.execute("select value from tags where key = 'deepseek_sft.run_id'").fetchall() == [(run_id,)]
        assert database.execute("select value from params").fetchall() == [("0.005",)]
        assert database.execute("select value from metrics where key = 'train/steps'").fetchone()
        assert database.execute("select status from runs").fetchall() == [("FINISHED",)]


def test_wandb_holds_the_run_under_its_own_id_in_one_folder_that_can_be_sent(tracked):
    results, run_id, said = tracked
    (folder,) = (results / "tracking/wandb").glob("offline-run-*")
    assert folder.name.endswith(run_id)
    assert f"wandb sync {folder}" in said[-1]
    content = (folder / f"run-{run_id}.wandb").read_bytes()
    assert content.count(b"grad_norm") >= made.STEPS
    assert repr(made.line(made.STEPS)["loss"]).encode() in content


def test_no_secret_or_place_reaches_a_tracker(tracked):
    results, _, _ = tracked
    for path in (results / "tracking").rglob("*"):
        if path.is_file() and not path.is_symlink() and path.parent.name != "logs":
            content = path.read_bytes()
            for word in (SECRET, PLACE, str(results)):
                assert word.encode() not in content, (path, word)
