"""What Snakemake's words become on the terminal, and what the last lines are made of."""

import logging
from pathlib import Path
from typing import Any

from snakemake.exceptions import LockException, format_exception_to_string
from snakemake_interface_logger_plugins.common import LogEvent

from deepseek_sft import starting, terminal


def tell(collector: terminal.Collector, text: str, event: LogEvent | None = None, **fields: Any) -> None:
    record = logging.LogRecord("snakemake", logging.INFO, "", 0, text, None, None)
    record.__dict__ |= {"event": event} | fields
    collector.emit(record)


def test_failed_attempt_that_a_retry_made_good_is_no_failure():
    seen = terminal.Seen()
    collector = terminal.Collector(seen)
    tell(collector, "", LogEvent.JOB_INFO, jobid=4, rule_name="train")
    tell(collector, "", LogEvent.JOB_ERROR, jobid=4, rule_name="train", log=["a.log", "7.log"], rule_msg="TIMEOUT")
    failure = seen.failures[4]
    assert (failure.rule, failure.log, failure.further, failure.said) == (
        "train",
        Path("a.log"),
        [Path("7.log")],
        "TIMEOUT",
    )
    tell(collector, "", LogEvent.JOB_FINISHED, job_id=4)
    assert seen.failures == {}
    assert seen.finished == ["train"]


def test_interruption_is_noticed():
    seen = terminal.Seen()
    tell(terminal.Collector(seen), "Terminating processes on user request, this might take some time.")
    assert seen.interrupted


def test_lock_of_snakemake_is_told_with_the_command_that_removes_it(monkeypatch):
    monkeypatch.setattr("sys.argv", ["snakemake", "data", "--profile", "profiles/local"])
    said = terminal.plain_error(format_exception_to_string(LockException()))
    assert said.startswith("error: this folder is locked")
    assert "snakemake data --profile profiles/local --unlock" in said
    assert len(said.splitlines()) <= 10


def test_error_of_ours_loses_the_place_in_the_snakefile():
    text = 'WorkflowError in file "/x/a.smk", line 22:\nbad\n  fix: good\n  File "/x/a.smk", line 22, in <module>'
    assert terminal.plain_error(text) == "error: bad\n  fix: good"


def test_traceback_of_a_defect_is_kept():
    text = "Traceback (most recent call last):\n  File x\nValueError: y"
    assert terminal.plain_error(text) == text


def test_reasons_are_short_whatever_the_settings_are():
    reason = f"Params have changed since last execution: {'{' + 'x' * 5000 + '}'}"
    assert terminal.short_reason(reason) == "Params have changed since last execution"
    reason = "Missing output files: a/receipts/train.json; Input files updated by another job: a/receipts/plan.json"
    assert terminal.short_reason(reason) == "no receipt yet; after plan"


def test_paths_of_every_machine_s_own_are_known_and_the_project_is_not_one(tmp_path, monkeypatch):
    monkeypatch.delenv("VCLUSTER_DIR", raising=False)
    project = tmp_path / "project"
    project.mkdir()
    assert starting.node_local(Path("/tmp/mine.jsonl"), project) == "/tmp"
    assert starting.node_local(Path("/dev/shm/x"), project) == "/dev/shm"
    assert starting.node_local(project / "data" / "a.jsonl", project) is None
    assert starting.node_local(Path("/data/mine.jsonl"), project) is None
    state = project / ".cluster" / "state"
    state.mkdir(parents=True)
    (state / "shape").write_text("namespaces 4\n")
    (state / "shares").write_text("/tmp/shared\n")
    assert starting.node_local(Path("/tmp/shared/a.jsonl"), project) is None
    assert starting.node_local(Path("/tmp/other/a.jsonl"), project) == "/tmp"


def test_last_configuration_file_must_name_the_experiment(tmp_path):
    for name, text in (("a", "experiment: demo\n"), ("b", "train: {}\n"), ("c", "experiment: mine\n")):
        (tmp_path / f"{name}.yaml").write_text(text)
    a, b, c = (str(tmp_path / f"{name}.yaml") for name in "abc")
    assert starting.unnamed({"experiment": "demo"}, [a, c, b], None) is not None
    assert starting.unnamed({"experiment": "mine"}, [a, b, c], None) is None
    assert starting.unnamed({"experiment": "demo"}, [a], None) is None
    assert starting.unnamed({"experiment": "x"}, [a, b], ["experiment=x"]) is None
