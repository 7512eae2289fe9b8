"""Pitfalls of chat records: each has one defined outcome (the table of docs/data.md)."""

import json
from typing import Any

import pytest
from unit.data.helpers import PROJECT, answer, assistant, called, system, tool, user

from deepseek_sft.data.formats import FORMATS, convert
from deepseek_sft.data.messages import check_canonical, json_line, normalise
from deepseek_sft.data.rejection import REASONS, Rejection

R = {"reasoning_content": "R"}


def rejected(messages: Any) -> str:
    with pytest.raises(Rejection) as caught:
        normalise(messages)
    return caught.value.reason


def content(message: dict[str, Any]) -> str:
    return normalise([user(), message])[1]["content"]


@pytest.mark.parametrize(
    "message",
    [
        assistant("A", reasoning_content="R"),
        assistant("A", reasoning="R"),
        assistant("A", reasoning="R", reasoning_content=" R\n"),
        assistant("A", reasoning="R", reasoning_content=None),
        assistant("\n\nA\n", reasoning_content="\nR\n"),
        assistant("<think>R</think>A"),
        assistant("<think>\nR\n</think>\n\nA"),
        assistant("\n <think> R </think>\r\nA"),
        assistant([{"type": "text", "text": "A"}], reasoning_content="R"),
        assistant(["A"], reasoning_content="R"),
    ],
)
def test_reasoning_comes_out_in_one_form_however_it_is_given(message):
    assert content(message) == "<think>\nR\n</think>\n\nA"


@pytest.mark.parametrize(
    "message", [assistant("A"), assistant("A", reasoning_content=" \n"), assistant("<think>\n\n</think>\n\nA")]
)
def test_missing_or_blank_reasoning_gives_the_bare_answer(message):
    assert content(message) == "A"


def test_indentation_of_an_answer_survives():
    assert content(assistant("    return 1\n", **R)) == "<think>\nR\n</think>\n\n    return 1"


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        (None, "no_messages"),
        ([], "no_messages"),
        ({"role": "user"}, "no_messages"),
        (["hello"], "invalid_message"),
        ([{"content": "no role"}], "invalid_message"),
        ([{"role": 7, "content": "?"}], "invalid_message"),
        ([user(), {"role": "critic", "content": "4"}, assistant()], "unsupported_role"),
        ([user(), {"role": "tool", "content": "4"}, assistant()], "role_order"),
        ([user(), assistant("A", tool_calls=[{"id": "1"}])], "tool_call"),
        ([user(), assistant("A", tool_calls="f")], "tool_call"),
        ([user(), assistant("A", function_call={"name": "f"})], "tool_call"),
        ([user(), called("a", "b"), tool("4"), assistant()], "tool_output"),
        ([user(), called("a"), tool("4"), tool("5"), assistant()], "tool_output"),
        ([user(), called("a"), tool("4", tool_call_id="b"), assistant()], "tool_output"),
        ([user(), called("a"), assistant()], "role_order"),
        ([user(), called("a"), user(), assistant()], "role_order"),
        ([user(), called("a"), tool("4"), user(), assistant()], "role_order"),
        ([{**user(), **called("a"), "role": "user"}, assistant()], "tool_call"),
        ([user(), assistant(7)], "invalid_content"),
        ([user(), assistant("A", reasoning_content=["R"])], "invalid_content"),
        ([user([{"type": "image_url", "image_url": {}}]), assistant()], "non_text_part"),
        ([user([7]), assistant()], "non_text_part"),
        ([user(""), assistant()], "empty_content"),
        ([user(" \n"), assistant()], "empty_content"),
        ([user(None), assistant()], "empty_content"),
        ([user(), assistant(None, **R)], "empty_content"),
        ([user(), assistant("<think>R</think>\n")], "empty_content"),
        ([assistant(), user(), assistant()], "role_order"),
        ([user(), user(), assistant()], "role_order"),
        ([user(), assistant(), assistant()], "role_order"),
        ([user(), system("S"), assistant()], "late_system"),
        ([user(), assistant("<think>R A")], "think_tags"),
        ([user(), assistant("R</think>A")], "think_tags"),
        ([user(), assistant("<think>R</think>A</think>B")], "think_tags"),
        ([user(), assistant("<think><think>R</think></think>A")], "think_tags"),
        ([user(), assistant("First. <think>R</think>A")], "think_tags"),
        ([user(), assistant("A", reasoning_content="R</think>R")], "think_tags"),
        ([user(), assistant("<think>R</think>A", **R)], "double_reasoning"),
        ([user(), assistant("A", reasoning="R1", reasoning_content="R2")], "reasoning_conflict"),
        ([{**user(), **R}, assistant()], "misplaced_reasoning"),
        ([{**user(), "loss": True}, assistant()], "misplaced_loss"),
        ([{**system("S"), "loss": 1}, user(), assistant()], "misplaced_loss"),
        ([user(), assistant(loss=False)], "no_trained_turn"),
        ([user()], "no_trained_turn"),
        ([system("S")], "no_trained_turn"),
    ],
)
def test_pitfall_is_rejected_with_its_reason(messages, reason):
    assert rejected(messages) == reason


@pytest.mark.parametrize(
    ("given", "outcome"),
    [
        ({}, True),
        ({"loss": None}, True),
        ({"loss": True}, True),
        ({"loss": False}, False),
        ({"loss": 1}, True),
        ({"loss": 0}, False),
        ({"loss": 0.0}, False),
        ({"loss": "true"}, True),
        ({"loss": "False"}, False),
        ({"weight": 0}, False),
        ({"weight": 1, "loss": None}, True),
        ({"weight": 0, "loss": False}, False),
    ],
)
def test_loss_becomes_a_boolean(given, outcome):
    messages = normalise([user("Q1"), assistant("A1", **given), user("Q2"), assistant("A2")])
    assert messages[1]["loss"] is outcome


@pytest.mark.parametrize(
    "given", [{"loss": 2}, {"loss": 0.5}, {"loss": "no"}, {"loss": ""}, {"loss": []}, {"loss": 1, "weight": 0}]
)
def test_any_other_loss_is_rejected(given):
    assert rejected([user(), assistant(**given)]) == "invalid_loss"


def test_null_loss_on_other_roles_is_no_loss():
    messages = normalise([{**system("S"), "loss": None}, {**user(), "loss": False}, assistant(loss=None)])
    assert [m.get("loss") for m in messages] == [None, None, True]


def test_system_messages_join_and_developer_is_system():
    messages = normalise([system("S"), {"role": "developer", "content": "D"}, system(""), user(), assistant()])
    assert messages[0] == system("S\n\nD")


def test_empty_system_message_is_dropped():
    assert [m["role"] for m in normalise([system(" \n"), user(), assistant()])] == ["user", "assistant"]


def test_text_parts_join_by_line_ends():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b", "image_url": None}]
    assert normalise([user(parts), assistant()])[0]["content"] == "a\nb"


def test_text_of_users_is_not_touched():
    text = "  e\u0301 \u2028 <think> <｜User｜>\r\n"  # not composed, not trimmed, not interpreted
    assert normalise([user(text), assistant()])[0]["content"] == text


def test_trailing_user_message_is_kept():
    assert len(normalise([user(), assistant(), user("more")])) == 3


def test_rejection_names_the_message():
    with pytest.raises(Rejection, match="message 2: "):
        normalise([user(), assistant(loss="perhaps")])


@pytest.mark.parametrize(
    "messages",
    [
        [user(), assistant("A")],
        [user(), assistant("A", loss=1)],
        [user(), assistant("A", loss=True, reasoning_content="R")],
        [user(), {**answer("R", "A"), "name": "x"}],
        [system("S"), system("T"), user(), assistant("A", loss=True)],
        "nothing",
    ],
)
def test_only_the_written_form_passes_as_canonical(messages):
    with pytest.raises(Rejection) as caught:
        check_canonical(messages)
    assert caught.value.reason == "invalid_record"


def test_sharegpt_record():
    turns = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "<think>R</think>A", "loss": "false"}]
    more = [{"from": "human", "value": "Q2"}, {"from": "gpt", "value": "A2"}]
    messages = normalise(convert({"conversations": turns + more, "system": "S"}))
    assert messages == [
        system("S"), user("Q"), answer("R", "A", False), user("Q2"), assistant("A2", loss=True),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"conversations": "text"}, "no_messages"),
        ({"conversations": [{"value": "Q"}]}, "invalid_message"),
        ({"conversations": ["Q"]}, "invalid_message"),
        ({"conversations": [{"from": "human", "value": "Q"}, {"from": "observation", "value": "4"}]}, "role_order"),
        ({"conversations": [{"from": "human", "value": "Q"}, {"from": "function_call", "value": "{"}]}, "tool_call"),
        ({"instruction": ["Q"], "output": "A"}, "missing_field"),
        ({"instruction": "Q", "output": "A", "history": ["Q"]}, "missing_field"),
        ({"text": "A"}, "unknown_format"),
        ({"messages": None, "text": "A"}, "unknown_format"),
        ([1], "not_an_object"),
        ("text", "not_an_object"),
    ],
)
def test_record_that_fits_no_format_is_rejected_with_its_reason(record, reason):
    with pytest.raises(Rejection) as caught:
        normalise(convert(record))
    assert caught.value.reason == reason


def test_alpaca_record():
    record = {
        "instruction": "Add.",
        "input": "2, 2",
        "output": "4",
        "reasoning": "R",
        "history": [["Q", "A"]],
        "system": "S",
    }
    assert normalise(convert(record)) == [
        system("S"), user("Q"), assistant("A", loss=True), user("Add.\n2, 2"), answer("R", "4"),
    ]  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_named_format_refuses_records_of_others(name):
    with pytest.raises(Rejection):
        normalise(convert({"other": 1}, name))


def test_line_separators_in_text_do_not_break_lines():
    line = json_line({"text": "a\u2028b\u2029c\x85d"})
    assert len(line.decode().splitlines()) == 1
    assert json.loads(line) == {"text": "a\u2028b\u2029c\x85d"}


def test_documentation_lists_every_reason():
    page = (PROJECT / "docs" / "data.md").read_text(encoding="utf-8")
    assert [reason for reason in REASONS if f"`{reason}`" not in page] == []
