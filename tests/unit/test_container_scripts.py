"""The scripts of profiles/containers start Python in the image with what a stage needs, and hand everything through."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]
# Apptainer's command line, as far as the scripts use it: what is behind the image runs in its place.
APPTAINER = """#!/bin/bash
echo "$*" > {calls}
[ "$1" = exec ] && [ "$2" = --nv ] && [ "$3" = --bind ] || exit 99
shift 5
[ "$1" = python ] && shift && exec python3 "$@"
"""


@pytest.fixture
def site(tmp_path):
    """Environment of a machine with such an Apptainer, and the file in which it notes its call."""
    program, calls = tmp_path / "bin/apptainer", tmp_path / "calls"
    program.parent.mkdir()
    program.write_text(APPTAINER.format(calls=calls))
    program.chmod(0o755)
    return os.environ | {"PATH": f"{program.parent}:{os.environ['PATH']}"}, calls


@pytest.mark.parametrize("stage", ["train", "serve"])
def test_arguments_output_and_exit_code_pass_through(site, stage, tmp_path):
    environment, calls = site
    own = {f"{stage.upper()}_IMAGE": "/images/my own.sif", "CONTAINER_PATHS": "/data,/models"}
    code = "import sys; print(sys.argv[1:]); sys.exit(4)"
    done = subprocess.run(
        [str(PROJECT / f"profiles/containers/{stage}-python"), "-c", code, "a b", "$x"],
        cwd=tmp_path,
        env=environment | own,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (4, "['a b', '$x']\n"), done.stderr
    call = calls.read_text()
    assert f"--bind {tmp_path},/data,/models,/usr/bin/scontrol" in call and " /images/my own.sif python -c" in call


def test_a_signal_reaches_the_program_in_the_container(site, tmp_path):
    environment, _ = site
    ready = tmp_path / "ready"
    code = (
        "import pathlib, signal, sys, time; signal.signal(signal.SIGUSR1, lambda *_: sys.exit(4));"
        f"pathlib.Path({str(ready)!r}).touch(); time.sleep(60)"
    )
    program = subprocess.Popen([str(PROJECT / "profiles/containers/train-python"), "-c", code], env=environment)
    try:
        while not ready.exists() and program.poll() is None:
            time.sleep(0.02)
        program.send_signal(signal.SIGUSR1)
        assert program.wait(timeout=60) == 4
    finally:
        program.kill()
