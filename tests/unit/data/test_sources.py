"""Every source is accounted for: how much of it was accepted, what it is instead of records, which path it names."""

import json
import re

import pytest
from unit.data.helpers import assistant, read_lines, run_script, user, write_lines

from deepseek_sft.data.prepare import prepare
from deepseek_sft.data.sources import find_sources
from deepseek_sft.errors import BadInputError
from deepseek_sft.experiment import split_argument


def chat(text="Q", **fields):
    return {"messages": [user(text), assistant("A")], **fields}


def script(tmp_path, *sources, words=()):
    outputs = ("--output", tmp_path / "t.jsonl", "--rejects", tmp_path / "r.jsonl", "--receipt", tmp_path / "p.json")
    return run_script("prepare_data.py", "--source", *sources, *outputs, *words)


@pytest.fixture
def sources(tmp_path):
    good = write_lines(tmp_path / "good.jsonl", [chat("1"), chat("2"), "{"])
    bad = write_lines(tmp_path / "bad.jsonl", [{"messages": [user(str(n))]} for n in range(2)])
    again = write_lines(tmp_path / "again.jsonl", [chat("1")])
    empty = write_lines(tmp_path / "empty.jsonl", [])
    return good, bad, again, empty


def test_accepted_of_read_is_told_for_every_source(tmp_path, sources):
    done = script(tmp_path, *sources)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    for path, counts in zip(sources, ("2 of 3", "0 of 2", "0 of 1", "0 of 0"), strict=True):
        assert any(line.startswith(f"{path}: ") and line.endswith(f"; {counts} records accepted") for line in lines), (
            done.stderr
        )
    figures = json.loads((tmp_path / "p.json").read_text())["figures"]["sources"]
    assert [(one["accepted"], one["records"]) for one in figures.values()] == [(2, 3), (0, 2), (0, 1), (0, 0)]
    assert list(figures) == [str(path) for path in sources]
    assert figures[str(sources[1])]["rejects"] == {"no_trained_turn": 2}


def test_a_source_that_gives_nothing_is_a_warning_that_names_it_and_the_reasons(tmp_path, sources):
    warnings = [line for line in script(tmp_path, *sources).stderr.splitlines() if line.startswith("warning: source")]
    for path, reason in zip(sources[1:], ("no_trained_turn 2", "duplicate 1", "it holds no record"), strict=True):
        assert any(str(path) in line and reason in line for line in warnings)
    assert len(warnings) == 3


def test_a_source_that_gives_nothing_fails_on_request(tmp_path, sources):
    done = script(tmp_path, *sources, words=("--on-empty-source", "fail"))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert all(str(path) in done.stderr.rpartition("error: ")[2] for path in sources[1:])
    assert not (tmp_path / "t.jsonl").exists() and len(read_lines(tmp_path / "r.jsonl")) == 4
    assert script(tmp_path, sources[0], words=("--on-empty-source", "fail")).returncode == 0


PRETTY = json.dumps(chat(), indent=2)


@pytest.mark.parametrize(
    ("name", "text", "hint"),
    [
        ("a.jsonl", f"{PRETTY}\n{PRETTY}\n", "jq -c . a.jsonl"),
        ("a.json", PRETTY, "jq -c . a.json"),
        ("a.jsonl", f"[\n{PRETTY},\n{PRETTY}\n]\n", "name it a.json"),
        ("a.jsonl", json.dumps([chat(), chat()]), "name it a.json"),
        ("a.jsonl", "version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n", "git lfs pull"),
        ("a.jsonl", json.dumps({"messages": json.dumps([user()])}), "messages is not a list: it is JSON text"),
        ("a.jsonl", json.dumps({"conversations": "[]"}), "conversations is missing or not a list: it is JSON text"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("beside", [False, True])
def test_what_stands_there_instead_of_records_is_said(tmp_path, name, text, hint, beside):
    (tmp_path / name).write_text(text)
    good = [write_lines(tmp_path / "good.jsonl", [chat()])] if beside else []
    done = script(tmp_path, tmp_path / name, *good)
    assert done.returncode == (0 if beside else 2)
    rejects = " ".join(one["message"] for one in read_lines(tmp_path / "r.jsonl"))
    assert hint in done.stderr + rejects, done.stderr


def test_a_folder_of_save_to_disk_is_called_so(tmp_path):
    folder = tmp_path / "saved"
    folder.mkdir()
    with pytest.raises(BadInputError, match=r"name its files"):
        find_sources([str(folder)])
    (folder / "state.json").write_text("{}")
    with pytest.raises(BadInputError, match=r"save_to_disk of datasets wrote it.*to_parquet"):
        find_sources([str(folder)])
    (folder / "data-00000-of-00001.arrow").write_bytes(b"")
    with pytest.raises(BadInputError, match=r"to_parquet"):
        find_sources([f"{folder}/*.arrow"])


@pytest.mark.parametrize(
    "pattern", ["split=train/*.jsonl", "split=train/a.jsonl", "opennai=x/*.jsonl", "auto=split=train/*"]
)
def test_an_equals_sign_may_belong_to_the_path(tmp_path, monkeypatch, pattern):
    monkeypatch.chdir(tmp_path)
    for folder in ("split=train", "opennai=x"):
        (tmp_path / folder).mkdir()
        write_lines(tmp_path / folder / "a.jsonl", [chat()])
    (found,) = find_sources([pattern])
    assert found.format == "auto" and found.path.name == "a.jsonl"
    assert split_argument(pattern)[1] == pattern.removeprefix("auto=")  # the rules look at the same files


def test_a_path_with_an_equals_sign_that_does_not_exist_is_told_the_formats():
    with pytest.raises(BadInputError, match=r"foo=nowhere/a\.jsonl does not exist\n.*openai"):
        find_sources(["foo=nowhere/a.jsonl"])


def test_a_second_mention_with_another_weight_or_format_is_not_dropped_without_a_word(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [chat()])
    said = script(tmp_path, f"{tmp_path}/*.jsonl", path, words=("--weights", "1", "2")).stderr
    assert re.search(r"warning: .*a\.jsonl is named twice; .* weight 1 \(not auto, 2\)", said)
    assert "twice" not in script(tmp_path, path, path).stderr


def test_a_folder_that_a_pattern_matches_is_not_dropped_without_a_word(tmp_path):
    write_lines(tmp_path / "a.jsonl", [chat()])
    (tmp_path / "b.jsonl").mkdir()
    (tmp_path / "c").mkdir()
    write_lines(tmp_path / "c" / "d.jsonl", [chat("2")])
    assert "b.jsonl matches" in script(tmp_path, f"{tmp_path}/*.jsonl").stderr
    (tmp_path / "b.jsonl").rmdir()
    for name in ("t.jsonl", "r.jsonl", "p.json"):
        (tmp_path / name).unlink()
    done = script(tmp_path, f"{tmp_path}/**/*.jsonl")
    assert "warning" not in done.stderr and json.loads((tmp_path / "p.json").read_text())["figures"]["accepted"] == 2


def test_more_records_read_change_no_other_source(tmp_path, sources):
    figures = prepare(find_sources([str(p) for p in sources]), tmp_path / "t.jsonl", tmp_path / "r.jsonl", workers=2)
    assert figures.records == sum(one["records"] for one in figures.sources.values()) == 6
