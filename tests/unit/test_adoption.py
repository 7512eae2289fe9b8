"""A copied experiment folder is recognised, refused, and made an experiment of its own by one command."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from deepseek_sft import adoption, chain, receipts
from deepseek_sft.errors import BadInputError

PROJECT = Path(__file__).resolve().parents[2]
RESULTS = {
    "prepare_data": {"data": "data/train.jsonl"},
    "tokenize_data": {"tokens": "data/tokens"},
    "train": {"checkpoint": "train/runs/abc/step_4", "run": "train/runs/abc"},
    "convert_checkpoint": {"model": "model"},
}


@pytest.fixture
def first(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    folder = Path("results/first")
    for rule, result in RESULTS.items():
        for name, place in result.items():
            (folder / place).mkdir(parents=True, exist_ok=True)
            (folder / place / chain.INSIDE.get(name, "file")).touch()
        named = {name: str(folder / place) for name, place in result.items()}
        inputs = {"before": {"path": str(folder / "receipts/x.json"), "fingerprint": "f"}}
        path = folder / "receipts" / f"{rule}.json"
        receipts.write(path, rule, inputs=inputs, settings={}, result=named, figures={})
    adoption.check(folder)
    return folder


def test_a_copy_is_refused_with_the_command_that_adopts_it_also_where_the_original_has_gone(first):
    second = Path(shutil.copytree(first, "results/the second"))
    command = r"python workflow/scripts/adopt.py 'results/the second'"
    with pytest.raises(BadInputError, match=command):
        adoption.check(second)
    shutil.rmtree(first)
    with pytest.raises(BadInputError, match=command):
        adoption.check(second)


def test_an_adopted_copy_stands_on_its_own_files_and_keeps_its_times(first):
    second = Path(shutil.copytree(first, "results/second"))
    times = {path.name: path.stat().st_mtime_ns for path in second.glob("receipts/*")}
    before = {path: path.read_bytes() for path in first.glob("receipts/*")}
    script = PROJECT / "workflow/scripts/adopt.py"
    subprocess.run([sys.executable, str(script), str(second)], check=True, capture_output=True)
    adoption.check(second)
    shutil.rmtree(first / "train")
    assert not any(chain.state(second, rule).gone for rule in RESULTS)
    assert receipts.read(second / "receipts/train.json", "train")["inputs"]["before"]["path"].startswith(str(second))
    assert {path.name: path.stat().st_mtime_ns for path in second.glob("receipts/*")} == times
    assert {path: path.read_bytes() for path in first.glob("receipts/*")} == before


def test_what_was_not_copied_along_is_said_before_anything_is_changed(first):
    second = Path(shutil.copytree(first, "results/second"))
    shutil.rmtree(second / "train")
    before = {path: path.read_bytes() for path in second.glob("receipts/*")}
    with pytest.raises(BadInputError, match=r"results/second/train/runs/abc/step_4 was not copied along"):
        adoption.adopt(second)
    assert {path: path.read_bytes() for path in second.glob("receipts/*")} == before


def test_results_behind_a_link_inside_the_folder_are_its_own(first, tmp_path):
    scratch = tmp_path / "scratch"
    shutil.move(first / "train", scratch)
    (first / "train").symlink_to(scratch)
    adoption.check(first)
    with pytest.raises(BadInputError, match="is no copied experiment"):
        adoption.adopt(first)
