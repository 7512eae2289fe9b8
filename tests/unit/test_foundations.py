"""Atomic files, fingerprints, receipts, exit codes, and the wrapper around each stage."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from deepseek_sft import files, receipts
from deepseek_sft.cluster_jobs import holders
from deepseek_sft.errors import BadInputError

PROJECT = Path(__file__).resolve().parents[2]
STAGE = PROJECT / "workflow/scripts/stage.sh"


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    files.write_text(path, "old")
    with pytest.raises(RuntimeError), files.atomic_open(path) as stream:
        stream.write("new")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_not_a_number_is_refused_in_json(tmp_path):
    with pytest.raises(ValueError, match="JSON compliant"):
        files.write_json(tmp_path / "file", {"loss": float("nan")})
    assert not list(tmp_path.iterdir())


def test_canonical_json_does_not_depend_on_key_order():
    assert files.canonical_json({"b": 1, "a": [1]}) == files.canonical_json({"a": [1], "b": 1}) == '{"a":[1],"b":1}'


def test_fingerprint_follows_content_and_names(tmp_path):
    (tmp_path / "a").write_text("1")
    first = files.fingerprint(tmp_path)
    (tmp_path / "a").write_text("2")
    second = files.fingerprint(tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")
    assert len({first, second, files.fingerprint(tmp_path)}) == 3


def test_large_file_is_sampled_at_its_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "SAMPLED_ABOVE", 1000)
    monkeypatch.setattr(files, "SAMPLE_BLOCK_SIZE", 10)
    path = tmp_path / "large"
    path.write_bytes(b"a" * 5000)
    before = files.fingerprint(path)
    assert before.startswith("sampled:")
    path.write_bytes(b"a" * 4999 + b"b")
    assert files.fingerprint(path) != before
    assert files.fingerprint(path, full=True).startswith("sha256:")


def write_receipt(folder: Path, **result: Path) -> Path:
    path = folder / "receipts" / "train.json"
    receipts.write(path, "train", inputs={}, settings={}, result=result, figures={})
    return path


def test_receipt_names_host_versions_and_result(tmp_path):
    (tmp_path / "model").mkdir()
    receipt = receipts.read(write_receipt(tmp_path, model=tmp_path / "model"), "train")
    assert receipt["hosts"]
    assert receipt["versions"]["python"].startswith("3.")
    assert receipt["result"] == {"model": str(tmp_path / "model")}


def test_receipt_is_not_written_for_a_result_that_does_not_exist(tmp_path):
    with pytest.raises(AssertionError, match="do not exist"):
        write_receipt(tmp_path, model=tmp_path / "absent")
    assert not (tmp_path / "receipts").exists()


@pytest.mark.parametrize("damage", ["absent", "not json", "other rule", "result gone"])
def test_receipt_that_cannot_be_trusted_says_how_to_make_it_again(tmp_path, damage):
    (tmp_path / "model").mkdir()
    path = write_receipt(tmp_path, model=tmp_path / "model")
    if damage == "absent":
        path.unlink()
    elif damage == "not json":
        path.write_text("{")
    elif damage == "other rule":
        path.write_text(json.dumps(json.loads(path.read_text()) | {"rule": "verify_model"}))
    else:
        (tmp_path / "model").rmdir()
    with pytest.raises(BadInputError, match="train"):
        receipts.read(path, "train")


@pytest.mark.parametrize(
    ("error", "code"),
    [("BadInputError", 2), ("GateError", 3), ("StoppedError", 4), ("CrashError", 5)],
)
def test_known_errors_become_one_message_and_the_exit_code_of_the_contract(error, code):
    program = (
        f"from deepseek_sft import cli, errors\ndef main(): raise errors.{error}('it broke', 'mend it')\ncli.run(main)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=PROJECT / "workflow", capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (code, "error: it broke\n  fix: mend it\n")


def stage(folder: Path, attempt: int, command: str, *more: str, **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [STAGE, folder / "logs" / "rule.log", str(attempt), "bash", "-c", command, *more],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": "/usr/bin:/bin", "SLURM_JOB_ID": "7", **variables},
    )


def test_stage_keeps_a_log_of_each_attempt_and_points_at_the_newest(tmp_path):
    assert stage(tmp_path, 1, "echo first").returncode == 0
    assert stage(tmp_path, 2, "echo second >&2; exit 5").returncode == 5
    assert (tmp_path / "logs/rule/7-1.log").read_text() == "first\n"
    assert (tmp_path / "logs/rule.log").read_text() == "second\n"


def test_a_requeued_job_has_a_log_of_its_own_and_tells_its_commands_the_restart(tmp_path):
    stage(tmp_path, 1, "echo $SLURM_RESTART_COUNT")
    stage(tmp_path, 1, "echo $SLURM_RESTART_COUNT", DEEPSEEK_SFT_RESTARTS="1")
    assert (tmp_path / "logs/rule/7-1.log").read_text() == "0\n"
    assert (tmp_path / "logs/rule/7-2.log").read_text() == "1\n"
    assert (tmp_path / "logs/rule.log").readlink() == Path("rule/7-2.log")


def test_restarts_are_kept_by_the_one_process_that_knows_them():
    inner = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node1", "SLURM_RESTART_COUNT": "3"}
    holders.keep_restart_count(inner)
    assert inner[holders.RESTARTS] == "3"
    first = {"SLURM_JOB_NODELIST": "node1", holders.RESTARTS: "of the job that submitted this one"}
    holders.keep_restart_count(first)
    assert first[holders.RESTARTS] == "0"
    stripped = {"SLURM_JOB_ID": "7", holders.RESTARTS: "3"}
    holders.keep_restart_count(stripped)
    assert stripped[holders.RESTARTS] == "3"


def test_stage_runs_its_commands_in_order_until_one_fails(tmp_path):
    assert stage(
        tmp_path, 1, "echo one", "--then", "echo", "two", "--then", "false", "--then", "echo", "never"
    ).returncode
    assert (tmp_path / "logs/rule.log").read_text() == "one\ntwo\n"


def test_a_refused_retry_shows_why_in_the_log_that_is_looked_at(tmp_path):
    assert stage(tmp_path, 1, "echo the reason; exit 2").returncode == 2
    (tmp_path / "logs/rule.log").unlink()  # Snakemake removes it before each attempt
    assert stage(tmp_path, 2, "echo never").returncode == 3
    assert "exit code 2, see" in (tmp_path / "logs/rule.log").read_text()


def test_path_that_no_receipt_gives_ends_the_stage_with_the_reason_in_its_log(tmp_path):
    receipt = PROJECT / "workflow/scripts/receipt_path.py"
    found = f'"$({sys.executable} {receipt} {tmp_path}/none.json train checkpoint --for-stage)"'
    command = f"{STAGE} {tmp_path}/logs/rule.log 1 touch {tmp_path}/ran {found}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "error: no receipt of train" in (tmp_path / "logs/rule.log").read_text()
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "name", ["a b", "it's", 'a"b', "$(touch x)", "`touch x`", "a;b", "a&b", "a*b", "é", "a\\b", "a\nb"]
)
def test_path_of_a_receipt_reaches_its_stage_as_one_word(tmp_path, name):
    there = tmp_path / name
    there.mkdir()
    written = tmp_path / "train.json"
    receipts.write(written, "train", inputs={}, settings={}, result={"checkpoint": str(there)}, figures={})
    found = f'"$({sys.executable} {PROJECT}/workflow/scripts/receipt_path.py {written} train checkpoint --for-stage)"'
    command = f"{STAGE} {tmp_path}/logs/rule.log 1 python3 -c 'import sys; print(repr(sys.argv[1:]))' {found}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "logs/rule.log").read_text() == f"{[str(there)]!r}\n"
    assert not (tmp_path / "x").exists()


def test_stage_shows_the_last_lines_of_a_failure(tmp_path):
    failed = stage(tmp_path, 1, "echo the reason; exit 5")
    assert "the reason" in failed.stderr
    assert "exit code 5" in failed.stderr


def test_stage_at_a_terminal_leaves_the_reason_to_the_end_of_the_run(tmp_path):
    failed = stage(tmp_path, 1, "echo the reason; exit 5", SLURM_JOB_ID="")
    assert "the reason" not in failed.stderr
    assert "exit code 5, see" in failed.stderr


@pytest.mark.parametrize(
    "words",
    [
        "slurmstepd-node2: error: StepId=7.0 exceeded memory limit (951066624 > 943718400), being killed",
        "slurmstepd: error: Detected 1 oom_kill event in StepId=7.0. Some of the step tasks have been OOM Killed.",
        "srun: error: node2: task 1: Out Of Memory",
    ],
)
def test_stage_that_slurm_killed_for_lack_of_memory_says_so_and_how_to_mend_it(tmp_path, words):
    failed = stage(tmp_path, 1, f"echo '{words}'; echo 'srun: error: node2: task 1: Killed'; exit 137")
    (_, message) = failed.stderr.split("error: rule: Slurm killed the step for lack of memory:\n")
    assert words in message
    assert "node2: task 1: Killed" in message
    assert "fix: raise `mem_mb` of this rule in the profile" in message


def test_stage_that_was_killed_otherwise_does_not_speak_of_memory(tmp_path):
    failed = stage(tmp_path, 1, "echo 'srun: error: node2: task 1: Killed'; echo 'CUDA out of memory'; exit 137")
    assert "lack of memory" not in failed.stderr


@pytest.mark.parametrize(("code", "runs_again"), [(2, False), (3, False), (4, True), (5, True)])
def test_retry_runs_again_only_where_that_can_help(tmp_path, code, runs_again):
    stage(tmp_path, 1, f"exit {code}")
    retried = stage(tmp_path, 2, "echo again")
    assert (retried.returncode == 0) == runs_again
    assert ("not retried" in retried.stderr) != runs_again


def test_new_run_forgets_that_the_last_one_was_not_to_be_retried(tmp_path):
    stage(tmp_path, 1, "exit 3")
    assert stage(tmp_path, 1, "true").returncode == 0
