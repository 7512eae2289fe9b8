"""Definitions of tools are carried as given, arguments are JSON objects, Arrow's nulls are no arguments."""

import datetime
import json

import pyarrow as pa
import pyarrow.parquet
import pytest
from unit.data.helpers import TOKENIZER, assistant, read_lines, run_script, tool, user, write_lines

from deepseek_sft.data.messages import check_canonical
from deepseek_sft.data.prepare import convert_record, prepare
from deepseek_sft.data.sources import RawRecord, find_sources

FUNCTION = {"name": "weather", "parameters": {"type": "object", "properties": {"town": {"type": "string"}}}}
TOOLS = [{"type": "function", "function": FUNCTION}]


def call(arguments, **fields):
    calls = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}]
    return {"role": "assistant", "content": None, "tool_calls": calls, **fields}


def chat(arguments, **beside):
    return {"messages": [user(), call(arguments), tool("4", tool_call_id="1"), assistant()], **beside}


def outcome(record, source="a.jsonl"):
    return convert_record(RawRecord(source, "auto", 1, 1, record))


def written(record):
    made = outcome(record)
    assert not made.reason, made.message
    line = json.loads(made.written)
    check_canonical(line["messages"])
    return line


def run(tmp_path, path, **options):
    output, rejects = tmp_path / "train.jsonl", tmp_path / "rejects.jsonl"
    return prepare(find_sources([str(path)]), output, rejects, **options), read_lines(output), read_lines(rejects)


@pytest.mark.parametrize(
    ("given", "outcome"),
    [
        ('{"x": 1}', '{"x": 1}'),
        ('{ "x":1 }', '{ "x":1 }'),
        ({"x": None, "y": "ü"}, '{"x": null, "y": "ü"}'),
        ({}, "{}"),
        ("", "{}"),
        (" \n", "{}"),
        ('"{\\"x\\": 1}"', '{"x": 1}'),
    ],
)
def test_arguments_become_the_text_of_a_json_object(given, outcome):
    assert written(chat(given))["messages"][1]["tool_calls"][0]["function"]["arguments"] == outcome


@pytest.mark.parametrize(
    "given",
    [
        '{"x": 1', "x=1", "[1]", "7", "null", '"x"', '"\\"{}\\""', '{"x": NaN}', '{"x": -Infinity}',
        {"x": float("nan")}, {"x": float("inf")}, None, 7, [1], "[" * 5000, {"x": b"x"},
        {"x": datetime.date(2026, 1, 1)},
    ],
)  # fmt: skip
def test_arguments_that_are_no_json_object_are_rejected(given):
    assert outcome(chat(given)).reason == "tool_call"


def test_nulls_that_arrow_filled_in_are_no_arguments(tmp_path):
    records = [
        chat({"town": "Bonn", "when": {"day": 1}, "tags": ["a", None]}),
        chat({"query": "cats", "limit": 3, "when": {"hour": 2}}),
    ]
    pyarrow.parquet.write_table(pa.Table.from_pylist(records), tmp_path / "a.parquet")
    _, lines, _ = run(tmp_path, tmp_path / "a.parquet")
    arguments = [json.loads(line["messages"][1]["tool_calls"][0]["function"]["arguments"]) for line in lines]
    assert arguments[0] == {"town": "Bonn", "when": {"day": 1}, "tags": ["a", None]}
    assert arguments[1] == {"query": "cats", "limit": 3, "when": {"hour": 2}}


def test_a_struct_of_nulls_is_no_call_and_no_picture(tmp_path):
    records = [
        {"messages": [user(), {**assistant(), "function_call": None}], "images": None},
        {"messages": [user("2"), {**call({"x": 1}), "function_call": {"name": None, "arguments": None}}, tool("4"),
                      assistant()], "images": [None]},
    ]  # fmt: skip
    pyarrow.parquet.write_table(pa.Table.from_pylist(records), tmp_path / "a.parquet")
    figures, _, rejected = run(tmp_path, tmp_path / "a.parquet")
    assert (figures.accepted, rejected) == (2, [])


@pytest.mark.parametrize(
    "beside",
    [
        {"tools": TOOLS},
        {"tools": json.dumps(TOOLS)},
        {"tools": [json.dumps(TOOLS[0])]},
        {"functions": [FUNCTION]},
        {"functions": json.dumps([FUNCTION])},
        {"tools": TOOLS, "functions": [FUNCTION]},
    ],
)
def test_definitions_are_carried_in_one_form(beside):
    assert written(chat("{}", **beside))["tools"] == TOOLS
    turns = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
    assert written({"conversations": turns, **beside})["tools"] == TOOLS


@pytest.mark.parametrize("tools", [None, [], "", "[]", " "])
def test_no_definitions_leave_no_field(tools):
    assert "tools" not in written(chat("{}", tools=tools))


@pytest.mark.parametrize("tools", ["{", "search", ["search"], [7], {"name": "f"}, 7, [{"name": float("nan")}]])
def test_broken_definitions_are_rejected(tools):
    assert outcome(chat("{}", tools=tools)).reason == "tool_definitions"


def test_definitions_that_differ_make_no_duplicates(tmp_path):
    other = [{"type": "function", "function": {**FUNCTION, "description": "other"}}]
    records = [chat("{}"), chat("{}", tools=TOOLS), chat("{}", tools=other), chat("{}", tools=json.dumps(TOOLS))]
    figures, lines, rejected = run(tmp_path, write_lines(tmp_path / "a.jsonl", records))
    assert [line.get("tools") for line in lines] == [None, TOOLS, other]
    assert [one["reason"] for one in rejected] == ["duplicate"] and "and tools" in rejected[0]["message"]
    assert figures.with_tools == 2


def tokenize(tmp_path, records, *words):
    write_lines(tmp_path / "train.jsonl", records)
    return run_script(
        "tokenize_data.py", "--input", tmp_path / "train.jsonl", "--tokenizer", TOKENIZER, "--output",
        tmp_path / "tokens", "--rejects", tmp_path / "rejects.jsonl", "--statistics", tmp_path / "s.json", "--receipt",
        tmp_path / "t.json", *words,
    )  # fmt: skip


def test_definitions_that_no_template_shows_are_warned_of(tmp_path):
    plain = {"id": "1", "messages": [user(), assistant(loss=True)]}
    done = tokenize(tmp_path, [plain, {**plain, "id": "2", "tools": TOOLS}, {**plain, "id": "3", "tools": "x"}])
    assert done.returncode == 0, done.stderr
    assert "warning: 1 records come with definitions of tools" in done.stderr
    assert [one["reason"] for one in read_lines(tmp_path / "rejects.jsonl")] == ["invalid_record"]


def test_trained_answers_that_spell_control_tokens_are_warned_of(tmp_path):
    def turn(name, question, answer, **fields):
        return {"id": name, "messages": [user(question), {**assistant(answer, loss=True), **fields}]}

    records = [
        turn("asked", "<｜User｜>?", "A"),
        turn("quoted", "Q", "<|im_end|> ends a turn"),
        turn("own", "Q", "12<｜end▁of▁sentence｜>"),
        turn("foreign", "Q", "12<|im_end|>"),
    ]
    done = tokenize(tmp_path, records)
    assert "warning: 2 trained answers spell control tokens (<｜end▁of▁sentence｜> first)" in done.stderr, done.stderr
    figures = json.loads((tmp_path / "t.json").read_text())["figures"]
    assert figures["answers_spelling_control_tokens"] == 2 and figures["records_spelling_control_tokens"] == 2
    assert "warning" not in tokenize(tmp_path, records[:2]).stderr
