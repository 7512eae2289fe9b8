"""Whatever stands in a field or a file: no traceback, no lost record, no output for a rejected one."""

import copy
import gzip
import json

import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.data.helpers import TOKENIZER, read_lines
from unit.data.records import RECORDS

from deepseek_sft.data.encoding import load_encoder
from deepseek_sft.data.messages import check_canonical
from deepseek_sft.data.prepare import convert_record, prepare
from deepseek_sft.data.rejection import REASONS
from deepseek_sft.data.samples import Settings, make_samples
from deepseek_sft.data.sources import RawRecord, find_sources
from deepseek_sft.errors import BadInputError

CASES = 20_000  # records in all, at least
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
texts = st.sampled_from(
    ["<think>", "</think>", "<think>R</think>A", " \n", "\ud800", "<answer>", "<|begin_of_thought|>"]
)
json_values = scalars | texts | st.recursive(
    scalars | texts,
    lambda inner: st.lists(inner, max_size=2)
    | st.dictionaries(st.sampled_from(["role", "content", "from", "value", "text", "name"]), inner, max_size=2),
    max_leaves=4,
)  # fmt: skip


def places(value, path=()):
    """Paths of every value inside a record."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


def changed(record, path, value):
    record = copy.deepcopy(record)
    inner = record
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return record


PLACES = {name: list(places(record)) for name, (record, _, _) in RECORDS.items()}
EXAMPLES = -(-CASES // sum(map(len, PLACES.values())))


@pytest.mark.parametrize("name", RECORDS)
def test_any_value_in_any_field_ends_as_one_sound_record_or_one_reason(name):
    record, chosen, _ = RECORDS[name]
    seen = 0

    @settings(deadline=None, max_examples=EXAMPLES, database=None)
    @given(json_values, st.booleans())
    def every_field(value, named):
        nonlocal seen
        accepted = []
        for path in PLACES[name]:
            raw = RawRecord("a.jsonl", chosen if named else "auto", 1, 1, changed(record, path, value))
            outcome = convert_record(raw)
            seen += 1
            if outcome.reason:
                assert outcome.reason in REASONS and not outcome.written
            else:
                accepted.append(json.loads(outcome.written))
                check_canonical(accepted[-1]["messages"])
        made = make_samples(accepted, load_encoder(TOKENIZER, "deepseek-r1"), Settings("deepseek-r1", 4096))
        assert all(one.samples and not one.rejects for one in made)

    every_field()
    assert seen >= EXAMPLES * len(PLACES[name]) * 0.9  # hypothesis may find fewer distinct values


LINES = "".join(json.dumps(record) + "\n" for record, _, _ in RECORDS.values()).encode()
ROWS = [{"messages": record["messages"]} for record, chosen, _ in RECORDS.values() if chosen == "openai"]


def containers():
    yield "a.jsonl", LINES
    yield "a.jsonl.gz", gzip.compress(LINES)
    yield "a.jsonl.zst", zstandard.compress(LINES)
    yield "a.json", json.dumps([record for record, _, _ in RECORDS.values()]).encode()
    sink = pa.BufferOutputStream()
    pyarrow.parquet.write_table(pa.Table.from_pylist(ROWS), sink)
    yield "a.parquet", sink.getvalue().to_pybytes()


@pytest.mark.parametrize(
    ("name", "data"), list(containers()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_cut_and_damaged_files_lose_no_record_silently(tmp_path, name, data):
    @settings(deadline=None, max_examples=60, database=None)
    @given(st.integers(0, len(data)), st.binary(max_size=6), st.integers(0, len(data)))
    def damaged(at, noise, end):
        (tmp_path / name).write_bytes(data[:at] + noise + (data[at + len(noise) : end] if end > at else b""))
        for file in ("train.jsonl", "rejects.jsonl"):
            (tmp_path / file).unlink(missing_ok=True)
        output, rejects = tmp_path / "train.jsonl", tmp_path / "rejects.jsonl"
        try:
            figures = prepare(find_sources([str(tmp_path / name)]), output, rejects)
        except BadInputError:
            assert not output.exists()
            return
        assert figures.records == len(read_lines(output)) + len(read_lines(rejects))
        assert not list(tmp_path.glob(".*"))

    damaged()


@settings(deadline=None, max_examples=200, database=None)
@given(st.lists(st.binary(max_size=30), max_size=8))
def test_binary_lines_end_in_rejects(tmp_path_factory, lines):
    folder = tmp_path_factory.mktemp("binary")
    content = b"\n".join([line.replace(b"\n", b"") for line in lines] + [LINES.splitlines()[0]])
    (folder / "a.jsonl").write_bytes(content)
    figures = prepare(find_sources([str(folder / "a.jsonl")]), folder / "train.jsonl", folder / "rejects.jsonl")
    assert figures.records == sum(bool(line.strip()) for line in content.removeprefix(b"\xef\xbb\xbf").split(b"\n"))
    assert figures.records == len(read_lines(folder / "train.jsonl")) + len(read_lines(folder / "rejects.jsonl"))


def parquet_of(path, answers, **columns):
    """Records of one question and an answer each, whose bytes need be no text."""
    table = {
        "instruction": pa.array([f"Q{number}" for number in range(len(answers))]),
        "output": pa.array(answers, pa.binary()).view(pa.string()),
        **columns,
    }
    pyarrow.parquet.write_table(pa.table(table), path)
    return path


@pytest.mark.parametrize("rows", [2, 700])
def test_a_parquet_text_that_is_no_utf8_costs_its_record_alone(tmp_path, rows):
    source = parquet_of(tmp_path / "a.parquet", [b"A"] * (rows - 1) + [b"\x80A"])
    figures = prepare(find_sources([f"alpaca={source}"]), tmp_path / "train.jsonl", tmp_path / "rejects.jsonl")
    (rejected,) = read_lines(tmp_path / "rejects.jsonl")
    assert figures.records == rows and len(read_lines(tmp_path / "train.jsonl")) == rows - 1
    assert (rejected["record"], rejected["reason"]) == (rows, "invalid_utf8")
    assert rejected["excerpt"] == "\\x80A"


def test_a_parquet_value_that_python_has_no_form_for_is_told_with_what_to_do(tmp_path):
    beyond_the_year_9999 = pa.scalar(1 << 40, pa.timestamp("s"))
    source = parquet_of(tmp_path / "a.parquet", [b"A"], at=pa.array([beyond_the_year_9999]))
    with pytest.raises(BadInputError, match=r"(?s)a\.parquet holds a value that Python has.*without that column"):
        prepare(find_sources([f"alpaca={source}"]), tmp_path / "train.jsonl", tmp_path / "rejects.jsonl")
    assert not (tmp_path / "train.jsonl").exists()
