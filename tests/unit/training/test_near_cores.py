"""Ranks run on the cores beside their GPUs, and elsewhere only where there are none."""

import os
import subprocess
import sys

import pytest

from deepseek_sft.training import near_cores

ADDRESS = "0000:1b:00.0"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("0-3,8-9\n", {0, 1, 2, 3, 8, 9}), ("5\n", {5}), ("\n", set()), (None, set())],
)
def test_cores_beside_a_gpu_are_those_that_linux_lists(tmp_path, text, wanted):
    if text is not None:
        (tmp_path / ADDRESS).mkdir()
        (tmp_path / ADDRESS / "local_cpulist").write_text(text)
    assert near_cores.cores_beside(ADDRESS, tmp_path) == wanted


BOUND = """
import os, sys, threading
from deepseek_sft.training import near_cores
stop = threading.Event()
thread = threading.Thread(target=stop.wait)
thread.start()
core = min(os.sched_getaffinity(0))
print(near_cores.bind({core, 100_000}))
assert os.sched_getaffinity(0) == os.sched_getaffinity(thread.native_id) == {core}
stop.set()
"""


def test_every_thread_is_bound_to_what_the_job_has_of_them(project):
    environment = os.environ | {"PYTHONPATH": str(project / "workflow")}
    done = subprocess.run([sys.executable, "-c", BOUND], env=environment, capture_output=True, text=True, check=True)
    assert f"on 1 of its job's {len(os.sched_getaffinity(0))} cores" in done.stdout


@pytest.mark.parametrize(("cores", "said"), [(set(), "nothing is known"), ({100_000}, "none is among them")])
def test_a_job_without_such_cores_stays_where_it_is_and_says_so(cores, said):
    before = os.sched_getaffinity(0)
    assert said in near_cores.bind(cores)
    assert os.sched_getaffinity(0) == before
