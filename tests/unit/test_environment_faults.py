"""A fault of the machine or its disks is one sentence with the place and the free space, and never a defect of ours."""

import errno
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from deepseek_sft import cli, environment_faults, files, leftovers
from deepseek_sft.training import launch

PROJECT = Path(__file__).resolve().parents[2]
SCRIPTS = PROJECT / "workflow/scripts"
WITHOUT_MAIN = {"_bootstrap.py", "_single_threaded.py", "slurm_command.py"}  # the last has a wording of its own
STAGE = SCRIPTS / "stage.sh"
ASKED = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.ESTALE, errno.ENAMETOOLONG, errno.EIO)


def ended(main, capsys) -> tuple[object, str]:
    with pytest.raises(SystemExit) as end:
        cli.run(main)
    return end.value.code, capsys.readouterr().err


@pytest.mark.parametrize("code", ASKED)
def test_an_error_of_the_file_system_is_one_sentence_with_path_and_space(code, tmp_path, capsys):
    def main():
        raise OSError(code, os.strerror(code), str(tmp_path / "file"))

    exit_code, said = ended(main, capsys)
    assert exit_code == 2
    assert f"error: {tmp_path}/file: " in said and os.strerror(code) in said and "GiB are free there" in said
    assert "fix: " in said and "Traceback" not in said and "defect" not in said


def test_a_write_that_names_no_file_is_known_by_the_file_that_was_open(tmp_path, capsys):
    def main():
        with open("/dev/full", "wb", buffering=0) as stream:
            stream.write(b"x")

    assert "error: /dev/full: no space is left" in ended(main, capsys)[1]


def test_a_library_in_whose_words_a_full_disk_is_hidden_does_not_hide_it(capsys):
    def main():
        try:
            raise OSError(errno.ENOSPC, "No space left on device", "/somewhere/file")
        except OSError:
            raise RuntimeError("unexpected pos 64 vs 0")  # noqa: B904

    code, said = ended(main, capsys)
    assert code == 2 and "/somewhere/file: no space is left" in said


def test_an_error_of_ours_is_still_called_one(capsys):
    def main():
        raise KeyError("x")

    code, said = ended(main, capsys)
    assert code == 5 and "defect of the workflow" in said and "Traceback" in said


def test_every_program_ends_through_the_one_place_that_knows_these_faults():
    without = [
        path.name
        for path in SCRIPTS.glob("*.py")
        if path.name not in WITHOUT_MAIN and not re.search(r"^    cli\.run\(main\)$", path.read_text(), re.MULTILINE)
    ]
    assert without == []


def test_every_program_on_a_full_and_on_a_read_only_disk(tmp_path, environment):
    unshare = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--mount", "--map-root-user"]
    command = [*unshare, str(environment("workflow")), str(PROJECT / "tests/full_disks.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    wrong = {
        name: end
        for name, end in json.loads(done.stdout.splitlines()[-1]).items()
        if end["code"] != 2 or "defect" in end["said"] or "Traceback" in end["said"] or "free there" not in end["said"]
    }
    assert wrong == {}


def test_a_stage_whose_log_cannot_be_written_does_not_begin(tmp_path):
    (tmp_path / "logs").write_text("in the way")
    command = ["bash", str(STAGE), "logs/rule.log", "1", "touch", "begun"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and not (tmp_path / "begun").exists()
    assert "error: the log logs/rule/" in done.stderr and "fix: " in done.stderr


def test_a_message_that_the_log_has_no_room_for_does_not_end_the_stage():
    program = "from deepseek_sft import cli; cli.say('x'); cli.run(lambda: 3)"
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", program], cwd=PROJECT / "workflow", stderr=full, check=False)
    assert done.returncode == 3


def dead_process() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_what_a_killed_process_left_is_removed_at_the_next_start_and_nothing_else(tmp_path):
    dead = tmp_path / f".train.jsonl.{dead_process()}@{leftovers.machine()}.tmp"
    living = tmp_path / f".train.jsonl.{os.getpid()}@{leftovers.machine()}.tmp"
    elsewhere, old = tmp_path / ".train.jsonl.1@another.tmp", tmp_path / ".receipt.json.77.tmp"
    kept = [living, elsewhere, tmp_path / "mine.tmp", tmp_path / ".hidden"]
    for path in (dead, old, *kept):
        path.write_text("x")
    os.utime(old, (time.time() - 2 * leftovers.DAY,) * 2)
    files.require_writable(tmp_path / "train.jsonl")
    assert sorted(tmp_path.iterdir()) == sorted(kept)


def test_a_killed_write_is_found_by_its_name(tmp_path):
    program = f"""
import os, signal
from deepseek_sft import files
with files.atomic_open({str(tmp_path / ("n" * 240))!r}) as stream:
    stream.write("half")
    stream.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", program], cwd=PROJECT / "workflow", check=False)
    (left,) = tmp_path.iterdir()
    assert leftovers.sweep([tmp_path]) == [left]


def test_a_folder_in_which_something_can_be_written_has_no_fault(tmp_path):
    assert environment_faults.probe(tmp_path) is None
    assert list(tmp_path.iterdir()) == []


def test_a_rank_that_finds_no_room_is_a_fault_of_the_disk_and_not_a_crash(tmp_path):
    node = SimpleNamespace(attempt="1")
    folder = launch.attempt_folder(tmp_path, "1")
    folder.mkdir(parents=True)
    assert launch.environment_fault(tmp_path, node) is None
    for rank, at, problem in ((1, 8.0, "/run/step_4/file: no space is left"), (0, 9.0, "a peer was lost")):
        record = {"rank": rank, "host": "n", "time": at, "fault": {"problem": problem, "fix": "free space"}}
        (folder / f"failure-rank{rank}.json").write_text(json.dumps(record))
    fault = launch.environment_fault(tmp_path, node)
    assert fault.exit_code == 2 and fault.problem == "rank 1 on n: /run/step_4/file: no space is left"


def test_what_a_full_disk_kept_the_ranks_from_saying_is_found_out_by_writing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    fault = launch.environment_fault(tmp_path, SimpleNamespace(attempt="1"))
    assert fault.exit_code == 2 and str(tmp_path) in fault.problem and "free there" in fault.problem
