"""Promises about Slurm jobs over the life of several Snakemakes, with scripts in place of Slurm's commands."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import scripted_slurm
from scripted_slurm import BUSY, CALL, Site

from deepseek_sft.cluster_jobs import commands, holders, queue, record, retries, start, stop
from deepseek_sft.errors import BadInputError, CrashError

PROJECT = Path(__file__).resolve().parents[3]
site = scripted_slurm.site


# ---- submitting


def test_a_job_is_submitted_under_a_comment_that_finds_it_again(site: Site, capsys) -> None:
    assert commands.submit(site.record, CALL) == 0
    assert capsys.readouterr().out == "78\n"
    comment = site.called()[site.called().index("--comment") + 1]
    assert comment == f"rule_train mine {site.rule.fingerprint()}"
    assert [job["job"] for job in site.record.jobs()] == ["78"]


@pytest.mark.parametrize("state", ["RUNNING", "PENDING", "SUSPENDED"])
def test_the_living_job_of_an_earlier_start_is_taken_instead_of_its_nodes_again(site: Site, capsys, state) -> None:
    site.queue(site.row("55", state))
    assert commands.submit(site.record, CALL) == 0
    assert capsys.readouterr().out == "55\n"
    assert not site.called()


def test_a_job_found_again_keeps_its_log(site: Site) -> None:
    (site.folder / "logs/mine/train").mkdir(parents=True)
    for number in (1, 2):
        (site.folder / f"logs/mine/train/55-{number}.log").touch()
        os.utime(site.folder / f"logs/mine/train/55-{number}.log", (number, number))
    site.queue(site.row("55", "RUNNING"))
    commands.submit(site.record, CALL)
    assert (site.folder / "logs/mine/train.log").readlink() == Path("train/55-2.log")


def test_a_job_with_other_settings_or_inputs_is_neither_taken_nor_doubled(site: Site) -> None:
    site.queue(site.row("55", "RUNNING", fingerprint="other"))
    with pytest.raises(Exception, match=r"55 \(RUNNING\) already works on train"):
        commands.submit(site.record, CALL)
    assert not site.called()
    before = site.rule.fingerprint()
    (site.folder / "input").write_text("other tokens")
    assert site.rule.fingerprint() != before


@pytest.mark.parametrize(
    "row",
    [
        "55|RUNNING|run-0|(null)|/elsewhere|rule_train mine {fingerprint}",
        "55|RUNNING|run-0|(null)|{folder}|rule_train other {fingerprint}",
        "55|RUNNING|run-0|(null)|{folder}|rule_convert mine {fingerprint}",
        "55|COMPLETED|run-0|(null)|{folder}|rule_train mine {fingerprint}",
        "55|RUNNING|train|x/train.sbatch|{folder}|(null)",
    ],
)
def test_jobs_of_others_are_left_alone(site: Site, row: str) -> None:
    site.queue(row.format(folder=site.folder, fingerprint=site.rule.fingerprint()))
    assert commands.submit(site.record, CALL) == 0
    assert site.called()


def test_a_busy_controller_is_asked_again(site: Site, capsys) -> None:
    site.tool("sbatch", f"echo x >> tries; [ $(wc -l < tries) -gt 3 ] || {{ {BUSY}; }}; echo 78")
    assert commands.submit(site.record, CALL) == 0
    assert capsys.readouterr().out == "78\n"
    assert len((site.folder / "tries").read_text().splitlines()) == 4


def test_a_submission_that_succeeds_says_nothing_that_the_plugin_takes_for_a_failure(site: Site, capsys) -> None:
    failure = "echo 'sbatch: error: Batch job submission failed: Unable to contact slurm controller' >&2"
    told = "echo 'sbatch: note: yesterday a submission failed' >&2"
    site.tool("sbatch", f"[ -e tried ] || {{ touch tried; {failure}; exit 1; }}; {told}; echo 78")
    assert commands.submit(site.record, CALL) == 0
    printed = capsys.readouterr()
    assert printed.out == "78\n"
    assert "Unable to contact" in printed.err and "yesterday" in printed.err
    assert "submission failed" not in printed.err


def test_a_job_that_slurm_took_before_its_answer_was_lost_is_not_submitted_twice(site: Site, capsys) -> None:
    row = site.row("78", "PENDING", name="run-1")
    site.tool("squeue", f"if [ -e tries ]; then echo '{row}'; fi")
    site.tool("sbatch", "echo x >> tries; echo 'sbatch: error: Socket timed out on send/recv operation' >&2; exit 1")
    assert commands.submit(site.record, CALL) == 0
    assert capsys.readouterr().out == "78\n"
    assert (site.folder / "tries").read_text() == "x\n"


def test_a_refusal_is_passed_on_at_once(site: Site, capsys) -> None:
    site.tool("sbatch", "echo x >> tries; echo 'sbatch: error: invalid partition specified: gpu' >&2; exit 1")
    assert commands.submit(site.record, CALL) == 1
    assert "invalid partition" in capsys.readouterr().err
    assert (site.folder / "tries").read_text() == "x\n"


def test_a_retry_that_would_only_refuse_asks_for_nothing(site: Site, capsys) -> None:
    marker = site.record.marker("train")
    marker.parent.mkdir(parents=True)
    marker.write_text("attempt 1 ended with exit code 2, see train.log")
    assert commands.submit(site.record, [*CALL, "--wrap", "snakemake --attempt 2"]) == 1
    assert not site.called()
    assert "exit code 2" in capsys.readouterr().err
    assert commands.submit(site.record, [*CALL, "--wrap", "snakemake --attempt 1"]) == 0, "a new start forgets it"
    assert not marker.exists()


def test_the_commands_wait_for_no_folder_that_ends_with_this_snakemake(site: Site) -> None:
    wrapped = f"python -m snakemake --wait-for-files '{site.folder}/.snakemake/tmp.ab1' 'input' --attempt 1"
    commands.submit(site.record, [*CALL, f"--wrap={wrapped}"])
    assert ".snakemake/tmp" not in " ".join(site.called())
    assert f"--wait-for-files '{site.folder}' 'input'" in " ".join(site.called())


@pytest.mark.parametrize(
    ("output", "job"),
    [
        ("4711\n", "4711"),
        ("4711;cluster\n", "4711"),
        ("INFO: charging project abc, 128 GPU-hours left\n4711\n", "4711"),
        ("4711\nINFO: 128 hours left\n", "4711"),
        ("Submitted batch job 4711 on cluster a\n", "4711"),
        ("4 nodes, 128 hours\n", None),
        ("", None),
    ],
)
def test_a_wrapper_that_prints_lines_does_not_hide_the_job_id(output, job) -> None:
    assert queue.submitted_job(output) == job


# ---- starting and ending


def test_what_runs_of_an_earlier_start_is_told(site: Site, capsys) -> None:
    site.queue(site.row("55", "RUNNING"))
    start.say_what_runs(site.record, made=set())
    assert "55 (RUNNING) of an earlier start works on train: waiting for it" in capsys.readouterr().err
    site.queue(site.row("55", "RUNNING", "other"))
    with pytest.raises(BadInputError, match="with other settings or inputs"):
        start.say_what_runs(site.record, made=set())
    start.say_what_runs(site.record, made={"input"})


def dead_holder() -> dict:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return holders.own() | {"pid": process.pid, "started": "1", "job_id": None}


def lock_of(site: Site, name: str = "0.output.lock") -> dict[str, int]:
    path = site.folder / start.LOCKS / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("results/mine/receipts/train.json\n")
    return {str(start.LOCKS / name): path.stat().st_mtime_ns}


def free(*words: str) -> None:
    start.free_locks_of_the_dead(Path("logs/mine"), ["snakemake", *words], holders.own() | {"pid": 1})


def test_the_lock_of_a_process_that_is_gone_is_taken_over(site: Site, monkeypatch, capsys) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    site.new_record(holder=dead_holder(), locks=lock_of(site))
    free()
    assert not start._locks()
    assert "which is gone" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["living", "other host", "other container", "written anew", "nobody's"])
def test_a_lock_whose_owner_is_not_known_to_be_gone_stays(site: Site, monkeypatch, what: str) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    locks = lock_of(site)
    holder = {
        "living": holders.own(),
        "other host": dead_holder() | {"host": "login2"},
        "other container": dead_holder() | {"pids": "pid:[1]"},
        "written anew": dead_holder(),
        "nobody's": dead_holder(),
    }[what]
    if what == "written anew":
        locks = {name: written - 1 for name, written in locks.items()}
    site.new_record(holder=holder, locks={} if what == "nobody's" else locks)
    free()
    assert start._locks()


def test_who_holds_a_lock_on_another_host_is_told_with_the_command_to_type(site: Site, monkeypatch, capsys) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    site.new_record(holder=dead_holder() | {"host": "login2", "pid": 77}, locks=lock_of(site))
    free()
    told = capsys.readouterr().err
    assert "process 77 on login2" in told
    assert "ssh login2 ps -p 77" in told
    free("status")
    assert capsys.readouterr().err == ""


def test_a_host_that_was_started_anew_has_no_old_processes(monkeypatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert holders.reason_to_respect(holders.own()) is not None
    assert holders.reason_to_respect(holders.own() | {"boot": "earlier"}) is None


def test_a_second_snakemake_on_the_same_rules_is_refused(site: Site, monkeypatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    other = holders.own() | {"pid": os.getppid(), "started": holders.started(os.getppid())}
    site.new_record(holder=other)
    with pytest.raises(BadInputError, match="already works on train"):
        start.refuse_twin(Path("logs/mine"), {"train"}, holders.own())
    start.refuse_twin(Path("logs/mine"), {"render_sbatch"}, holders.own())
    site.new_record(holder=dead_holder())
    start.refuse_twin(Path("logs/mine"), {"train"}, holders.own())


def test_a_snakemake_that_is_a_requeued_job_does_not_take_its_own_past_for_a_twin(site: Site, monkeypatch) -> None:
    site.tool("squeue", "echo RUNNING")
    own = holders.own() | {"job_id": "900", "restarts": "1"}  # the plugin has removed SLURM_* from the environment
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    site.new_record(holder=dead_holder() | {"host": "node1", "job_id": "900", "restarts": "0"}, locks=lock_of(site))
    start.refuse_twin(Path("logs/mine"), {"train"}, own)
    start.free_locks_of_the_dead(Path("logs/mine"), [], own)
    assert not start._locks()
    site.new_record(holder=dead_holder() | {"host": "node1", "job_id": "901", "restarts": "0"})
    with pytest.raises(BadInputError, match="already works on train"):
        start.refuse_twin(Path("logs/mine"), {"train"}, own)


def test_after_an_interruption_no_job_is_left(site: Site, capsys) -> None:
    site.record.note("78", "train", "run-1")
    site.record.note("79", "train", "run-1")
    site.tool("squeue", f"[ -e cancelled ] || echo '{site.row('78', 'RUNNING')}'; echo '{site.row('80', 'RUNNING')}'")
    site.tool("scancel", 'echo "$@" > cancelled')
    site.record.interrupted_file.touch()
    start.end(site.record)
    assert (site.folder / "cancelled").read_text() == "78\n"
    assert not list(site.record.path.parent.iterdir())


def test_after_an_interruption_jobs_that_cannot_be_cancelled_are_told(site: Site, capsys, monkeypatch) -> None:
    monkeypatch.setattr(start, "CANCELLED_S", 0.0)
    site.record.note("78", "train", "run-1")
    site.queue(site.row("78", "RUNNING"))
    site.tool("scancel", "exit 1")
    site.record.interrupted_file.touch()
    start.end(site.record)
    assert "make sure with: scancel 78" in capsys.readouterr().err


def test_any_other_end_leaves_jobs_alone_and_says_so(site: Site, capsys) -> None:
    site.record.note("78", "train", "run-1")
    site.queue(site.row("78", "RUNNING"))
    site.tool("scancel", "touch cancelled")
    start.end(site.record)
    assert not (site.folder / "cancelled").exists()
    assert "78 goes on; the same command finds it again" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "config", "told"),
    [
        ({"requeue": True}, {"JobRequeue": "0"}, False),
        ({"requeue": False}, {"JobRequeue": "1"}, False),
        ({"requeue": False}, {"JobRequeue": "0"}, True),
        ({"requeue": False, "no_requeue": True}, {"JobRequeue": "1"}, True),
    ],
)
def test_where_jobs_are_not_requeued_it_is_said_at_start(capsys, settings, config, told) -> None:
    start.say_how_time_limits_end(type("Settings", (), settings)(), config)
    assert ("at most `retries` times" in capsys.readouterr().err) == told


# ---- retries


def test_a_retry_that_cannot_help_is_not_made(tmp_path: Path) -> None:
    said: list[str] = []
    number = retries.Retries(3, tmp_path / "train", said.append)
    assert [number > attempt - 1 for attempt in (1, 2, 3, 4)] == [True, True, True, False]
    (tmp_path / "train").mkdir()
    (tmp_path / "train/do-not-retry").write_text("attempt 1 ended with exit code 2\n")
    assert not number > 0
    assert said == ["train is not tried again: attempt 1 ended with exit code 2"]


# ---- asking with patience


def test_squeue_that_stays_silent_ends_with_a_crash_that_a_retry_helps(site: Site, monkeypatch) -> None:
    monkeypatch.setattr(queue, "PATIENCE_S", 0.2)
    site.tool("squeue", BUSY)
    with pytest.raises(CrashError, match="Unable to contact"):
        queue.state("11")


def test_squeue_that_answers_late_is_heard(site: Site) -> None:
    site.tool("squeue", f"echo x >> tries; [ $(wc -l < tries) -gt 4 ] || {{ {BUSY}; }}; echo RUNNING")
    assert queue.state("11") == "RUNNING"


# ---- stop


def test_stop_waits_until_training_has_saved(site: Site) -> None:
    site.tool("squeue", f"echo x >> tries; [ $(wc -l < tries) -gt 3 ] || echo '{site.row('55', 'RUNNING')}'")
    saved = site.folder / "results/mine/train/runs/a/step_9"
    saved.mkdir(parents=True)
    (saved / "committed.json").touch()
    told = stop.stop(Path("results/mine"), Path("logs/mine"), site.folder, pause=lambda _: None)
    assert (site.folder / "results/mine/train/stop").exists()
    assert "step_9" in told
    assert "rm results/mine/train/stop" in told


def test_stop_cancels_a_job_that_has_not_begun_and_forbids_its_retry(site: Site, capsys) -> None:
    site.queue(site.row("55", "PENDING"), f"56|PENDING|train|results/mine/train/train.sbatch|{site.folder}|(null)")
    site.tool("scancel", 'echo "$@" > cancelled')
    assert "nothing of training runs" in stop.stop(Path("results/mine"), Path("logs/mine"), site.folder)
    assert (site.folder / "cancelled").read_text() == "55 56\n"
    assert site.record.marker("train").exists()


def test_the_record_is_read_as_written(site: Site) -> None:
    assert record.Record.read(site.record.path) == site.record
    site.record.path.write_text(json.dumps({"version": "of tomorrow"}))
    assert record.Record.read(site.record.path) is None
