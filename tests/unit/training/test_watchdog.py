"""Promises about a rank that hangs: its threads are shown, the process ends, and the right rank and node are named."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from deepseek_sft.slurm import nodes
from deepseek_sft.training import launch, watchdog

WORKFLOW = Path(__file__).resolve().parents[3] / "workflow"
HANGS = {
    "waits": "import threading; threading.Event().wait()",
    # PyDLL keeps the interpreter's lock: no Python thread runs any more.
    "holds the lock": "import ctypes; ctypes.PyDLL(None).sleep(60)",
}


def run_hanging(folder, how):
    # Only where no Python thread runs must the kernel end the process; a word takes its time on a busy disk.
    backstop = 0.3 if how == "holds the lock" else 20
    program = f"""
import sys; sys.path.insert(0, {str(WORKFLOW)!r})
from deepseek_sft.training import watchdog
watchdog.GRACE, watchdog.BACKSTOP = 0.1, {backstop}
from pathlib import Path
dog = watchdog.Watchdog(3, Path({str(folder)!r}), {{"start": 60, "step": 0.3, "save": 60}})
dog.enter("step", 12)
dog.place = "data"
def where_it_hangs():
    {HANGS[how]}
where_it_hangs()
"""
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=False)


@pytest.mark.parametrize("how", HANGS)
def test_a_hanging_rank_shows_its_threads_and_ends(tmp_path, how):
    done = run_hanging(tmp_path, how)
    assert done.returncode in (1, -signal.SIGALRM)
    assert "in where_it_hangs" in done.stderr


def test_a_hanging_rank_leaves_word_of_step_and_place(tmp_path):
    run_hanging(tmp_path, "waits")
    record = json.loads((tmp_path / "failure-rank3.json").read_text())
    assert record["error"] == "hang: no progress for 0.3 s in step 12 (data)"
    assert record["hang"]["waits"] is False
    assert "threading.py" in record["hang"]["frame"]


def test_progress_keeps_a_rank_alive_and_the_limit_is_that_of_its_phase(tmp_path):
    program = f"""
import sys, time; sys.path.insert(0, {str(WORKFLOW)!r})
from deepseek_sft.training import watchdog
from pathlib import Path
dog = watchdog.Watchdog(0, Path({str(tmp_path)!r}), {{"start": 60, "step": 2, "save": 60}})
for step in range(12):
    dog.enter("step", step)
    time.sleep(0.2)
dog.enter("save", 12)
time.sleep(2.5)
dog.close()
time.sleep(0.3)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def record(rank, step=5, place="backward", waits=True):
    hang = {"step": step, "place": place, "frame": "x.py:1 f", "waits": waits}
    return {"rank": rank, "host": "h", "time": 1.0, "error": f"hang: no progress for 9 s in step {step}", "hang": hang}


@pytest.mark.parametrize(
    ("records", "named"),
    [
        ([record(0), record(1, place="data", waits=False), record(2), record(3)], "rank 1 on alpha came least far"),
        ([record(0), record(1), record(2, step=4), record(3)], "rank 2 on beta came least far"),
        ([record(0), record(1), record(2), record(3, waits=False)], "rank 3 on beta came least far"),
        ([record(0), record(1), record(3)], "rank 2 on beta said nothing"),
        ([record(0), record(1)], "rank 2, 3 on beta said nothing"),
        ([record(rank) for rank in range(4)], "all ranks stand at the same place"),
    ],
)
def test_the_rank_that_the_others_wait_for_is_named_with_its_node(records, named):
    assert named in watchdog.explain(records, 4, 2, ("alpha", "beta"))[0]


def test_a_hang_is_told_by_the_log_of_the_rank_it_began_with(tmp_path):
    node = nodes.NodeEnvironment(1, 0, "alpha", 20000, 2, None, "start", ("alpha",))
    folder = launch.attempt_folder(tmp_path, "start")
    for rank, waits in ((0, True), (1, False)):
        logs = folder / "node0" / "x" / "attempt_0" / str(rank)
        logs.mkdir(parents=True)
        (logs / "stderr.log").write_text(f"stack of rank {rank}\n")
        (folder / f"failure-rank{rank}.json").write_text(json.dumps(record(rank, waits=waits)))
    told = launch.explain_failure(tmp_path, node)
    assert "hang: rank 1 on alpha came least far" in told
    assert "stack of rank 1" in told


def test_a_hanging_rank_leaves_what_the_flight_recorder_holds_before_it_ends(tmp_path):
    program = f"""
import sys, threading, types; sys.path.insert(0, {str(WORKFLOW)!r})
from deepseek_sft.training import watchdog
from pathlib import Path
sys.modules["torch._C._distributed_c10d"] = types.SimpleNamespace(_dump_fr_trace=lambda: b"the last collectives")
watchdog.GRACE = 0.1
folder = Path({str(tmp_path)!r})
watchdog.Watchdog(3, folder, {{"start": 0.3, "step": 60, "save": 60}}, trace=folder / "nccl-trace-rank3")
threading.Event().wait()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert (tmp_path / "nccl-trace-rank3").read_bytes() == b"the last collectives"
    assert "the last collectives are in" in done.stderr
