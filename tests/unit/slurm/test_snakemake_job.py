"""Promises about workflow/snakemake.sbatch, with scripts in place of Snakemake and Slurm."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[3] / "workflow/snakemake.sbatch"
FAKES = {
    "snakemake": 'trap "echo interrupted > ended; exit 1" INT; echo > started; until [ -e done ]; do sleep 0.1; done',
    # A controller that is away at first.
    "scontrol": 'echo "$@" >> asked; [ "$(wc -l < asked)" -ge 3 ]',
    "sleep": 'exec /bin/sleep "$(if [ "$1" = 5 ]; then echo 0.1; else echo "$1"; fi)"',
}


@pytest.fixture
def job(tmp_path: Path):
    for name, text in FAKES.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    own = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "77"}
    process = subprocess.Popen(
        ["bash", SCRIPT],
        cwd=tmp_path,
        env=own,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        # A shell cannot trap what was ignored when it began, as in tests that were started in the background.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not (tmp_path / "started").exists():
        time.sleep(0.05)
    yield process, tmp_path
    (tmp_path / "done").touch()  # ends what stands for Snakemake, also where the script above it has gone
    process.kill()


def test_before_its_limit_it_leaves_jobs_alone_and_asks_until_it_is_requeued(job) -> None:
    process, folder = job
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGKILL
    assert (folder / "asked").read_text() == "requeue 77\n" * 3
    assert not (folder / "ended").exists(), "an interrupted Snakemake would cancel its jobs"


def test_an_interruption_reaches_snakemake(job) -> None:
    process, folder = job
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 1
    assert (folder / "ended").read_text() == "interrupted\n"
    assert not (folder / "asked").exists()


def test_its_exit_code_is_snakemakes(job) -> None:
    process, folder = job
    (folder / "done").touch()
    process.communicate(timeout=60)
    assert process.returncode == 0
