"""Public reasoning sets: recognised by their fields, and their reasoning and answers end where they belong."""

import pytest
from unit.data.helpers import PROJECT, assistant, user
from unit.data.records import ONE_TURN, OPENR1, RECORDS, TAGGED

from deepseek_sft.data.formats import FORMATS, choose, convert
from deepseek_sft.data.messages import Rejection, normalise


def reason(record, name="auto"):
    with pytest.raises(Rejection) as caught:
        normalise(convert(record, name))
    return caught.value.reason


@pytest.mark.parametrize("name", RECORDS)
def test_record_is_recognised_and_converted(name):
    record, chosen, messages = RECORDS[name]
    assert choose(record) == chosen
    assert normalise(convert(record)) == messages
    assert normalise(convert(record, chosen)) == messages


@pytest.mark.parametrize(
    "value",
    [
        TAGGED.replace("<|end_of_thought|>", ""),
        TAGGED.replace("<|end_of_solution|>", ""),
        TAGGED + TAGGED,
        f"First. {TAGGED}",
        TAGGED.replace("R", "<|end_of_thought|>"),
        TAGGED.replace("R", "<think>"),
    ],
)
def test_thought_tags_that_are_not_one_pair_each_are_rejected(value):
    turns = [{"from": "user", "value": "Q"}, {"from": "assistant", "value": value}]
    assert reason({"conversations": turns}) == "think_tags"


def test_first_complete_and_correct_generation_is_taken():
    record = OPENR1 | {"generations": ["<think>\nR\n</think>\n\nA"] * 3, "correctness_math_verify": [None] * 3}
    assert normalise(convert(record)) == ONE_TURN
    llama = OPENR1 | {"correctness_math_verify": [False] * 3, "correctness_llama": [False, False, True]}
    assert normalise(convert(llama)) == ONE_TURN


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"is_reasoning_complete": [False] * 3}, "incomplete_reasoning"),
        ({"is_reasoning_complete": None, "generations": ["<think>cut"]}, "incomplete_reasoning"),
        ({"correctness_math_verify": [True, False, False]}, "incorrect"),
        ({"generations": []}, "missing_field"),
        ({"generations": "text"}, "missing_field"),
        ({"problem": 7}, "missing_field"),
        ({"generations": ["", "", "A</think>B</think>C"]}, "think_tags"),
    ],
)
def test_unusable_generations_are_rejected_with_the_reason(change, expected):
    assert reason(OPENR1 | change) == expected


def test_missing_completeness_flags_are_read_from_the_tag():
    record = OPENR1 | {"is_reasoning_complete": None, "correctness_math_verify": [True, None, True]}
    assert normalise(convert(record)) == ONE_TURN


def test_answer_tags_without_info_are_taken_off():
    info = {"answer_content": None, "think_content": None}
    record = {"messages": [user("Q"), assistant("<think>R</think>\n<answer>\nA\n</answer>", info=info)]}
    assert normalise(convert(record)) == ONE_TURN


def test_documentation_lists_every_format():
    page = (PROJECT / "docs" / "data.md").read_text(encoding="utf-8")
    assert [name for name in FORMATS if f"`{name}`" not in page] == []
