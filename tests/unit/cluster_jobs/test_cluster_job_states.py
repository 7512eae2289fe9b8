"""States of jobs as Snakemake's Slurm plugin sees them, with scripts in place of Slurm's commands."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import scripted_slurm
from scripted_slurm import BUSY, CALL, Site

from deepseek_sft.cluster_jobs import commands, record

PROJECT = Path(__file__).resolve().parents[3]
site = scripted_slurm.site


def states(site: Site, capsys, name: str = "squeue") -> dict[str, str]:
    arguments = ["--format=%i|%T", "--states=all", "--noheader", "--name", "run-1"]
    if name == "sacct":
        arguments = ["-X", "--parsable2", "--noheader", "--format=JobIdRaw,State", "--name", "run-1"]
    assert commands.states(site.record, name, "run-1", arguments) == 0
    return dict(line.split("|") for line in capsys.readouterr().out.splitlines())


@pytest.mark.parametrize("name", ["squeue", "sacct"])
def test_states_are_asked_of_squeue_by_job_also_where_the_plugin_turns_to_sacct(site: Site, capsys, name) -> None:
    site.record.note("78", "train", "run-1")
    site.tool("squeue", "echo '78|RUNNING'; echo '12|RUNNING'")
    site.tool("sacct", "echo 'Slurm accounting storage is disabled' >&2; exit 1")
    assert states(site, capsys, name) == {"78": "RUNNING"}


def test_with_slurmdbd_sacct_answers_and_squeue_where_it_is_away(site: Site, capsys) -> None:
    site.record = site.new_record(accounting=True)
    site.record.note("78", "train", "run-1")
    site.tool("squeue", "echo '78|RUNNING'")
    site.tool("sacct", "case \"$*\" in *'--jobs 78'*) echo '78|CANCELLED by 1000' ;; esac")
    assert states(site, capsys, "sacct") == {"78": "CANCELLED"}
    site.tool("sacct", "exit 1")
    assert states(site, capsys, "sacct") == {"78": "RUNNING"}


def test_a_controller_that_is_away_for_a_poll_is_no_news_of_the_jobs(site: Site, capsys, monkeypatch) -> None:
    monkeypatch.setattr(commands, "POLL_PATIENCE_S", 20.5)
    site.record.note("78", "train", "run-1")
    site.tool("squeue", BUSY)
    assert commands.states(site.record, "squeue", "run-1", []) == 1
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("receipt", "state"), [(True, "COMPLETED"), (False, "FAILED")])
def test_a_job_that_slurm_has_forgotten_has_ended_as_its_receipt_says(site: Site, capsys, monkeypatch, receipt, state):
    site.record.note("78", "train", "run-1")
    if receipt:
        (site.folder / "receipt.json").touch()
    assert states(site, capsys) == {}, "for a minute it may only be late"
    now = time.time()
    monkeypatch.setattr(commands.time, "time", lambda: now + commands.SETTLED_S + 1)
    assert states(site, capsys) == {"78": state}


@pytest.mark.parametrize("state", ["PREEMPTED", "NODE_FAIL"])
def test_a_lost_job_that_does_not_start_again_has_failed(site: Site, capsys, monkeypatch, state) -> None:
    site.record.note("78", "train", "run-1")
    site.queue(f"78|{state}")
    assert states(site, capsys) == {}
    site.queue("78|PENDING")
    assert states(site, capsys) == {"78": "PENDING"}
    site.queue(f"78|{state}")
    now = time.time()
    assert states(site, capsys) == {}
    monkeypatch.setattr(commands.time, "time", lambda: now + commands.SETTLED_S + 1)
    assert states(site, capsys) == {"78": "FAILED"}


def test_a_job_that_somebody_cancelled_is_not_submitted_again(site: Site, capsys) -> None:
    site.record.note("78", "train", "run-1")
    site.queue("78|CANCELLED")
    assert states(site, capsys) == {"78": "CANCELLED"}
    assert "78 was cancelled" in site.record.marker("train").read_text()


def test_calls_of_another_form_reach_the_real_command(site: Site) -> None:
    site.tool("squeue", 'echo "real $*"')
    folder = PROJECT / "workflow/slurm_commands"
    own = {record.VARIABLE: str(site.record.path), record.PYTHON: sys.executable, "PATH": f"{folder}:{site.path}"}
    done = subprocess.run(["squeue", "--me"], env=own, capture_output=True, text=True, check=True)
    assert done.stdout == "real --me\n"
    site.tool("sbatch", "env > seen; echo 9")
    done = subprocess.run(["sbatch", *CALL], env=own, capture_output=True, text=True, check=True)
    assert done.stdout == "9\n"
    seen = (site.folder / "seen").read_text()
    assert "slurm_commands" not in seen
    assert "DEEPSEEK_SFT" not in seen, "a job inherits the environment"


def poll(site: Site, python: str) -> subprocess.CompletedProcess:
    """The plugin's call, through the folder that stands before Slurm's in PATH."""
    folder = PROJECT / "workflow/slurm_commands"
    own = {record.VARIABLE: str(site.record.path), record.PYTHON: python, "PATH": f"{folder}:{site.path}"}
    command = ["squeue", "--format=%i|%T", "--states=all", "--noheader", "--name", "run-1"]
    return subprocess.run(command, env=own, capture_output=True, text=True, check=False)


def test_a_poll_that_brings_nothing_new_starts_no_python(site: Site) -> None:
    site.record.note("78", "train", "run-1")
    site.record.note("79", "report", "run-1")
    site.record.note("80", "report", "run-0")
    site.queue("12|RUNNING", "78|RUNNING", "79|PENDING", "80|RUNNING")
    assert poll(site, "/bin/false").stdout == poll(site, sys.executable).stdout == "78|RUNNING\n79|PENDING\n"


@pytest.mark.parametrize("rows", [["78|NODE_FAIL"], ["78|FAILED", "79|RUNNING"], ["79|RUNNING"], []])
def test_a_poll_that_may_bring_news_is_judged(site: Site, rows: list[str]) -> None:
    for job in ("78", "79"):
        site.record.note(job, "train", "run-1")
    site.queue(*rows)
    assert poll(site, "/bin/false").returncode == 1


def test_a_poll_while_a_loss_is_in_doubt_is_judged(site: Site) -> None:
    """So that the doubt about a job that runs again is forgotten."""
    site.record.note("78", "train", "run-1")
    site.queue("78|NODE_FAIL")
    assert poll(site, sys.executable).stdout == ""
    site.queue("78|RUNNING")
    assert poll(site, "/bin/false").returncode == 1
    assert poll(site, sys.executable).stdout == "78|RUNNING\n"


def test_a_poll_that_slurm_does_not_answer_is_asked_again(site: Site) -> None:
    site.record.note("78", "train", "run-1")
    site.tool("squeue", f"echo x >> tries; [ $(wc -l < tries) -gt 2 ] || {{ {BUSY}; }}; echo '78|RUNNING'")
    assert poll(site, sys.executable).stdout == "78|RUNNING\n"
