"""Promises about submitting a lasting deployment, with scripts in place of Slurm's commands."""

import json
from pathlib import Path

import pytest

from deepseek_sft import receipts
from deepseek_sft.cluster_jobs import queue
from deepseek_sft.errors import BadInputError, CrashError
from deepseek_sft.serving import deployment_job


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A results folder ready for `serve`; ``site(name, text)`` writes one of Slurm's commands."""
    tools = tmp_path / "tools"
    tools.mkdir()
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(deployment_job, "POLL_S", 0.01)
    monkeypatch.setattr(queue, "LONGEST_PAUSE_S", 0.01)
    (tmp_path / "results/serve/deployment").mkdir(parents=True)
    receipts.write(
        tmp_path / "results/receipts/verify_model.json",
        "verify_model",
        inputs={},
        settings={},
        result={"model": str(tmp_path)},
        figures={},
    )

    def write(name: str, text: str) -> None:
        (tools / name).write_text(f"#!/bin/bash\n{text}\n")
        (tools / name).chmod(0o755)

    write("scancel", 'echo "$@" >> cancelled')
    write("squeue", "echo 'RUNNING|node1'")
    write("scontrol", "true")
    write.folder = tmp_path
    return write


def deploy():
    return deployment_job.deploy(Path("results"), Path("logs"))


def test_a_wrapper_that_prints_lines_does_not_hide_the_job_id(site) -> None:
    site("sbatch", "echo 'INFO: charging project abc, 128 GPU-hours left'; echo 4711")
    site(
        "squeue", "case \"$*\" in *--jobs=4711*) echo 'FAILED|' ;; *) echo 'error: Invalid job id' >&2; exit 1 ;; esac"
    )
    with pytest.raises(CrashError, match="job 4711 ended before the model answered"):
        deploy()
    assert json.loads((site.folder / "results/serve/deployment/job.json").read_text())["job"] == "4711"


def test_an_error_of_ours_while_it_starts_cancels_what_was_submitted(site, monkeypatch) -> None:
    site("sbatch", "echo 4711")

    def breaks(_):
        raise OSError("no space left on device")

    monkeypatch.setattr(deployment_job.Endpoint, "read", breaks)
    with pytest.raises(OSError, match="no space"):
        deploy()
    assert (site.folder / "cancelled").read_text() == "4711\n"


def test_a_job_that_cannot_be_noted_is_cancelled(site, monkeypatch) -> None:
    site("sbatch", "echo 4711")

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(deployment_job.files, "write_json", full)
    with pytest.raises(OSError, match="no space"):
        deploy()
    assert (site.folder / "cancelled").read_text() == "4711\n"


def test_a_busy_controller_is_asked_again(site) -> None:
    busy = "echo 'Unable to contact slurm controller' >&2; exit 1"
    site("sbatch", f"echo x >> tries; if [ $(wc -l < tries) -lt 3 ]; then {busy}; fi; echo 4711")
    site("squeue", "echo 'FAILED|'")
    with pytest.raises(CrashError, match="job 4711 ended"):
        deploy()


def test_a_refusal_is_bad_input(site) -> None:
    site("sbatch", "echo 'sbatch: error: invalid partition specified' >&2; exit 1")
    with pytest.raises(BadInputError, match="invalid partition"):
        deploy()
