"""cluster/fastpoll speeds up Snakemake's Slurm executor and nothing else."""

import os
import subprocess
import sys
from pathlib import Path

EXECUTOR = """
import snakemake_executor_plugin_slurm as plugin
executor = object.__new__(plugin.Executor)
executor.next_seconds_between_status_checks = 31
print(executor.next_seconds_between_status_checks)
"""


def run(code: str, *folders: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders))}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.strip()


def test_executor_polls_twice_a_second_whatever_it_sets(project: Path) -> None:
    assert run(EXECUTOR) == "31"
    assert run(EXECUTOR, project / "cluster" / "fastpoll") == "0.5"


def test_sitecustomize_that_it_hides_still_runs(project: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.was_here = True\n")
    assert run("import sys; print(sys.was_here)", project / "cluster" / "fastpoll", tmp_path) == "True"


def test_programs_without_the_executor_are_left_alone(project: Path, tmp_path: Path) -> None:
    code = "import importlib.util; print(importlib.util.find_spec('snakemake_executor_plugin_slurm'), 1)"
    environment = {"PYTHONPATH": str(project / "cluster" / "fastpoll")}
    command = [sys.executable, "-S", "-c", f"import sitecustomize; {code}"]  # -S: no site-packages
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("None 1\n", "")
