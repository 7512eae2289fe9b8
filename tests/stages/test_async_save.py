"""Promises of checkpoints that are written beside a step; that they have the same bytes: test_other_topology.py."""

import json
import subprocess
from pathlib import Path

import pytest
from training_inputs import probe_variables

pytestmark = pytest.mark.stage("train")
STAGES = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def probe(environment, project, tmp_path_factory):
    """What the probe found, and what was said."""
    python, folder = environment("train"), tmp_path_factory.mktemp("writer")
    command = [str(python), str(STAGES / "async_save_probe.py"), str(folder)]
    variables = probe_variables(project, python)
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def test_states_of_a_gpu_arrive_whole_through_pieces(probe):
    assert probe[0]["in_pieces"] == [True] * 4


def test_counts_are_saved_as_they_were_when_the_save_began(probe):
    assert probe[0]["small_at_once"] == [3.0, 0.0]


def test_a_disk_that_refuses_is_named_at_once_with_its_reason_and_ends_the_save(probe):
    found, said = probe
    assert found["refused"]["kind"] == "OSError" and "File too large" in found["refused"]["text"]
    assert "warning: rank 0 could not write its files of" in said
    assert "`ulimit -f` allows" in said


def test_a_step_that_waits_for_a_slow_disk_says_how_much_is_written(probe):
    found, said = probe
    assert found["slow"] > 4 << 20
    assert "the update waits for step_1 since" in said and "rank 0 has written 0.0 of 0.0 GB" in said


def test_the_thread_that_writes_gives_way_to_the_one_that_computes(probe):
    found = probe[0]["niceness"]
    assert found["computing"] == 0 < found["writer"]
