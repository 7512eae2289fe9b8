"""Files that grow while they are looked at: each line read once, whatever happens to the file meanwhile."""

import itertools
import json
import os
import random

import pytest
from unit.report import results as made

from deepseek_sft import json_files
from deepseek_sft.report import collect, follow, plots_experts
from deepseek_sft.training import run_folder


def lines(first: int, last: int) -> bytes:
    return b"".join(json.dumps(made.line(step)).encode() + b"\n" for step in range(first, last + 1))


def test_lines_read_piece_by_piece_are_those_of_the_report(tmp_path):
    path = tmp_path / "metrics.jsonl"
    chance, content = random.Random(7), lines(1, 60) + b"torn {\n" + lines(61, 120)
    follower, at = follow.Lines(path), 0
    assert follower.read() == []
    while at < len(content):
        piece = content[at : at + chance.randrange(1, 2000)]
        with open(path, "ab") as stream:
            stream.write(piece)
        at += len(piece)
        whole = content[: content.rfind(b"\n", 0, at) + 1]
        assert [line["step"] for line in follower.read()] == list(range(1, whole.count(b'"step"') + 1))
    assert follower.read() == collect.metrics(path)


def test_only_what_was_added_is_read(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(lines(1, 100))
    follower = follow.Lines(path)
    follower.read()
    parsed = []
    monkeypatch.setattr(follow.json_files, "parse", lambda text: parsed.append(text) or json.loads(text))
    with open(path, "ab") as stream:
        stream.write(lines(101, 102))
    assert len(follower.read()) == 102
    assert len(follower.read()) == 102
    assert len(parsed) == 2


def cut_as_a_resume_does(path):
    run_folder.cut_metrics(path.parent, 30)


def replaced_in_place_by_a_longer_one(path):
    with open(path, "r+b") as stream:  # the same inode
        stream.write(lines(1001, 1100))


def emptied(path):
    path.write_bytes(b"")


def removed(path):
    path.unlink()


@pytest.mark.parametrize(
    "happens", [cut_as_a_resume_does, replaced_in_place_by_a_longer_one, emptied, removed], ids=lambda one: one.__name__
)
def test_file_that_is_written_anew_is_read_anew(tmp_path, happens):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(lines(1, 60))
    follower = follow.Lines(path)
    follower.read()
    version = follower.version
    happens(path)
    assert follower.read() == collect.metrics(path)
    assert follower.version != version


def test_file_that_cannot_be_read_for_a_moment_keeps_its_lines(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(lines(1, 60))
    follower = follow.Lines(path)
    before = follower.read()

    def stale(*_):
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(follow.Lines, "_is_continued", stale)
    assert follower.read() == before


def test_lists_of_a_long_run_are_kept_in_few_lines_spread_over_it(tmp_path, monkeypatch):
    monkeypatch.setattr(follow, "KEPT_LISTS", 2 * 20)
    monkeypatch.setattr(plots_experts, "MOST_COLUMNS", 20)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(lines(1, 1000))
    follower = follow.Lines(path)
    found = follower.read()
    kept = [line["step"] for line in found if "expert_load_entropy" in line]
    assert len(found) == 1000
    assert 20 <= len(kept) <= 40
    assert {after - before for before, after in itertools.pairwise(kept)} == {kept[1] - kept[0]}
    assert kept[0] == 1 and kept[-1] > 950
    assert plots_experts.balance(found, 3) is not None


def test_last_whole_line_of_a_file_of_large_ones(tmp_path, monkeypatch):
    path = tmp_path / "expert_load.jsonl"
    last = follow.LastLine(path)
    assert last.read() == []
    whole = [json.dumps(made.expert_load(step)).encode() + b"\n" for step in (1, 60, 120)]
    path.write_bytes(whole[0] + whole[1] + whole[2][:200])
    assert last.read() == [made.expert_load(60)]
    path.write_bytes(b"".join(whole) + b"torn\n")
    monkeypatch.setattr(follow, "TAILS", (len(whole[2]) // 2, 1 << 20))  # the first look sees half of it
    assert last.read() == [made.expert_load(120)]
    monkeypatch.setattr(json_files, "parse", lambda *_: pytest.fail("read again without a change"))
    assert last.read() == [made.expert_load(120)]
    os.truncate(path, 0)
    assert last.read() == []
