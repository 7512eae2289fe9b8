"""Target `clean`, as a user runs it, on results of a finished experiment (stand-ins). About 10 s."""

import subprocess
from pathlib import Path

import pytest
from finished_run import Finished
from project_copy import copy_of


class Project:
    """A clone with one finished experiment."""

    def __init__(self, project: Path, folder: Path):
        self.clone, self.snakemake = copy_of(project, folder), project / ".envs/workflow/bin/snakemake"
        self.finished = Finished(folder)
        self.overlay = folder / "overlay.yaml"
        self.overlay.write_text(f"experiment: {self.finished.results.name}\nresults: {self.finished.results.parent}\n")

    def clean(self, *more: str) -> tuple[int, str]:
        """Exit code and output of `snakemake clean`."""
        command = [str(self.snakemake), "--profile", "profiles/local", *more, "--configfile"]
        command += ["config/experiments/demo.yaml", str(self.overlay), "--", "clean"]
        done = subprocess.run(command, cwd=self.clone, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr


@pytest.fixture
def run(project: Path, tmp_path: Path) -> Project:
    return Project(project, tmp_path)


def test_dry_run_shows_what_goes_and_the_real_one_frees_it(run: Project) -> None:
    before = run.finished.folders()
    code, said = run.clean("--dry-run")
    assert code == 0, said
    assert f"{run.finished.run / 'step_10'} (checkpoint of step 10)" in said
    assert f"keep  {run.finished.run / 'step_30'}" in said
    assert run.finished.folders() == before
    code, said = run.clean()
    assert code == 0, said
    assert f"removed {run.finished.run / 'step_10'}" in said
    assert "freed " in said
    assert run.finished.folders() == {"step_30"}


def test_unproven_model_is_refused_with_the_reason(run: Project) -> None:
    before = run.finished.folders()
    run.finished.file.write_bytes(b"strange")
    code, said = run.clean("--dry-run")
    assert "would refuse" in said
    code, said = run.clean()
    assert code != 0
    assert "has changed since it was verified" in said
    assert run.finished.folders() == before
