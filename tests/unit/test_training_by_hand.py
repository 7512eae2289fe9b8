"""Promises about the training script submitted by hand: it requeues itself when that helps, and only then."""

import os
import subprocess

import pytest

from deepseek_sft import slurm
from deepseek_sft.slurm import Allocation

FAKES = {
    # Runs the one task; the rest of srun's options are of no interest.
    "srun": 'while [ "${1#--}" != "$1" ]; do shift; done; exec "$@"',
    "squeue": 'echo "${JOB_STATE:-RUNNING}"',
    "scontrol": 'echo "$@" >> "$REQUEUES"',
    # Stands for train.py: commits a checkpoint where asked to, and ends with a code.
    "python": """
folder=results/r1/train/runs/a/step_9
if [ -n "${COMMITS:-}" ]; then mkdir -p $folder; touch $folder/committed.json; fi
echo "training with $*"
exit "$CODE"
""",
}


@pytest.fixture
def by_hand(tmp_path):
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, text in FAKES.items():
        (tools / name).write_text(f"#!/bin/bash\n{text}\n")
        (tools / name).chmod(0o755)
    context = {
        "project": str(tmp_path),
        "experiment": "r1",
        "results": "results/r1",
        "logs": "logs/r1",
        "python": str(tools / "python"),
        "activate": "",
        "accelerator": "cpu",
        "environment": {},
        "ranks_per_node": 1,
        "preflight": False,
    }
    script = tmp_path / "train.sbatch"
    script.write_text(slurm.render("train", Allocation(), context))

    def run(code, *arguments, **variables):
        """Exit code of the script, and whether it asked for a requeue."""
        environment = {
            "PATH": f"{tools}:{os.environ['PATH']}",
            "SLURM_JOB_ID": "77",
            "REQUEUES": str(tmp_path / "requeues"),
            "CODE": str(code),
            **variables,
        }
        command = ["bash", str(script), *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        requeues = tmp_path / "requeues"
        asked = requeues.exists() and requeues.read_text() == "requeue 77\n"
        requeues.unlink(missing_ok=True)
        return done.returncode, asked

    run.folder = tmp_path
    return run


def test_a_stop_that_saved_is_requeued(by_hand):
    assert by_hand(4, SLURM_RESTART_COUNT="30") == (4, True)


def test_inside_the_workflow_nothing_is_requeued(by_hand):
    assert by_hand(4, "--in-workflow") == (4, False)


@pytest.mark.parametrize("code", [0, 2, 3])
def test_what_a_retry_cannot_help_is_not_requeued(by_hand, code):
    assert by_hand(code) == (code, False)


def test_the_stop_file_stops_for_good(by_hand):
    (by_hand.folder / "results/r1/train").mkdir(parents=True)
    (by_hand.folder / "results/r1/train/stop").touch()
    assert by_hand(4) == (4, False)


@pytest.mark.parametrize("code", [5, 137, 143])
def test_a_crash_is_requeued_while_it_gets_further(by_hand, code):
    assert by_hand(code, SLURM_RESTART_COUNT="0") == (code, True)
    assert by_hand(code, SLURM_RESTART_COUNT="1") == (code, False)
    assert by_hand(code, SLURM_RESTART_COUNT="2", COMMITS="yes") == (code, True)


def test_a_cancelled_job_stays_cancelled(by_hand):
    assert by_hand(143, JOB_STATE="COMPLETING") == (143, False)


def test_every_attempt_has_a_log_of_its_own(by_hand):
    by_hand(4)
    by_hand(0, SLURM_RESTART_COUNT="1")
    logs = sorted((by_hand.folder / "logs/r1/train").iterdir())
    assert [path.name for path in logs] == ["77-1.log", "77-2.log"]
    assert "--stop-file results/r1/train/stop" in logs[1].read_text()
