"""The last lines of a run: at most ten, with what failed, what to do, and what to type next."""

import functools
from pathlib import Path

import pytest

from deepseek_sft import ending, receipts
from deepseek_sft.ending import Failure

COMMAND = "snakemake --profile profiles/demo --configfile mine.yaml"


def log_of(folder: Path, text: str, code: int | None = None) -> Path:
    path = folder / "logs" / "smoke_test.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    if code is not None:
        (path.parent / "smoke_test").mkdir(exist_ok=True)
        (path.parent / "smoke_test" / "do-not-retry").write_text(f"attempt 1 ended with exit code {code}, see x")
    return path


def test_gate_that_failed_is_told_with_fix_log_and_next_command(tmp_path):
    text = (
        "18 ok\nerror: the served model failed 1 of 19 checks:\n  held_out_loss: not judged\n  fix: give references\n"
    )
    failure = Failure("smoke_test", log_of(tmp_path, text, code=3))
    said = ending.failed([failure], tmp_path, COMMAND, "results/mine/report.html").splitlines()
    assert said[0] == "failed: smoke_test (exit code 3)"
    assert "the served model failed 1 of 19 checks:" in said[1]
    assert "held_out_loss: not judged" in said[2]
    assert said[3].split() == ["fix:", "give", "references"]
    assert said[4].endswith("smoke_test.log")
    assert said[-1].endswith(f"after that the same again: {COMMAND}")


def test_error_of_a_node_is_told_whole_though_srun_labels_its_lines(tmp_path):
    lines = ["ok", "error: 1 of 22 checks failed:", "  held_out_loss: 0.19", "  fix: look at it"]
    text = "".join(f"0: {line}\n" for line in lines) + "srun: error: node1: Exited\n"
    said = ending.failed([Failure("smoke_test", log_of(tmp_path, text, 3))], tmp_path, COMMAND, "")
    assert "held_out_loss: 0.19" in said
    assert "fix:    look at it" in said
    assert "srun" not in said


@pytest.mark.parametrize("lines", [1, 40])
def test_end_of_a_failed_run_has_at_most_ten_lines_however_long_the_error_is(tmp_path, lines):
    problems = "".join(f"  - problem {n} {'x' * 3000}\n" for n in range(lines))
    text = f"error: many\n{problems}  fix: a\n    or b\n    or c\n"
    failures = [Failure("smoke_test", log_of(tmp_path, text)), Failure("plan", None)]
    said = ending.failed(failures, tmp_path, COMMAND, "r.html").splitlines()
    assert len(said) <= 10
    assert max(map(len, said)) <= 230
    assert COMMAND in said[-1]


def test_crash_says_that_the_same_command_goes_on(tmp_path):
    log = log_of(tmp_path, "error: training crashed on node 1\n")
    slurm = tmp_path / "7.log"
    slurm.write_text("exit code 5; last lines of x:\n")
    said = ending.failed([Failure("train", log, [slurm])], tmp_path, COMMAND, "")
    assert "failed: train (exit code 5)" in said
    assert said.endswith(f"{COMMAND}    (goes on after what is done)")


def test_kill_that_only_slurm_saw_is_read_from_the_log_of_the_job(tmp_path):
    slurm = tmp_path / "7.log"
    slurm.write_text("error: train: Slurm killed the step for lack of memory:\n  x\n  fix: raise `mem_mb`\n")
    said = ending.failed([Failure("train", log_of(tmp_path, "step 7\n"), [slurm])], tmp_path, COMMAND, "")
    assert "lack of memory" in said
    assert "raise `mem_mb`" in said


def test_time_limit_of_slurm_is_named(tmp_path):
    failure = Failure("train", log_of(tmp_path, "step 7\n"), (), "SLURM-job '7' failed, SLURM status is: 'TIMEOUT'. x")
    said = ending.failed([failure], tmp_path, COMMAND, "")
    assert "TIMEOUT" in said
    assert "runtime" in said


def test_log_without_an_error_is_told_by_its_last_lines(tmp_path):
    said = ending.failed([Failure("train", log_of(tmp_path, "one\ntwo\n\x1b[31mthree\n"))], tmp_path, COMMAND, "")
    assert "three" in said
    assert "\x1b" not in said


def test_run_that_was_interrupted_says_so_and_what_to_type(tmp_path):
    said = ending.failed([], tmp_path, COMMAND, "", "interrupted: running jobs were cancelled").splitlines()
    assert said[0].startswith("interrupted")
    assert "nothing yet" in said[1]


def test_success_names_what_is_still_open(tmp_path):
    said = ending.finished(["prepare_data"], tmp_path / "mine", 61)
    assert said.startswith("done: mine, prepare_data in 1 min 1 s")
    assert "not yet: " in said
    assert "train" in said


def test_success_names_records_that_were_left_out_and_fields_that_nothing_used(tmp_path):
    results = tmp_path / "mine"
    (results / "data").mkdir(parents=True)
    for name in ("train.jsonl", "rejects.jsonl"):
        (results / "data" / name).write_text("{}\n")
    figures = {"records": 300, "accepted": 164, "rejected": 136, "rejects": {"duplicate": 76, "invalid_json": 60}}
    made = {"data": str(results / "data/train.jsonl"), "rejects": str(results / "data/rejects.jsonl")}
    receipt = results / "receipts/prepare_data.json"
    write = functools.partial(receipts.write, receipt, "prepare_data", inputs={}, settings={}, result=made)
    write(figures=figures | {"unused_fields": {"messages[].notes": {"records": 17, "first": "a.jsonl:9"}}})
    said = ending.finished(["prepare_data"], results, 61)
    assert "data:   164 of 300 records accepted; rejected: duplicate 76, invalid_json 60; see " in said
    assert "data/rejects.jsonl" in said
    assert "fields not used: messages[].notes" in said
    write(figures={"records": 300, "accepted": 300, "rejected": 0, "rejects": {}, "unused_fields": {}})
    assert "data:" not in ending.finished(["prepare_data"], results, 61)
