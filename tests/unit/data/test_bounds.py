"""Memory is bounded for every input: what is too large is named and not held, what cannot fit is not encoded."""

import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from unit.data.helpers import TOKENIZER, assistant, read_lines, user, write_lines

from deepseek_sft.data import lines, sources
from deepseek_sft.data.encoding import load_encoder
from deepseek_sft.data.lines import Oversized, split_lines
from deepseek_sft.data.messages import normalise
from deepseek_sft.data.parallel import chunked
from deepseek_sft.data.prepare import prepare
from deepseek_sft.data.samples import Settings, make_samples
from deepseek_sft.data.seen import Seen
from deepseek_sft.data.sources import find_sources, read_source
from deepseek_sft.data.tokenization import made_samples
from deepseek_sft.errors import BadInputError

R1 = "deepseek-r1"
CHAT = [user("q"), assistant("ok")]


def large(size: int, name: str = "big") -> dict:
    return {"id": name, "messages": [user("q " + "word " * (size // 5)), assistant("ok")]}


@pytest.fixture
def small_limit(monkeypatch):
    monkeypatch.setattr(lines, "LARGEST_RECORD", 20_000)
    monkeypatch.setattr(sources, "LARGEST_RECORD", 20_000)


@pytest.mark.parametrize("size", [1, 7, 4096, 100_000])
def test_lines_are_those_of_the_file_and_larger_ones_only_counted(size, small_limit):
    texts = [b"\xef\xbb\xbfa", b"", b"x" * 20_000, b"y" * 20_001, b"z" * 90_000, b"\xe2\x80\xa8", b"end"]
    data = b"\n".join(texts)
    found = list(split_lines(data[at : at + size] for at in range(0, len(data), size)))
    shown = [one if isinstance(one, bytes) else (one.head[:2], one.size) for one in found]
    assert shown == [b"a", b"", b"x" * 20_000, (b"yy", 20_001), (b"zz", 90_000), b"\xe2\x80\xa8", b"end"]
    assert all(len(one.head) <= 2 * size + lines.HEAD + 20_000 for one in found if isinstance(one, Oversized))


def test_a_line_beyond_the_limit_is_rejected_by_file_and_line(tmp_path, small_limit):
    source = write_lines(
        tmp_path / "in.jsonl", [{"messages": CHAT}, large(30_000), {"messages": [user("p"), *CHAT[1:]]}]
    )
    figures = prepare(find_sources([str(source)]), tmp_path / "train.jsonl", tmp_path / "rejects.jsonl")
    assert figures.accepted == 2
    (reject,) = read_lines(tmp_path / "rejects.jsonl")
    assert (reject["source"], reject["line"], reject["reason"]) == (str(source), 2, "too_large")
    assert "30," in reject["message"] and reject["excerpt"].startswith('{"id": "big"')


def test_a_row_beyond_the_limit_is_rejected_by_file_and_record(tmp_path, small_limit):
    rows = [{"id": str(n), "messages": CHAT} for n in range(3)] + [large(30_000)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "in.parquet")
    found = list(read_source(find_sources([str(tmp_path / "in.parquet")])[0]))
    assert [isinstance(one.payload, Oversized) for one in found] == [False, False, False, True]
    assert found[3].record == 4 and found[0].payload == rows[0]


def test_an_item_beyond_the_limit_stops_with_its_number(tmp_path, monkeypatch):
    monkeypatch.setattr("deepseek_sft.data.json_array.sized_items.__defaults__", (20_000,))
    (tmp_path / "in.json").write_text(json.dumps([{"messages": CHAT}, large(3_000_000)]))
    with pytest.raises(BadInputError, match="after record 1: the next one has more than 20,000 characters"):
        list(read_source(find_sources([str(tmp_path / "in.json")])[0]))


@pytest.mark.parametrize("rows", [1, 5, 1000])
def test_parquet_reads_the_same_for_any_row_group(rows, tmp_path):
    table = [{"id": str(n), "messages": [user("q" * (n % 50)), assistant("a" * n)]} for n in range(600)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), tmp_path / "in.parquet", row_group_size=rows)
    found = list(read_source(find_sources([str(tmp_path / "in.parquet")])[0]))
    assert [one.payload for one in found] == table and [one.record for one in found] == list(range(1, 601))


def test_a_text_that_cannot_fit_by_its_bytes_is_too_long_without_being_encoded(monkeypatch):
    encoder = load_encoder(TOKENIZER, R1)
    seen = []
    monkeypatch.setattr(type(encoder.words), "encode", lambda self, text: seen.append(len(text)))
    record = {"id": "x", "messages": normalise([*CHAT, user("word " * 100_000), assistant("A")])}
    made = make_samples([record], encoder, Settings(R1, 16))[0]
    assert [sample.id for sample in made.samples] == ["x#1"]
    ((name, reason, message),) = made.rejects
    least = 500_000 // encoder.longest
    assert (name, reason) == ("x#3", "too_long") and made.too_long[0] >= least
    assert message == f"at least {made.too_long[0]} tokens, more than 16" and max(seen, default=0) < 100


def test_a_bound_by_bytes_never_exceeds_the_tokens():
    encoder = load_encoder(TOKENIZER, R1)
    for text in (" " * 5000, "word " * 999, "中文" * 500, "\n" * 800, "=" * 700, "🙂é" * 99, "a"):
        assert encoder.least_tokens(text) <= len(encoder.text.encode(text, add_special_tokens=False).ids)


@pytest.mark.parametrize("text", ["word 中文 3.14\n" * 9000, "a" * 60_000, " " * 90_000])
def test_a_long_text_is_cut_to_the_tokens_it_begins_with(text):
    encoder = load_encoder(TOKENIZER, R1)
    record = {"id": "x", "messages": normalise([user("Q"), assistant(f"A{text}")])}
    (sample,) = make_samples([record], encoder, Settings(R1, 16, truncate=True))[0].samples
    whole = make_samples([record], encoder, Settings(R1, 1 << 20))[0].samples[0]
    assert sample.truncated and np.array_equal(sample.input_ids, whole.input_ids[:16])


def test_a_line_too_large_to_be_read_is_too_long_under_its_own_name(tmp_path, small_limit):
    records = [{"id": "a", "messages": normalise(CHAT)}, large(3_000_000, 'b"ig')]
    source = write_lines(tmp_path / "train.jsonl", records)
    one, two = made_samples(source, TOKENIZER, Settings(R1, 16))
    assert [sample.id for sample in one.samples] == ["a"]
    assert [(name, reason) for name, reason, _ in two.rejects] == [('b"ig', "too_long")]


def test_chunks_are_bounded_in_number_and_weight():
    weights = [1, 9, 1, 1, 30, 2, 3, 3, 3, 1]
    assert list(chunked(weights, 3, lambda w: w, 10)) == [[1, 9], [1, 1], [30], [2, 3, 3], [3, 1]]


def test_seen_is_a_dictionary_of_first_lines():
    chance = np.random.default_rng(1)
    digests = [bytes(2) + chance.integers(0, 3, 14, dtype=np.uint8).tobytes() for _ in range(3000)]
    seen, expected = Seen(), {}
    for line, digest in enumerate(digests + digests[::-1]):
        assert seen.setdefault(digest, line) == expected.setdefault(digest, line)
