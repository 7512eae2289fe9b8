"""Only segments that our own processes had mapped are removed from /dev/shm."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import psutil
import pytest

from deepseek_sft.serving.shared_memory import SHARED_MEMORY, Segments, mapped_inodes

# Makes a segment and a semaphore as vLLM's processes do, tells their names, and lives until its input ends.
PROGRAM = """
import multiprocessing, sys
from multiprocessing import resource_tracker, shared_memory
resource_tracker.register = lambda *_: None  # as after a SIGKILL of the whole family: nothing cleans up
semaphore = multiprocessing.get_context("spawn").Semaphore(1)
segment = shared_memory.SharedMemory(create=True, size=4096)
if "close" in sys.argv:
    segment.close()  # handed over by name, mapped by nobody right now
print(f"sem.{semaphore._semlock.name[1:]}", segment.name, flush=True)
sys.stdin.readline()
import os; os._exit(0)
"""


def start(*arguments: str, **options) -> tuple[subprocess.Popen, list[str]]:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    program = subprocess.Popen([sys.executable, "-c", PROGRAM, *arguments], **pipes, **options)
    return program, program.stdout.readline().split()


@pytest.fixture
def started() -> Iterator[list[str]]:
    """Names to clean up whatever the test found."""
    names: list[str] = []
    yield names
    for name in names:
        (SHARED_MEMORY / name).unlink(missing_ok=True)


def test_segments_and_semaphores_of_a_killed_process_of_ours_are_removed(started):
    segments = Segments()
    ours, names = start()
    started += names
    segments.observe(psutil.Process().children(recursive=True))
    ours.kill()
    ours.wait()
    assert all((SHARED_MEMORY / name).exists() for name in names)
    assert segments.remove() == sorted(names)
    assert not any((SHARED_MEMORY / name).exists() for name in names)


@pytest.mark.parametrize("mapped", ["open", "close"])
def test_those_of_another_program_of_the_same_user_stay_even_if_unmapped_or_left_behind(started, mapped):
    segments = Segments()
    # A child of init, as any program that is not ours: the shell between ends at once.
    command = f'"{sys.executable}" -c "$PROGRAM" {mapped} <&3 & echo $!'
    reading, writing = os.pipe()
    shell = subprocess.Popen(
        ["bash", "-c", f"exec 3<&0; {command}"],
        stdin=reading,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PROGRAM": PROGRAM},
    )
    pid, names = int(shell.stdout.readline()), shell.stdout.readline().split()
    shell.wait()
    started += names
    try:
        segments.observe(psutil.Process().children(recursive=True))
        assert segments.remove() == []
        os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + 10
        while mapped_inodes(pid) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert segments.remove() == []
        assert all((SHARED_MEMORY / name).exists() for name in names)
    finally:
        os.close(writing)
        os.close(reading)


def test_segment_that_another_process_still_uses_stays(started):
    segments = Segments()
    ours, names = start()
    started += names
    segments.observe(psutil.Process().children(recursive=True))
    attach = (
        "import sys; from multiprocessing import shared_memory as s; "
        "x = s.SharedMemory(sys.argv[1]); print('ok', flush=True); sys.stdin.readline(); import os; os._exit(0)"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", attach, names[1]], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout.readline() == "ok\n"
    ours.kill()
    ours.wait()
    assert segments.remove() == names[:1]
    assert (SHARED_MEMORY / names[1]).exists()
    other.communicate("\n")


def test_segments_from_before_the_start_stay(started):
    earlier, names = start()
    started += names
    segments = Segments()
    segments.observe(psutil.Process().children(recursive=True))
    earlier.kill()
    earlier.wait()
    assert segments.remove() == []
