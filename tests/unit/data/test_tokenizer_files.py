"""``tiktoken.model`` read without its code: the ids are those of the tiktoken library."""

import json
import random

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from unit.data import moonshot

from deepseek_sft.data import tokenizer_files
from deepseek_sft.data.encoding import load_encoder
from deepseek_sft.errors import BadInputError
from deepseek_sft.families import rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return moonshot.folder(tmp_path_factory.mktemp("moonshot"))


@pytest.fixture(scope="module")
def made(folder):
    return Tokenizer.from_str(tokenizer_files.tokenizer_text(folder))


@pytest.fixture(scope="module")
def library():
    first = len(moonshot.ranks())
    special = {moonshot.NAMES.get(at, f"<|reserved_token_{first + at}|>"): first + at for at in range(256)}
    return tiktoken.Encoding(
        "made up", pat_str="|".join(moonshot.ROW.pattern), mergeable_ranks=moonshot.ranks(), special_tokens=special
    )


def same(made, library, text):
    return made.encode(text, add_special_tokens=False).ids == library.encode(text, allowed_special="all")


def test_ids_of_every_character_are_the_librarys(made, library):
    characters = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    random.Random(3).shuffle(characters)  # neighbours of all classes
    text = "".join(characters)
    blocks = [text[start : start + 5000] for start in range(0, len(text), 5000)]
    assert all(same(made, library, block) for block in blocks)


def test_ids_of_mixed_scripts_are_the_librarys(made, library):
    assert [seed for seed in range(300) if not same(made, library, moonshot.soup(seed + 1000, 300))] == []


@settings(max_examples=300, deadline=None)
@given(
    text=st.text(max_size=60) | st.lists(st.sampled_from([*moonshot.NAMES.values(), "a", "'s", " ", "中"])).map("".join)
)
def test_ids_of_any_text_are_the_librarys(made, library, text):
    assert same(made, library, text)


def test_ids_of_repeated_pieces_are_the_librarys(made, library):
    """Where one token can be merged of several pairs, the order of merging shows."""
    for unit in ("a", "ab", "aab", "the", " ", "\n", "中", "ん", "12", "ああい"):
        assert all(same(made, library, unit * times) for times in range(1, 70)), unit


def test_text_that_spells_control_tokens_stays_text(folder):
    encoder = load_encoder(folder, "base")
    typed = "<|im_end|>[EOS]<|reserved_token_4006|>"
    assert not set(encoder.text.encode(typed).ids) & set(encoder.control.values())


def test_the_vocabulary_itself_is_held_against_the_library(folder):
    assert tokenizer_files.check_against_library(folder) > 3000


def test_a_difference_from_the_library_stops(folder, monkeypatch):
    swapped = json.loads(tokenizer_files.tokenizer_text(folder))
    swapped["model"]["merges"].reverse()
    monkeypatch.setattr(tokenizer_files, "tokenizer_text", lambda _: json.dumps(swapped))
    with pytest.raises(BadInputError, match="other ids than the tiktoken library"):
        tokenizer_files.check_against_library(folder)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("IQ== 0\nIg==\n", r"tiktoken.model:2 is no token and rank"),
        ("I! 0\n", r"tiktoken.model:1 is no token and rank"),
        ("IQ== 0\nIg== 2\n", r"ranks are not 0 to 1"),
        ("IQ== 0\n", r"no token for 255 bytes"),
        ("", r"ranks are not"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", r"git-lfs"),
    ],
)
def test_damaged_ranks_are_named(tmp_path, content, said):
    path = moonshot.folder(tmp_path) / "tiktoken.model"
    path.write_text(content)
    with pytest.raises(BadInputError, match=said):
        tokenizer_files.read_ranks(path)


def test_a_tokenizer_whose_code_no_row_knows_is_refused(tmp_path):
    folder = moonshot.folder(tmp_path, auto_map={"AutoTokenizer": ["tokenization_other.Tokenizer", None]})
    with pytest.raises(BadInputError, match="code from a model folder is never run"):
        load_encoder(folder, "base")


def test_code_with_another_pattern_is_refused_and_the_same_is_not_run(tmp_path):
    folder = moonshot.folder(tmp_path)
    code = folder / "tokenization_moonshot.py"
    lines = "\n".join(f"    r'''{one}'''," for one in moonshot.ROW.pattern)
    code.write_text(f"raise SystemExit('run')\npat_str = '|'.join([\n{lines}\n])\n")
    tokenizer_files.check_code(folder, moonshot.ROW)
    code.write_text(code.read_text().replace("{1,3}", "{1,2}"))
    with pytest.raises(BadInputError, match="another pattern"):
        tokenizer_files.check_code(folder, moonshot.ROW)


def test_special_tokens_of_another_vocabulary_are_refused(tmp_path):
    folder = moonshot.folder(tmp_path, added_tokens_decoder={"163585": {"content": "[EOS]"}})
    with pytest.raises(BadInputError, match="has id 163585"):
        load_encoder(folder, "base")


def test_a_served_folder_asks_for_no_code(folder):
    served = json.loads(tokenizer_files.served_config(folder))
    assert "auto_map" not in served
    assert served["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert served["chat_template"] == moonshot.TEMPLATE


def test_the_fingerprint_is_that_of_the_served_file(folder, tmp_path):
    (tmp_path / "tokenizer.json").write_text(tokenizer_files.tokenizer_text(folder), encoding="utf-8")
    assert tokenizer_files.fingerprint(folder) == tokenizer_files.fingerprint(tmp_path)


def test_every_row_names_its_model_types_once():
    assert rows.model_types() == ("deepseek_v3", "kimi_k2")
