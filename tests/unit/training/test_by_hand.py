"""Promises about the training script, by hand and in the workflow: it requeues itself where that helps, only there."""

import datetime
import os
import subprocess
import sys

import pytest

from deepseek_sft.slurm import sbatch
from deepseek_sft.slurm.sbatch import Allocation

FAKES = {
    # Runs the one task; the rest of srun's options are of no interest.
    "srun": 'while [ "${1#--}" != "$1" ]; do shift; done; exec "$@"',
    "squeue": """
if [ "${SILENT:-0}" -gt "$(cat asked 2> /dev/null || echo 0)" ]; then
    echo $(($(cat asked 2> /dev/null || echo 0) + 1)) > asked
    echo 'slurm_load_jobs error: Unable to contact slurm controller (connect failure)' >&2
    exit 1
fi
case "$*" in *%e*) echo "${TIMES:-N/A N/A}" && exit ;; esac
comment=
case "$*" in *%k*) comment=" ${COMMENT:-(null)}" ;; esac
echo "${JOB_STATE:-RUNNING}$comment"
""",
    "sleep": "true",
    "scancel": 'echo "$@" >> signals',
    "scontrol": 'echo "$@" >> "$REQUEUES"; exit "${REQUEUE_CODE:-0}"',
    # Stands for train.py: commits a checkpoint where asked to, and ends with a code.
    "python": """
folder=results/r1/train/runs/a/step_9
case $1 in *preflight.py) echo preflight; eval "${PREFLIGHT:-}"; exit ;; esac
echo "ended:$DEEPSEEK_SFT_ENDED_JOBS"
eval "${TRAINING:-}"
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
        "spare_nodes": 0,
    }
    script = tmp_path / "train.sbatch"

    def write(extra="", preflight=False):
        allocation = Allocation(runtime=60, extra=extra)
        script.write_text(sbatch.render("train", allocation, context | {"preflight": preflight}))

    write()

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

    run.write, run.log = write, tmp_path / "logs/r1/train/77-1.log"
    run.folder, run.marker = tmp_path, tmp_path / "logs/r1/train/do-not-retry"
    return run


def test_a_stop_that_saved_is_requeued(by_hand):
    assert by_hand(4, SLURM_RESTART_COUNT="30") == (4, True)


def test_a_job_that_slurm_does_not_requeue_keeps_its_exit_code(by_hand):
    assert by_hand(4, REQUEUE_CODE="1") == (4, True)
    assert "start it again" in (by_hand.folder / "logs/r1/train/77-1.log").read_text()


def test_inside_the_workflow_its_own_job_is_requeued_and_no_other(by_hand):
    assert by_hand(4, "--in-workflow", "1", COMMENT="rule_train r1 0123") == (4, True)
    assert by_hand(4, "--in-workflow", "1", COMMENT="whole-workflow") == (4, False)


def test_a_controller_that_is_busy_when_a_requeue_is_asked_for_is_waited_for(by_hand):
    assert by_hand(4, SILENT="5") == (4, True)


@pytest.mark.parametrize("code", [0, 2, 3])
def test_what_a_retry_cannot_help_is_not_requeued(by_hand, code):
    assert by_hand(code) == (code, False)


def test_the_stop_file_stops_for_good(by_hand):
    (by_hand.folder / "results/r1/train").mkdir(parents=True)
    (by_hand.folder / "results/r1/train/stop").touch()
    assert by_hand(4) == (4, False)
    assert "told to stop" in by_hand.marker.read_text()


def test_a_stop_file_made_while_the_job_waited_runs_nothing(by_hand):
    by_hand.write(preflight=True)
    (by_hand.folder / "results/r1/train").mkdir(parents=True)
    (by_hand.folder / "results/r1/train/stop").touch()
    assert by_hand(0) == (4, False)
    assert "preflight" not in by_hand.log.read_text()
    assert "training with" not in by_hand.log.read_text()
    assert "told to stop" in by_hand.marker.read_text()


def test_a_job_that_has_ended_is_told_to_programs_that_cannot_ask(by_hand):
    for number, job in enumerate((70, 71)):
        run = by_hand.folder / f"results/r1/train/runs/{number}"
        run.mkdir(parents=True)
        (run / "lock.json").write_text(f'{{"host": "node9", "job_id": "{job}", "pid": 5}}')
    by_hand(0, JOB_STATE="NODE_FAIL")
    assert "ended: 70 71" in (by_hand.folder / "logs/r1/train/77-1.log").read_text()
    by_hand(0, JOB_STATE="RUNNING", SLURM_RESTART_COUNT="1")
    assert "ended: 70" not in (by_hand.folder / "logs/r1/train/77-2.log").read_text()


@pytest.mark.parametrize("code", [1, 4, 5, 137, 143])
def test_three_attempts_in_a_row_that_save_nothing_end_it(by_hand, code):
    def attempt(restart, **variables):
        return by_hand(code, SLURM_RESTART_COUNT=str(restart), **variables)

    assert [attempt(restart)[1] for restart in range(3)] == [True, True, False]
    assert "saved nothing new" in by_hand.marker.read_text()
    assert attempt(0) == (code, True), "a new job counts anew"
    assert attempt(1) == (code, True)
    assert attempt(2, COMMITS="yes") == (code, True), "what gets further is tried again"
    assert [attempt(restart)[1] for restart in range(3, 6)] == [True, True, False]


def test_attempts_that_save_nothing_are_counted_over_retries_of_the_workflow(by_hand):
    own = {"COMMENT": "rule_train r1 0123", "REQUEUE_CODE": "1"}
    for number in ("1", "2"):
        by_hand(5, "--in-workflow", number, **own)
        assert not by_hand.marker.exists()
    by_hand(5, "--in-workflow", "3", **own)
    assert by_hand.marker.exists()


def test_a_cancelled_job_stays_cancelled(by_hand):
    assert by_hand(143, JOB_STATE="COMPLETING") == (143, False)


def test_every_attempt_has_a_log_of_its_own(by_hand):
    by_hand(4)
    by_hand(0, SLURM_RESTART_COUNT="1")
    logs = sorted((by_hand.folder / "logs/r1/train").iterdir())
    assert [path.name for path in logs] == ["77-1.log", "77-2.log"]
    assert "--stop-file results/r1/train/stop" in logs[1].read_text()


# ---- the warning before the time limit


def times(begun, left):
    """What squeue says of a job's start and limit, for the seconds from and to them."""
    now = datetime.datetime.now()
    ends = (now - datetime.timedelta(seconds=begun), now + datetime.timedelta(seconds=left))
    return " ".join(f"{end:%Y-%m-%dT%H:%M:%S}" for end in ends)


def test_a_warning_during_preflight_starts_no_training(by_hand):
    by_hand.write(preflight=True)
    assert by_hand(0, PREFLIGHT="kill -USR1 $PPID") == (4, True)
    assert "told to stop before it began" in by_hand.log.read_text()
    assert "training with" not in by_hand.log.read_text()


def test_a_warning_does_not_hide_what_preflight_found(by_hand):
    by_hand.write(preflight=True)
    assert by_hand(0, PREFLIGHT="kill -USR1 $PPID; exit 3") == (3, False)


def test_a_warning_that_came_while_nothing_ran_starts_no_training(by_hand):
    by_hand.write("--signal=USR1@1800 --exclusive", preflight=True)
    assert by_hand(0, TIMES=times(1900, 1700)) == (4, True)
    assert "preflight" not in by_hand.log.read_text()
    assert "training with" not in by_hand.log.read_text()


@pytest.mark.parametrize("told", [(100, 3500), (10, 1700), "2026-01-01T00:00:00 NONE", ""])
def test_a_job_that_is_not_warned_yet_or_has_other_limits_by_hand_trains(by_hand, told):
    by_hand.write("--signal=USR1@1800")
    assert by_hand(0, TIMES=told if isinstance(told, str) else times(*told)) == (0, False)
    assert "training with" in by_hand.log.read_text()


@pytest.mark.parametrize("killed", ["PREFLIGHT", "TRAINING"])
def test_a_warning_that_ends_a_step_which_does_not_listen_yet_is_a_warning(by_hand, killed):
    by_hand.write(preflight=True)
    assert by_hand(0, **{killed: "exit 138"}) == (4, True)


def test_from_the_warning_on_it_is_repeated(by_hand):
    by_hand.write("--signal USR1@1800")
    until_told = 'until [ "$(wc -l < signals)" -ge 2 ]; do /usr/bin/sleep 0.1; done 2> /dev/null'
    assert by_hand(4, TIMES=times(100, 1802), TRAINING=until_told) == (4, True)
    assert set((by_hand.folder / "signals").read_text().splitlines()) == {"--quiet --signal=USR1 77"}


def test_a_warning_is_repeated_until_training_listens(by_hand):
    """The signal reaches the helper beside the program while the program ignores it."""
    program = "import signal, sys, time; time.sleep(0.5); signal.signal(signal.SIGUSR1, lambda *_: sys.exit(4))"
    program += "; time.sleep(60)"
    deaf = f"pkill -USR1 -P $$; exec {sys.executable} -c '{program}'"
    assert by_hand(0, TRAINING=deaf) == (4, True)


@pytest.mark.parametrize(
    ("extra", "seconds"),
    [
        ("--signal=USR1@3600 --exclusive", 3600),
        ("--signal SIGUSR1@90", 90),
        ("--signal=R:10@90", 90),
        ("--signal=USR1", 60),
        ("--signal=TERM@90", None),
        ("--exclusive", None),
    ],
)
def test_the_seconds_of_a_warning_are_read_from_the_options(extra, seconds):
    assert Allocation(runtime=120, extra=extra).warning_s() == seconds
