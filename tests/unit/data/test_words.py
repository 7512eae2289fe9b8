"""The fast encoder gives exactly the library's ids, or leaves the text to it."""

import itertools
import json
import random
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from unit.data.helpers import PROJECT, TOKENIZER

from deepseek_sft.data.words import REMEMBERED, WordEncoder, word_encoder

DESCRIPTION = json.loads((TOKENIZER / "tokenizer.json").read_text(encoding="utf-8"))
PLAIN = Tokenizer.from_str(json.dumps(DESCRIPTION | {"added_tokens": [], "post_processor": None}))
FAST = word_encoder(PLAIN, DESCRIPTION)
BLOCKS = [*range(0, 0xD800, 128), *range(0xE000, 0x20800, 128), *range(0x30000, 0x30400, 128), 0xE0000, 0xE0100]
anything = st.characters(exclude_categories=["Cs"])
tricky = st.sampled_from(
    [*" \t\r\n\x0b\x0c\x85\xa0\u2028\u3000\u200b\ufeff", *"a1中か!'_<₂Ⅷ²", "  ", "\r\n", "e\u0301", "'s", *"🙂𝟏𝐱\ue000"]
)


def same(text: str) -> bool:
    found = FAST.encode(text)
    return found is None or found.tolist() == PLAIN.encode(text, add_special_tokens=False).ids


@settings(deadline=None, max_examples=1500)
@given(st.lists(st.text(anything, max_size=6) | tricky, max_size=20).map("".join))
def test_ids_equal_the_librarys_for_any_text(text):
    assert same(text)


@settings(deadline=None, max_examples=1500)
@given(st.lists(tricky, max_size=30).map("".join))
def test_ids_equal_the_librarys_where_words_meet(text):
    assert same(text)


def test_ids_equal_the_librarys_for_every_character_before_and_after_others():
    for code in range(0, 0x10000, 97):
        block = [chr(c) for c in range(code, min(code + 97, 0x10000)) if not 0xD800 <= c < 0xE000]
        for text in ("".join(block), " ".join(block), "a".join(block), "1!\n".join(block)):
            assert same(text), hex(code)


SIGNS = "\u3040\u3097\u3098\u309b\u309c\u30a0\u30fb"  # within the kana, and no letters


def test_ids_equal_the_librarys_on_kana_that_are_no_letters():
    around = [*SIGNS, *"フっ゙中龥。、々aA1 \n!_é", "🙂", "  "]
    for first, second, third in itertools.product(around, SIGNS, around):
        text = f"{first}{second}{third}{first}"
        assert same(text), text


@settings(deadline=None, max_examples=1500)
@given(st.integers(0, 2**32 - 1))
def test_ids_equal_the_librarys_on_mixed_text_of_any_blocks(seed):
    chance = random.Random(seed)
    blocks = [chance.choice(BLOCKS) for _ in range(chance.randint(1, 4))]
    pick = (chr(chance.randrange(block, block + 128)) for block in chance.choices(blocks, k=40))
    text = "".join(chance.choice([character, character, *SIGNS, *" \n!1aフ中"]) for character in pick)
    assert same(text)


def test_ids_equal_the_librarys_on_real_pages():
    for page in [*PROJECT.glob("*.md"), *PROJECT.glob("docs/*.md"), *PROJECT.glob("workflow/deepseek_sft/data/*.py")]:
        text = unicodedata.normalize("NFC", page.read_text(encoding="utf-8"))
        assert same(text), page


def test_characters_beyond_the_first_plane_are_encoded_too():
    for text in ("a 🙂 b", "👩\u200d🚀🙂🙂!a\x00\x01b𝐱𝟏𠀀x\U0001d165\U000e0001 \U000f0000a", "", "𝟏𝟐𝟑𝟒1"):
        assert FAST.encode(text) is not None and same(text)


def test_text_with_stand_ins_of_its_own_is_left_to_the_library():
    assert FAST.encode("a\ue003🙂") is None and FAST.encode("\ue006") is not None


def test_memory_of_words_is_bounded(monkeypatch):
    monkeypatch.setattr("deepseek_sft.data.words.REMEMBERED", 50)
    encoder = WordEncoder(PLAIN)
    for number in range(500):
        encoder.encode(f"w{number}x{'y' * (number % 60)} ")
    assert max(len(encoder._ids), len(encoder._after_space)) <= 50 < REMEMBERED


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "NFC"}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}},
        {"model": DESCRIPTION["model"] | {"byte_fallback": True}},
        {"model": {"type": "WordLevel"}},
    ],
)
def test_another_kind_of_tokenizer_is_left_to_the_library(change):
    assert word_encoder(PLAIN, DESCRIPTION | change) is None


spaced = st.sampled_from(
    [*" \t\n\r\x1c\x85\u3000", "  ", "   ", "a", "1", "中", "か", "!", "_", "\u0301", "\x00", "🙂", "'s"]
)


@settings(deadline=None, max_examples=1500)
@given(st.lists(spaced, max_size=16).map("".join))
def test_ids_equal_the_librarys_whatever_stands_around_spaces(text):
    assert same(text)
    assert same(f"{text} {text}  {text}")
