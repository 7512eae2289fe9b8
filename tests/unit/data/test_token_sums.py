"""Token files are known by their content: a shard that was damaged or exchanged is named before it is trained on."""

import json

import numpy as np
import pytest

from deepseek_sft.data import tokens
from deepseek_sft.errors import BadInputError

VOCABULARY = 50


@pytest.fixture
def folder(tmp_path):
    """Three shards of two rows each."""
    writer = tokens.TokenWriter(tmp_path, shard_tokens=8, batch_tokens=8)
    for row in range(6):
        ids = np.arange(4, dtype=np.int32) + row
        writer.add(f"row-{row}", ids, ids, np.array([4], np.int32))
    shards = writer.close()
    tokens.write_index(tmp_path, {"shards": shards, "rows": 6, "vocab_size": VOCABULARY})
    return tmp_path


def test_whole_shards_pass(folder):
    assert tokens.check_shards(folder) == 3


def test_a_flipped_bit_is_named_by_its_shard(folder):
    path = folder / "shard-00001.arrow"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(BadInputError, match=r"shard-00001.arrow is damaged"):
        tokens.check_shards(folder)


def test_exchanged_shards_are_named_though_each_is_whole(folder):
    first, second = folder / "shard-00000.arrow", folder / "shard-00002.arrow"
    contents = first.read_bytes(), second.read_bytes()
    first.write_bytes(contents[1])
    second.write_bytes(contents[0])
    tokens.TokenDataset(folder)
    with pytest.raises(BadInputError, match=r"shard-00000.arrow is damaged"):
        tokens.check_shards(folder)


def test_a_folder_of_before_the_sums_is_read_and_not_said_to_be_checked(folder):
    index = json.loads((folder / "tokens.json").read_text())
    del index["sha256"]
    (folder / "tokens.json").write_text(json.dumps(index))
    assert tokens.check_shards(folder) == 0
    assert len(tokens.TokenDataset(folder)) == 6


def test_a_token_outside_the_vocabulary_names_shard_and_row(folder):
    index = json.loads((folder / "tokens.json").read_text())
    (folder / "tokens.json").write_text(json.dumps(index | {"vocab_size": 7}))
    rows = tokens.TokenDataset(folder)
    assert rows[3]["id"] == "row-3"
    with pytest.raises(BadInputError, match=r"shard-00002.arrow is damaged: row 4 holds token 7, the vocabulary has 7"):
        rows[4]


@pytest.mark.parametrize(
    "change",
    [{"shards": "x"}, {"shards": ["../x"]}, {"shards": [1]}, {"sha256": []}, {"rows": "6"}, {"vocab_size": None}],
)
def test_an_edited_index_is_refused_in_a_sentence(folder, change):
    index = json.loads((folder / "tokens.json").read_text())
    (folder / "tokens.json").write_text(json.dumps(index | change))
    with pytest.raises(BadInputError, match="does not name its shards"):
        tokens.TokenDataset(folder)
