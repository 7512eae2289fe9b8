"""A base is known by its content: a file that was damaged since prepare_model is named before it is trained."""

import json

import pytest

from deepseek_sft.convert import base_sums
from deepseek_sft.errors import BadInputError


@pytest.fixture
def base(tmp_path):
    folder = tmp_path / "base"
    folder.mkdir()
    for number in range(5):
        (folder / f"model-{number}.safetensors").write_bytes(bytes([number]) * 1000 * (number + 1))
    (folder / "config.json").write_text("{}")
    base_sums.write(tmp_path / "sums.json", folder, sorted(folder.glob("*.safetensors")), workers=2)
    return folder


def test_files_as_they_were_have_no_problem(base, tmp_path):
    sums = base_sums.read(tmp_path / "sums.json")
    assert len(sums) == 6 and base_sums.problems(base, sums, sums) == []


def test_a_flipped_bit_a_cut_file_and_a_missing_one_are_named(base, tmp_path):
    sums = base_sums.read(tmp_path / "sums.json")
    flipped = bytearray((base / "model-1.safetensors").read_bytes())
    flipped[777] ^= 8
    (base / "model-1.safetensors").write_bytes(flipped)
    (base / "model-2.safetensors").write_bytes(b"x")
    (base / "model-3.safetensors").unlink()
    found = base_sums.problems(base, sums, sums)
    assert [text.split(" ")[0].rpartition("/")[2] for text in found] == [f"model-{n}.safetensors" for n in (1, 2, 3)]


@pytest.mark.parametrize("ranks", [1, 2, 4, 9])
def test_each_file_is_read_by_one_rank_and_no_rank_reads_much_more_than_another(base, tmp_path, ranks):
    sums = base_sums.read(tmp_path / "sums.json")
    lots = base_sums.shares(sums, ranks)
    assert sorted(name for lot in lots for name in lot) == sorted(sums)
    loads = [sum(sums[name]["bytes"] for name in lot) for lot in lots]
    assert max(loads) - min(loads) <= max(entry["bytes"] for entry in sums.values())


def test_a_large_base_on_few_ranks_is_not_cheap():
    sums = {str(n): {"bytes": 5 << 30, "sha256": ""} for n in range(160)}
    assert not base_sums.is_cheap(sums, 8) and base_sums.is_cheap(sums, 72)


def test_edited_sums_are_refused_with_the_command(tmp_path):
    path = tmp_path / "sums.json"
    for content in ({"format": 2, "files": {}}, {"format": 1, "files": {"a": 7}}, {"format": 1, "files": []}):
        path.write_text(json.dumps(content))
        with pytest.raises(BadInputError) as error:
            base_sums.read(path)
        assert str(path) in error.value.problem and "--forcerun prepare_model" in error.value.fix
