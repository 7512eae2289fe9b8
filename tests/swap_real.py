"""Opt-in, as root: a conversion with a real swap file (``make test-swap``). It switches a small swap file on and off.

Not collected by ``make test``.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conversion_helpers import convert_all, write_inputs

from deepseek_sft.tensors import swap
from deepseek_sft.tensors.memory_bound import Memory

FOLDER = Path(os.environ.get("SWAP_FOLDER", "/var/tmp"))
SIZE = 64 << 20
NOTHING_FREE = Memory(available=0, swap_free=0, group_limit=None, group_free=None)
HOLD = """
import sys, time
from pathlib import Path
sys.path[:0] = sys.argv[1:3]
from deepseek_sft.tensors import swap
import swap_real
with swap.provided(swap_real.SIZE, Path(sys.argv[3]), swap_real.FOLDER, swap_real.NOTHING_FREE):
    print("on", flush=True)
    time.sleep(600)
"""


def swaps():
    return Path("/proc/swaps").read_text().splitlines()[1:]


@pytest.fixture(autouse=True)
def root_and_nothing_left():
    if os.geteuid() != 0:
        pytest.fail("make test-swap must be run by root")
    before = [line.split()[0] for line in swaps()]
    yield
    assert [line.split()[0] for line in swaps()] == before
    assert list(FOLDER.glob("deepseek-sft-*.swap")) == []


def test_swap_file_is_on_inside_and_gone_afterwards(tmp_path):
    before = len(swaps())
    with swap.provided(SIZE, tmp_path / "model", FOLDER, NOTHING_FREE):
        assert len(swaps()) == before + 1
        write_inputs(tmp_path / "in")
        convert_all(tmp_path / "in", tmp_path / "model")
    assert len(swaps()) == before


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_killed_run_is_cleaned_up_by_the_next(tmp_path, project, number):
    before = len(swaps())
    paths = [str(project / "workflow"), str(project / "tests")]
    holder = subprocess.Popen([sys.executable, "-c", HOLD, *paths, str(tmp_path / "model")], stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"on\n"
    assert len(swaps()) == before + 1
    holder.send_signal(number)
    holder.wait(60)
    time.sleep(0.2)
    assert len(swaps()) == before + (number == signal.SIGKILL)
    swap.remove_stale(tmp_path / "model")
    assert len(swaps()) == before
