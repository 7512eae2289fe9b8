"""The status of a run on one screen, from folders as a running experiment leaves them and squeue's words."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from unit.report import results as made
from unit.report.running import BEFORE_TRAIN, Site

from deepseek_sft.cluster_jobs import holders
from deepseek_sft.cluster_jobs.record import Record, Rule
from deepseek_sft.errors import BadInputError
from deepseek_sft.report import slurm_jobs, status
from deepseek_sft.training import local_tier

REPOSITORY = Path(__file__).resolve().parents[3]


@pytest.fixture
def site(tmp_path, monkeypatch):
    return Site(tmp_path, monkeypatch)


def test_training_under_slurm_shows_everything_that_is_asked_for(site):
    site.training(steps=60, total=240)
    site.log("train", "55", "0: [node 0 rank 0] step 60/240\n")
    site.squeue(
        "55|RUNNING|rule_train|node[1-2]|gpu|26:10|3-21:33:50|None", "56|RUNNING|other|node9|gpu|1:00|1:00|None"
    )
    rows = site.screen()
    assert "✓ prepare_model" in rows["stages"] and "▶ train" in rows["stages"] and "– smoke_test" in rows["stages"]
    assert rows["stage"].startswith("train, running for")
    assert rows["job"] == "55 RUNNING on node[1-2], partition gpu, 3-21:33:50 of its time limit left"
    assert rows["step"] == "60 of 240 (25.0 %), epoch 0.500"
    assert rows["loss"].startswith(f"{made.line(60)['loss']:.4f}, ") and "mean of the last 10" in rows["loss"]
    assert rows["speed"].startswith("4,3") and "0.75 s a step" in rows["speed"]
    assert rows["time left"] == "2 min 15 s to the last step"
    assert "step_25, 1.00 GiB" in rows["checkpoint"] and "step_50 being written" in rows["checkpoint"]
    assert "more checkpoints" in rows["disk left"]
    assert rows["log"].endswith("step 60/240")
    assert "node-local" not in rows


def test_a_newer_checkpoint_on_the_nodes_own_disks_is_told_beside_the_one_on_the_shared_storage(site):
    site.training(steps=60, total=240)
    run = next(site.results.glob("train/runs/*"))
    local_tier.note(run, 55, 1 << 30, 2.0, time.time() - 60)
    text = site.screen()["node-local"]
    assert text.startswith("step_55 on the nodes' own disks, 1.00 GiB and as much copied, 1 min ")
    local_tier.note(run, 20, 1 << 30, 2.0, time.time())
    assert "node-local" not in site.screen(), "the shared storage has a newer one"


def test_run_that_outlives_its_job_says_so(site):
    site.training(steps=60, total=240)
    site.log("train", "55", "step 60/240\n")
    site.squeue("55|RUNNING|rule_train|node1|gpu|26:10|1:30|None")
    left = site.screen()["time left"]
    assert left == "2 min 15 s to the last step; the job has 1 min 30 s: it will save and stop before, and be resumed"


def test_run_that_saves_its_last_step_has_no_time_left(site):
    site.training(steps=60, total=60)
    site.log("train", "55", "step 60/60\n")
    site.squeue("55|RUNNING|rule_train|node1|gpu|26:10|1:30|None")
    assert site.screen()["time left"] == "none: the last step is done"


@pytest.mark.parametrize(
    ("text", "seconds"), [("1:30", 90), ("2:01:30", 7290), ("3-21:33:50", 336830), ("UNLIMITED", None), ("", None)]
)
def test_times_of_squeue_are_understood(text, seconds):
    assert slurm_jobs.job_seconds(text) == seconds


def test_conversion_shows_its_files(site):
    made.write_results(site.root, (*BEFORE_TRAIN, "train"))
    site.log("convert_checkpoint", "58", "model-00012-of-00163.safetensors: 4.63 GiB, 12/163\n")
    site.squeue("58|RUNNING|rule_convert_checkpoint|node1|cpu|26:10|1:30:00|None")
    rows = site.screen()
    assert rows["progress"] == "12 of 163"
    assert rows["trained"] == "120 steps, loss 11.79 → 0.0421"


def test_queued_job_says_why_it_waits(site):
    made.write_results(site.root, BEFORE_TRAIN)
    site.squeue("71|PENDING|rule_train||gpu|0:00|4-00:00:00|Resources")
    rows = site.screen()
    assert "… train" in rows["stages"]
    assert rows["stage"] == "train, queued"
    assert rows["job"] == "71 PENDING (Resources), partition gpu"


def test_retry_that_waits_is_not_shown_as_its_ended_attempt(site):
    site.training(steps=10, total=240)
    site.log("train", "55", "error: node2 died\n")
    site.squeue("71|PENDING|rule_train||gpu|0:00|4-00:00:00|BeginTime")
    assert site.screen()["stage"] == "train, queued: an earlier attempt ended"


def test_job_of_another_project_is_not_shown(site):
    made.write_results(site.root, BEFORE_TRAIN)
    site.squeue("71|PENDING|rule_train||gpu|0:00|4-00:00:00|Resources")
    rows = (site.root / "bin" / "rows").read_text()
    (site.root / "bin" / "rows").write_text(rows.replace(str(site.root), "/elsewhere"))
    assert site.screen()["stage"] == "train is next; nothing runs"


def test_job_that_squeue_no_longer_knows_has_stopped(site):
    site.training(steps=10, total=240)
    site.log("train", "55", "error: training crashed on node 1\n")
    site.squeue()
    rows = site.screen()
    assert "■ train" in rows["stages"]
    assert rows["stage"] == "train, stopped"
    assert "training crashed on node 1" in rows["log"]
    assert "time left" not in rows


def test_stage_that_was_given_up_is_shown_with_its_last_line(site):
    made.write_results(site.root, (*BEFORE_TRAIN, "train", "convert_checkpoint"))
    site.log("verify_model", "60", "FAILED finite: 2 tensors hold NaN\n")
    (site.logs / "verify_model" / "do-not-retry").write_text("attempt 1 ended with exit code 3\n")
    site.squeue()
    rows = site.screen()
    assert rows["stage"] == "verify_model, failed: attempt 1 ended with exit code 3"
    assert "2 tensors hold NaN" in rows["log"]


def test_without_slurm_the_process_tells_that_a_stage_runs(site):
    site.training(steps=60, total=240)
    site.no_squeue()
    command = ["/bin/sh", "-c", "read line", "workflow/scripts/stage.sh"]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        site.log("train", f"local-{process.pid}", "step 60\n", age=3600)
        rows = site.screen()
        process.kill()
    assert rows["stage"].startswith("train, running")
    assert rows["job"] == "none; runs on this machine"
    assert rows["time left"] == "2 min 15 s to the last step"
    assert rows["attention"].startswith("no line for 1 h 0 min")
    assert site.screen()["stage"] == "train, stopped"


def test_where_nothing_can_be_asked_a_fresh_log_tells_that_a_stage_seems_to_run(site):
    site.training(steps=60, total=240)
    site.squeue(code=1)
    site.log("train", "55", "step 60\n", age=5)
    rows = site.screen()
    assert rows["stage"].startswith("train, seems to run")
    assert rows["job"].startswith("unknown: squeue does not answer")
    site.log("train", "55", "step 60\n", age=3600)
    assert site.screen()["stage"] == "train, stopped"


def test_snakemake_between_two_jobs_is_seen(site):
    made.write_results(site.root, BEFORE_TRAIN)
    site.squeue()
    assert site.screen()["stage"].endswith("nothing runs")
    places = {"project": str(site.root), "logs": str(site.logs), "path_variable": "", "command": "snakemake"}
    rules = {"train": Rule(params="", inputs=[], receipt="r.json", shared=True)}
    more = {"experiment": "demo", "accounting": False, "rules": rules, "locks": {}}
    record = Record(site.logs / "snakemake/here-1.json", holders.own(), **places, **more)
    record.path.parent.mkdir()
    record.write()
    rows = site.screen()
    assert rows["stage"].endswith("is next; snakemake is about to start it")
    assert rows["snakemake"].startswith(f"process {os.getpid()} on ")
    dead = {**holders.own(), "started": "0"}
    Record(record.path, dead, **places, **more).write()
    assert "snakemake" not in site.screen()


def test_training_before_its_first_step_says_so(site):
    site.training(steps=0, total=240, saved=None)
    site.log("train", "55", "loading\n")
    site.squeue("55|RUNNING|rule_train|node1|gpu|1:00|1:00:00|None")
    rows = site.screen()
    assert rows["step"] == "none of 240 yet: loading the model, or the first step"
    assert rows["checkpoint"] == "none yet"


def test_finished_experiment_is_all_done(site):
    made.write_results(site.root)
    site.squeue()
    rows = site.screen()
    assert rows["stage"] == "all done"
    assert rows["trained"] == "120 steps, loss 11.79 → 0.0421"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"step": 1}', '{"step": 1, "loss": "x", "seconds": null}'])
def test_torn_files_of_a_run_do_not_stop_the_screen(site, content):
    site.training(steps=10, total=240)
    for name in ("metrics.jsonl", "settings.json", "step_25/committed.json"):
        (site.run / name).write_text(content)
    site.log("train", "55", "x\n")
    site.squeue("55|RUNNING|rule_train|node1|gpu|1:00|1:00:00|None", "garbage")
    assert site.screen()["stage"].startswith("train, running")


def test_looking_writes_nothing(site):
    site.training(steps=10, total=240)
    site.log("train", "55", "x\n")
    site.squeue()
    before = {path: path.stat().st_mtime_ns for path in site.root.rglob("*")}
    site.screen()
    assert {path: path.stat().st_mtime_ns for path in site.root.rglob("*")} == before


def test_experiment_active_last_is_chosen(site):
    made.write_results(site.root)
    other = site.root / "logs" / "other"
    other.mkdir()
    (other / "plan.log").write_text("")
    os.utime(other / "plan.log", (time.time() + 5, time.time() + 5))
    (site.logs / "status.log").write_text("")  # looking at an experiment does not make it active
    os.utime(site.logs / "status.log", (time.time() + 9, time.time() + 9))
    (site.root / "logs" / "envs").mkdir()
    (site.root / "logs" / "envs" / "train.log").write_text("")
    assert status.newest_experiment(site.root / "results", site.root / "logs").name == "other"


def test_program_shows_the_screen_and_refuses_what_is_no_experiment(site):
    made.write_results(site.root)
    script = REPOSITORY / "workflow/scripts/status.py"

    def run(*words):
        return subprocess.run(
            [sys.executable, script, *words], cwd=site.root, capture_output=True, text=True, check=False
        )

    shown = run("results/demo")
    assert shown.returncode == 0, shown.stderr
    assert "all done" in shown.stdout
    refused = run("results/dmo")
    assert refused.returncode == 2
    assert "it has not started" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_nothing_started_is_bad_input(tmp_path):
    with pytest.raises(BadInputError, match="no experiment has started"):
        status.newest_experiment(tmp_path / "results", tmp_path / "logs")
