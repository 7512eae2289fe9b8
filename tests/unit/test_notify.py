"""Promises of the user's command on events of a run: it is told what happened, and nothing it does hurts the run."""

import time

import pytest

from deepseek_sft import notify
from deepseek_sft.ending import Failure

WRITES = (
    'printf "%s|%s|%s|%s" "$DEEPSEEK_SFT_EVENT" "$DEEPSEEK_SFT_EXPERIMENT" "$DEEPSEEK_SFT_RULE" "$X" > "$PLACE.new"'
)
RENAMES = '; mv "$PLACE.new" "$PLACE"'


def soon(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_the_command_knows_what_happened(tmp_path, monkeypatch):
    place = tmp_path / "told"
    monkeypatch.setenv("PLACE", str(place))
    monkeypatch.setenv("X", "inherited")
    monkeypatch.setenv("DEEPSEEK_SFT_RULE", "of an earlier event")
    notify.tell(WRITES + RENAMES, "started", tmp_path / "mine", tmp_path / "logs")
    soon(place.exists)
    assert place.read_text() == "started|mine||inherited"


def test_what_the_command_prints_is_in_a_log(tmp_path):
    for word in ("one", "two"):
        notify.tell(f"echo {word}; echo {word} >&2", "finished", tmp_path / "mine", tmp_path / "logs")
        soon(lambda word=word: (tmp_path / "logs/notify.log").read_text().count(word) == 2)
    assert sorted((tmp_path / "logs/notify.log").read_text().split()) == ["one", "one", "two", "two"]


def test_a_command_that_hangs_is_not_waited_for_and_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(notify, "SECONDS", 0.2)
    monkeypatch.setattr(notify, "GRACE", 0.2)
    command = "trap '' TERM; echo begun; for i in $(seq 600); do sleep 1; done"
    started = []
    popen = notify.subprocess.Popen
    monkeypatch.setattr(notify.subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)))
    notify.tell(command, "failed", tmp_path / "mine", tmp_path / "logs")
    assert started[0].poll() is None, "returned while it runs"
    assert started[0].wait(60) != 0


def test_a_command_that_fails_or_cannot_be_started_hurts_nothing(tmp_path, monkeypatch, capsys):
    notify.tell("exit 3", "failed", tmp_path / "mine", tmp_path / "logs")
    notify.tell("no-such-program", "failed", tmp_path / "mine", tmp_path / "logs")
    soon(lambda: "no-such-program" in (tmp_path / "logs/notify.log").read_text())
    (tmp_path / "file").write_text("")
    notify.tell("true", "failed", tmp_path / "mine", tmp_path / "file")
    assert "notify: the command for failed could not be started" in capsys.readouterr().err


def test_without_a_command_nothing_is_written(tmp_path):
    notify.tell(None, "started", tmp_path / "mine", tmp_path / "logs")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("code", "event"), [("4", "stopped"), ("5", "failed"), ("3", "failed")])
def test_training_that_was_asked_to_end_has_stopped_and_not_failed(tmp_path, code, event):
    log = tmp_path / "train.log"
    log.write_text(f"error: something\n  fix: mend it\nexit code {code}, see {log}\n")
    assert notify.of_failure([Failure("train", log)], False) == (
        event,
        {"rule": "train", "exit_code": code, "log": str(log)},
    )


def test_an_interrupted_run_has_stopped_and_one_without_a_failed_rule_has_failed():
    assert notify.of_failure([], True) == ("stopped", {})
    assert notify.of_failure([], False) == ("failed", {})
