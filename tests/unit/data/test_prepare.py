"""prepare_data: every record ends in exactly one file, whatever the container, the damage or the number of workers."""

import gzip
import json
import random
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.data.helpers import PROJECT, assistant, read_lines, run_script, user, write_lines

from deepseek_sft.data.json_array import ArrayError, sized_items
from deepseek_sft.data.prepare import convert_record, prepare
from deepseek_sft.data.sources import RawRecord, Source, find_sources, read_source
from deepseek_sft.errors import BadInputError

DEMO = PROJECT / "resources" / "demo"


def chat(text="Q", **fields):
    return {"messages": [user(text), assistant("A", **fields)]}


def payloads(path):
    return [raw.payload for raw in read_source(Source(path, "auto"))]


def run(tmp_path, *sources, **options):
    output, rejects = tmp_path / "train.jsonl", tmp_path / "rejects.jsonl"
    figures = prepare(find_sources([str(s) for s in sources]), output, rejects, **options)
    return figures, read_lines(output), read_lines(rejects)


def test_all_containers_give_the_same_records(tmp_path):
    records = [{"id": f"r{i}", **chat(f"问题 {i}")} for i in range(700)]
    lines = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records).encode()
    frames = b"".join(zstandard.compress(part) for part in (lines[:5000], lines[5000:]))
    for name, data in {
        "a.jsonl": lines,
        "b.jsonl.gz": gzip.compress(lines),
        "c.jsonl.zst": frames,
        "d.json": json.dumps(records, indent=2, ensure_ascii=False).encode(),
        "e.json.gz": gzip.compress(json.dumps(records).encode()),
        "f.json": lines,
        "g.ndjson": b"\xef\xbb\xbf" + lines.replace(b"\n", b"\r\n"),
    }.items():
        (tmp_path / name).write_bytes(data)
    pyarrow.parquet.write_table(pa.Table.from_pylist(records), tmp_path / "h.parquet")
    expected = None
    for path in sorted(tmp_path.glob("?.*")):
        figures, accepted, rejected = run(tmp_path, path)
        expected = expected or accepted
        assert (figures.accepted, rejected) == (700, []), path
        assert accepted == expected, path


def test_parquet_nulls_for_missing_fields_are_not_values(tmp_path):
    records = [
        chat("Q1"),
        {"messages": [user("Q2"), assistant("A", loss=False), user("Q3"), assistant("B", reasoning="R")]},
    ]
    pyarrow.parquet.write_table(pa.Table.from_pylist(records), tmp_path / "a.parquet")
    _, accepted, rejected = run(tmp_path, tmp_path / "a.parquet")
    assert not rejected
    assert [m["loss"] for r in accepted for m in r["messages"] if m["role"] == "assistant"] == [True, False, True]


def test_rejected_record_keeps_its_line_and_record_number(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [chat("Q1"), "", "{broken", chat("Q2"), {"id": "x", "messages": []}])
    _, accepted, rejected = run(tmp_path, path)
    assert [r["id"] for r in accepted] == ["a.jsonl:1", "a.jsonl:3"]
    assert [(r["line"], r["record"], r["id"], r["reason"]) for r in rejected] == [
        (3, 2, "a.jsonl:2", "invalid_json"),
        (5, 4, "x", "no_messages"),
    ]
    assert all(r["source"] == str(path) and r["message"] for r in rejected)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"\xff\xfe{}", "invalid_utf8"),
        (b"{", "invalid_json"),
        (b"[" * 100_000, "invalid_json"),
        (b'{"id": ' + b"9" * 5000 + b"}", "invalid_json"),
        (b"[1]", "not_an_object"),
        (b"null", "not_an_object"),
        (json.dumps(chat("\ud800")).encode(), "invalid_text"),
    ],
)
def test_damaged_line_is_rejected_with_its_reason(tmp_path, line, reason):
    (tmp_path / "a.jsonl").write_bytes(line + b"\n" + json.dumps(chat()).encode())
    figures, _, rejected = run(tmp_path, tmp_path / "a.jsonl")
    assert (figures.accepted, [r["reason"] for r in rejected]) == (1, [reason])


def test_separators_inside_text_are_not_line_ends(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [chat("a\u2028b\x85c\x0bd")])
    _, accepted, _ = run(tmp_path, path)
    assert accepted[0]["messages"][0]["content"] == "a\u2028b\x85c\x0bd"


def test_duplicate_is_rejected_and_can_be_kept(tmp_path):
    path = write_lines(
        tmp_path / "a.jsonl", [{"id": "1", **chat()}, {"id": "2", **chat()}, {"id": "3", **chat(loss=True)}]
    )
    figures, accepted, rejected = run(tmp_path, path)
    assert ([r["id"] for r in accepted], [r["reason"] for r in rejected]) == (["1"], ["duplicate"] * 2)
    assert "line 1 " in rejected[0]["message"]
    figures, accepted, _ = run(tmp_path, path, keep_duplicates=True)
    assert figures.accepted == len(accepted) == 3


def test_figures_count_turns(tmp_path):
    turns = [user("Q"), assistant("A", loss=False), user("Q"), assistant("A", reasoning="R")]
    figures, _, _ = run(tmp_path, write_lines(tmp_path / "a.jsonl", [{"messages": turns}, chat(), "["]))
    assert (figures.turns, figures.trained_turns, figures.with_reasoning) == (3, 2, 1)
    assert (figures.records, figures.accepted, figures.rejected) == (3, 2, 1)
    assert figures.as_dict()["rejects"] == {"invalid_json": 1}


def test_result_does_not_depend_on_workers(tmp_path):
    lines = [chat(f"Q{i % 900}") if i % 7 else "{" for i in range(1300)]
    path = write_lines(tmp_path / "a.jsonl", lines)
    one = run(tmp_path, path)
    assert run(tmp_path, path, workers=2) == one
    assert one[0].records == 1300


def test_nothing_accepted_is_an_error_that_says_why(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", ["{", {"messages": []}])
    with pytest.raises(BadInputError, match=r"none of 2 records.*invalid_json 1"):
        run(tmp_path, path)
    assert not (tmp_path / "train.jsonl").exists()
    assert len(read_lines(tmp_path / "rejects.jsonl")) == 2


def test_empty_source_is_an_error(tmp_path):
    with pytest.raises(BadInputError, match="empty"):
        run(tmp_path, write_lines(tmp_path / "a.jsonl", []))


def test_fail_stops_at_the_first_invalid_record_and_writes_nothing(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [chat(), "{", "{"])
    with pytest.raises(BadInputError, match=r"a\.jsonl:2: invalid_json"):
        run(tmp_path, path, fail_on_invalid=True)
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl.gz", gzip.compress(random.Random(0).randbytes(5000))[:-20]),
        ("a.jsonl.gz", b"not gzip"),
        ("a.jsonl.zst", zstandard.compress(random.Random(0).randbytes(5000))[:-20]),
        ("a.jsonl.zst", b"not zstandard"),
        ("a.parquet", b"PAR1 no PAR1"),
        ("a.json", b'[{"messages": []}, {"mess'),
        ("a.json", b"[1, 2"),
        ("a.json", b"[1 2]"),
        ("a.json", b"[1, 2] 3"),
        ("a.json", b"[1, \xff]"),
        ("a.json", b"[" * 100_000),
    ],
)
def test_damaged_container_stops_and_names_the_file(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(BadInputError, match=name):
        payloads(tmp_path / name)


def test_missing_source_is_named_with_near_matches(tmp_path):
    write_lines(tmp_path / "chats.jsonl", [])
    with pytest.raises(BadInputError, match=r"chat\.jsonl does not exist\n.*did you mean .*chats\.jsonl"):
        find_sources([str(tmp_path / "chat.jsonl")])


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("opennai={}/a.jsonl", "did you mean openai"),
        ("{}/*.txt", "matches no file"),
        ("{}", "is a folder"),
        ("{}/a.csv", "no known kind"),
        ("{}/nowhere/a.jsonl", "nowhere does not exist"),
    ],
)
def test_unusable_source_is_refused_with_the_fix(tmp_path, argument, message):
    write_lines(tmp_path / "a.jsonl", [])
    write_lines(tmp_path / "a.csv", [])
    with pytest.raises(BadInputError, match=message):
        find_sources([argument.format(tmp_path)])


def test_globs_are_sorted_and_each_file_is_read_once(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "x=y.jsonl"):
        write_lines(tmp_path / name, [])
    found = find_sources([f"sharegpt={tmp_path}/b.jsonl", f"{tmp_path}/*.jsonl", f"{tmp_path}/x=y.jsonl"])
    assert [(s.path.name, s.format) for s in found] == [
        ("b.jsonl", "sharegpt"),
        ("a.jsonl", "auto"),
        ("x=y.jsonl", "auto"),
    ]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)


@given(st.lists(json_values, max_size=6), st.integers(1, 40), st.booleans())
def test_array_reader_equals_json_for_any_block_size(items, size, indented):
    data = json.dumps(items, ensure_ascii=indented, indent=1 if indented else None).encode("utf-8", "surrogatepass")
    try:
        data.decode()
    except UnicodeDecodeError:
        return
    blocks = (data[at : at + size] for at in range(0, len(data), size))
    assert [item for item, _ in sized_items(blocks)] == items


@given(st.lists(json_values, min_size=1, max_size=4), st.integers(1, 20), st.data())
def test_array_reader_refuses_every_cut(items, size, data):
    whole = json.dumps(items).encode()
    cut = whole[: data.draw(st.integers(0, len(whole) - 1))]
    with pytest.raises(ArrayError):
        list(sized_items(cut[at : at + size] for at in range(0, len(cut), size)))


messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": st.text(max_size=8) | st.none()},
        optional={
            "loss": st.sampled_from([True, False, None, 0, 1, "false", "x"]),
            "reasoning_content": st.sampled_from(["", "why", "<think>", None]),
        },
    ),
    max_size=5,
)
records = st.fixed_dictionaries({"messages": messages}) | json_values


@settings(deadline=None, max_examples=60)
@given(st.lists(records, max_size=20))
def test_every_record_ends_in_exactly_one_file_in_order(tmp_path_factory, items):
    folder = tmp_path_factory.mktemp("conservation")
    good = {"messages": [user("the last one"), assistant("A")]}
    path = write_lines(folder / "a.jsonl", [json.dumps(item) for item in [*items, good]])
    figures, accepted, rejected = run(folder, path, keep_duplicates=True)
    kept = {int(r["id"].split(":")[1]) for r in accepted if str(r["id"]).startswith("a.jsonl:")}
    numbers = [r["record"] for r in rejected]
    assert figures.records == len(items) + 1 == len(accepted) + len(rejected)
    assert numbers == sorted(set(numbers)) and not kept & set(numbers)
    for record in accepted:
        for message in record["messages"]:
            assert (type(message.get("loss")) is bool) == (message["role"] == "assistant")
        assert any(m.get("loss") for m in record["messages"])


@given(json_values)
def test_no_json_value_breaks_a_record(value):
    outcome = convert_record(RawRecord("a.jsonl", "auto", 1, 1, {"messages": value}))
    assert outcome.reason


def test_script_writes_receipt_and_result(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [chat(), "{"])
    receipt = tmp_path / "receipts" / "prepare_data.json"
    done = run_script(
        "prepare_data.py", "--source", path, "--output", tmp_path / "out" / "train.jsonl",
        "--rejects", tmp_path / "out" / "rejects.jsonl", "--receipt", receipt,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    written = json.loads(receipt.read_text())
    assert written["rule"] == "prepare_data"
    assert set(written["result"]) == {"data", "rejects"}
    assert written["figures"]["accepted"] == written["figures"]["rejected"] == 1
    assert str(path) in written["inputs"]


def test_script_exits_2_without_traceback_or_receipt(tmp_path):
    receipt = write_lines(tmp_path / "prepare_data.json", [{"stale": True}])
    path = write_lines(tmp_path / "a.jsonl", ["{"])
    done = run_script(
        "prepare_data.py",
        "--source",
        path,
        "--output",
        tmp_path / "t",
        "--rejects",
        tmp_path / "r",
        "--receipt",
        receipt,
    )
    assert done.returncode == 2
    assert "error: none of 1 records" in done.stderr and "Traceback" not in done.stderr
    assert not receipt.exists()


@pytest.mark.parametrize(("broken", "said"), [(2, "warning: 2 rejected ("), (1, "1 rejected (")])
def test_script_warns_where_most_records_are_rejected(tmp_path, broken, said):
    good = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    path = write_lines(tmp_path / "a.jsonl", [good, *["{"] * broken])
    outputs = ("--output", tmp_path / "t", "--rejects", tmp_path / "r", "--receipt", tmp_path / "p.json")
    done = run_script("prepare_data.py", "--source", path, *outputs)
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "rejected (" in line]
    assert said in line and ("warning" in line) == ("warning" in said)


def test_demo_files_are_what_their_generator_writes(tmp_path):
    subprocess.run([sys.executable, DEMO / "make_chats.py", tmp_path], check=True)
    for name in ("chats.jsonl", "broken.jsonl", "held_out.jsonl"):
        assert (tmp_path / name).read_bytes() == (DEMO / name).read_bytes(), name


def test_demo_chats_are_all_accepted_and_broken_ones_all_rejected(tmp_path):
    figures, accepted, rejected = run(tmp_path, DEMO / "chats.jsonl", DEMO / "broken.jsonl")
    assert figures.accepted >= 1200 and {r["source"] for r in rejected} == {str(DEMO / "broken.jsonl")}
    assert len(rejected) == len((DEMO / "broken.jsonl").read_text().splitlines())
    asked = {m["content"] for r in accepted for m in r["messages"] if m["role"] == "user"}
    held_out = read_lines(DEMO / "held_out.jsonl")
    assert len(held_out) == 50
    assert not asked & {prompt["messages"][-2]["content"] for prompt in held_out}
