"""Fields are read as what their names mean, counted by name, or their record is rejected with the reason."""

import json

import pytest
from unit.data.helpers import assistant, called, read_lines, run_script, system, tool, user, write_lines
from unit.data.records import RECORDS

from deepseek_sft.data.fields import Vocabulary, empty, is_telling, likely_meaning
from deepseek_sft.data.prepare import convert_record, prepare
from deepseek_sft.data.sources import RawRecord, find_sources
from deepseek_sft.errors import BadInputError

THOUGHT = "<think>\nR\n</think>\n\nA"
ALPACA = {"instruction": "Q", "input": "", "output": "A"}


def chat(*messages, **beside):
    return {"messages": [*messages] or [user(), assistant()], **beside}


def sharegpt(**beside):
    return {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A", **beside}]}


def outcome(record, given=None, source="a.jsonl"):
    return convert_record(RawRecord(source, "auto", 1, 1, record), Vocabulary(given or {}))


def messages(record, given=None):
    made = outcome(record, given)
    assert not made.reason, made.message
    return json.loads(made.written)["messages"]


def unused(record, given=None):
    return dict(outcome(record, given).unused)


def run(tmp_path, records, **options):
    path = write_lines(tmp_path / "in.jsonl", records)
    figures = prepare(find_sources([str(path)]), tmp_path / "train.jsonl", tmp_path / "rejects.jsonl", **options)
    return figures, read_lines(tmp_path / "train.jsonl")


# ---- reasoning

DETAILS = [{"type": "reasoning.text", "text": "R", "format": None}]
REASONED = {
    **{name: chat(user(), assistant(**{name: "R"})) for name in (
        "thinking", "Thinking", "thought", "thoughts", "think", "reasoning_text", "reasoningContent",
        "thinking_content", "reasoning-content", "chain_of_thought",
    )},
    "details": chat(user(), assistant(reasoning_details=DETAILS)),
    "details and the same text": chat(user(), assistant(reasoning="R", reasoning_details=DETAILS)),
    "thinking block": chat(user(), assistant([{"type": "thinking", "thinking": "R"}, {"type": "text", "text": "A"}])),
    "reasoning block": chat(user(), assistant([{"type": "reasoning", "text": "R"}, "A"])),
    "beside one turn": chat(reasoning_content="R"),
    "beside one turn, tags as well": chat(user(), assistant("<think>R</think>A"), reasoning="R"),
    "sharegpt": sharegpt(thinking="R"),
    "sharegpt, beside": sharegpt() | {"thought": "R"},
    "alpaca": ALPACA | {"think": "R"},
}  # fmt: skip


@pytest.mark.parametrize("name", REASONED)
def test_reasoning_is_read_by_whatever_name_it_has(name):
    assert [m["content"] for m in messages(REASONED[name])] == ["Q", THOUGHT]
    assert not unused(REASONED[name])


def test_streamed_pieces_of_reasoning_are_one_text():
    pieces = [{"type": "reasoning.text", "text": text, "index": at} for text, at in (("a", 0), ("b", 0), ("c", 1))]
    made = messages(chat(user(), assistant(reasoning_details=pieces)))
    assert made[1]["content"] == "<think>\nab\nc\n</think>\n\nA"


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (chat(user(), assistant(reasoning_details=[{"type": "reasoning.encrypted", "data": "x"}])), "invalid_content"),
        (chat(user(), assistant(thinking="R", reasoning="S")), "reasoning_conflict"),
        (chat(user(), assistant(thinking="R"), reasoning="S"), "reasoning_conflict"),
        (chat(user(), assistant(), user(), assistant(), reasoning="R"), "misplaced_reasoning"),
        (chat({**user(), "thinking": "R"}, assistant()), "misplaced_reasoning"),
        (chat(user(), assistant(["A", {"type": "thinking", "thinking": "R"}])), "think_tags"),
        (chat(user(), assistant([{"type": "redacted_thinking", "data": "x"}, "A"])), "non_text_part"),
        (chat(user(), assistant(["<think>R</think>A", {"type": "thinking", "thinking": "R"}])), "think_tags"),
    ],
)
def test_reasoning_of_two_meanings_is_rejected(record, reason):
    assert outcome(record).reason == reason


@pytest.mark.parametrize("value", ["on", "Off", True, "enabled"])
def test_a_switch_of_reasoning_is_no_reasoning_text(tmp_path, value):
    with pytest.raises(BadInputError, match=r"reasoning in 1 of 1 records.*\n.*\{reasoning: ignore\}"):
        run(tmp_path, [chat(reasoning=value)])
    assert messages(chat(reasoning=value), {"reasoning": "ignore"})[1]["content"] == "A"


# ---- flags of training


@pytest.mark.parametrize("name", ["train", "training", "trainable", "loss_scale", "loss", "weight", "Train"])
@pytest.mark.parametrize("value", [False, 0, 0.0, "false"])
def test_an_answer_marked_as_not_to_be_trained_carries_no_loss(name, value):
    made = messages(chat(user("Q1"), assistant("A", **{name: value}), user("Q2"), assistant("B", **{name: True})))
    assert [m.get("loss") for m in made] == [None, False, None, True]


def test_flags_of_sharegpt_and_alpaca_are_read():
    bad = {"from": "gpt", "value": "bad", "train": False}
    turns = [{"from": "human", "value": "Q1"}, bad, {"from": "human", "value": "Q2"}, {"from": "gpt", "value": "B"}]
    assert [m.get("loss") for m in messages({"conversations": turns})] == [None, False, None, True]
    assert outcome(ALPACA | {"train": False}).reason == "no_trained_turn"
    made = messages(ALPACA | {"train": 0, "history": [["q", "a"]]})
    assert [m.get("loss") for m in made] == [None, True, None, False]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (chat(user(), assistant(train=True, loss=False)), "invalid_loss"),
        (chat(user(), assistant(loss_scale=0.5)), "invalid_loss"),
        (chat(user(), assistant(train_detail=[{"begin_offset": 0, "train": False}])), "invalid_loss"),
        (chat(user(), assistant([{"type": "text", "text": "A", "train": False}, "B"])), "invalid_loss"),
        (chat(user(), assistant([{"type": "text", "text": "A", "weight": 0}])), "invalid_loss"),
        (chat({**user(), "training": True}, assistant()), "misplaced_loss"),
        (chat(train=False), "no_trained_turn"),
        (chat(user(), assistant(train=True), loss=0), "no_trained_turn"),
    ],
)
def test_flags_that_cannot_be_kept_are_rejected(record, reason):
    assert outcome(record).reason == reason


def test_a_part_flagged_like_its_message_is_kept():
    parts = [{"type": "text", "text": "A", "train": True}]
    assert messages(chat(user(), assistant(parts)))[1] == {"role": "assistant", "content": "A", "loss": True}


@pytest.mark.parametrize("record", [chat(weight=0.7), chat(loss=0.43), chat(weight=3)])
def test_a_measure_beside_the_messages_is_counted_and_no_flag(record):
    assert set(unused(record)) == set(record) - {"messages"} and not any(unused(record).values())


# ---- preference data, pictures, system text


@pytest.mark.parametrize(
    "beside",
    [
        {"label": False}, {"kto_tag": False}, {"label": 0}, {"label": "false"}, {"chosen": {"value": "x"}},
        {"rejected": "x"}, {"rejected_response": "x"}, {"rejected_messages": [user()]}, {"chosen": False},
        {"rejected": True},
    ],
)  # fmt: skip
def test_preference_data_is_rejected_in_every_layout(beside):
    for record in (chat(**beside), sharegpt() | beside, ALPACA | beside, RECORDS["s1K"][0] | beside):
        assert outcome(record).reason == "preference_data"


def test_preference_data_without_an_answer_is_called_so():
    assert outcome({"instruction": "Q", "chosen": "A", "rejected": "B"}).reason == "preference_data"


@pytest.mark.parametrize("beside", [{"label": True}, {"label": "maths"}, {"rejected_count": 3}, {"rejected": None}])
def test_a_good_verdict_is_no_preference_data(beside):
    assert not outcome(chat(**beside)).reason


@pytest.mark.parametrize("name", ["image", "images", "videos", "audios", "image_url", "image_paths", "Images"])
def test_pictures_beside_the_text_are_rejected(name):
    assert outcome(chat(**{name: ["x.png"]})).reason == "non_text_part"
    assert outcome(chat({**user(), name: "x.png"}, assistant())).reason == "non_text_part"
    assert not outcome(chat(**{name: [None]})).reason


@pytest.mark.parametrize("name", ["system", "system_prompt", "systemPrompt"])
def test_system_text_beside_the_messages_comes_first(name):
    assert messages(chat(**{name: "S"}))[0] == system("S")
    assert messages(chat(system("S"), user(), assistant(), **{name: "S"}))[0] == system("S")
    assert messages(chat(system("T"), user(), assistant(), **{name: "S"}))[0] == system("S\n\nT")
    assert messages(RECORDS["s1K"][0] | {name: "S"})[0] == system("S")


def test_system_text_that_is_left_out_is_counted():
    assert unused(RECORDS["OpenThoughts-114k"][0]) == {"system": False}


# ---- what nothing uses


def test_unused_fields_are_counted_by_path_with_the_first_place(tmp_path):
    records = [chat(user("1"), assistant()), chat(user("2"), assistant(mood="x"), notes=["n"]), chat(notes="n"), "{"]
    figures, _ = run(tmp_path, records)
    place = str(tmp_path / "in.jsonl")
    assert figures.as_dict()["unused_fields"] == {
        "notes": {"records": 2, "first": f"{place}:2"},
        "messages[].mood": {"records": 1, "first": f"{place}:2"},
    }


@pytest.mark.parametrize(
    ("record", "path"),
    [
        (chat(notes="n"), "notes"),
        (chat(user(), assistant(notes="n")), "messages[].notes"),
        (chat(user([{"type": "text", "text": "Q", "notes": "n"}]), assistant()), "messages[].content[].notes"),
        (sharegpt(notes="n"), "conversations[].notes"),
        (ALPACA | {"notes": "n"}, "notes"),
        (RECORDS["AM-DeepSeek-R1-Distilled-1.4M"][0], "messages[].info.source"),
        (chat(user(), {**called("f"), "tool_calls": [{**called("f")["tool_calls"][0], "notes": 0}]}, tool("4"),
              assistant()), "messages[].tool_calls[].notes"),
        (chat(user(), assistant(None, function_call={"name": "f", "arguments": "{}", "notes": "n"}), tool("4"),
              assistant()), "messages[].function_call.notes"),
        (chat(user(), called("f"), tool("4", name="g"), assistant()), "messages[].name"),
    ],
)  # fmt: skip
def test_every_level_is_counted(record, path):
    assert unused(record) == {path: False}


@pytest.mark.parametrize("value", [None, "", [], {}, [None], {"a": None, "b": []}, [[[""]]]])
def test_empty_fields_are_not_counted(value):
    assert empty(value) and not unused(chat(notes=value, mask=value))


@pytest.mark.parametrize("name", ["mask", "train_on_input", "cot", "reasoning_de", "sys", "system_note", "lossMask"])
@pytest.mark.parametrize("value", [True, 0, "some text"])
def test_a_field_that_sounds_like_training_fails_the_stage_with_the_line_to_write(tmp_path, name, value):
    said = rf"(?s)messages\[\]\.{name} in 1 of 2 .*data: \{{fields: \{{{name}: "
    with pytest.raises(BadInputError, match=said) as error:
        run(tmp_path, [chat(user("1"), assistant()), chat(user(), assistant(**{name: value}))])
    assert "in.jsonl:2" in str(error.value)
    assert not (tmp_path / "train.jsonl").exists() and (tmp_path / "rejects.jsonl").exists()


@pytest.mark.parametrize(
    "beside",
    [
        {"mask": [1, 0]}, {"reasoning_tokens": 1}, {"reasoning_language": "French"}, {"system_fingerprint": "f"},
        {"finish_reason": "stop"}, {"constraints": "x"}, {"notes": "n"}, {"metadata": {"train": 1}},
    ],
)  # fmt: skip
def test_other_fields_warn(tmp_path, beside):
    figures, lines = run(tmp_path, [chat(**beside)])
    assert len(lines) == 1 and set(beside) <= set(figures.unused_fields) and not figures.unclear_fields


def test_a_telling_name_within_metadata_is_named():
    assert unused(chat(metadata={"train": 0, "x": 1})) == {"metadata": False, "metadata.train": False}


def test_records_of_public_sets_do_not_fail(tmp_path):
    figures, lines = run(tmp_path, [record for record, _, _ in RECORDS.values()], keep_duplicates=True)
    assert len(lines) == len(RECORDS) and not figures.unclear_fields


def test_different_names_are_counted_in_bounded_memory(tmp_path):
    figures, _ = run(tmp_path, [chat(user(str(n)), assistant(), **{f"f{n}": 1}) for n in range(1100)])
    assert len(figures.unused_fields) == 1001
    assert figures.unused_fields["(other fields)"]["records"] == 100


@pytest.mark.parametrize(
    ("given", "loss"),
    [
        ({"mask": "not loss"}, [False, True]),
        ({"mask": "loss"}, [True, False]),
        ({"messages[].mask": "not loss"}, [False, True]),
        ({"mask": "ignore"}, [True, True]),
        ({"messages[].mask": "ignore"}, [True, True]),
    ],
)
def test_the_mapping_says_what_a_field_means(given, loss):
    record = chat(user("1"), assistant(mask=1), user("2"), assistant("B", mask=0))
    assert [m["loss"] for m in messages(record, given) if m["role"] == "assistant"] == loss
    assert not unused(record, given)


def test_the_mapping_reaches_every_meaning_and_overrides_ours():
    given = {"why": "reasoning", "persona": "system", "apis": "tools", "notes": "ignore", "label": "ignore"}
    record = chat(user(), assistant(why="R"), persona="S", apis=[{"name": "f"}], notes="n", label=False)
    made = outcome(record, given)
    assert [m["content"] for m in messages(record, given)] == ["S", "Q", THOUGHT]
    assert made.tools and not made.unused


def test_unused_fields_fail_on_request(tmp_path):
    with pytest.raises(BadInputError, match=r"fields not used: notes in 1 of 1.*\n.*\{notes: ignore\}"):
        run(tmp_path, [chat(notes="n")], fail_on_unused_fields=True)
    run(tmp_path, [chat(notes="n")], fail_on_unused_fields=True, vocabulary=Vocabulary({"notes": "ignore"}))


def test_script_prints_fields_and_takes_meanings(tmp_path):
    write_lines(tmp_path / "in.jsonl", [chat(user(), assistant("A", mask=0), notes="n")])
    names = ("--output", "train.jsonl", "--rejects", "rejects.jsonl", "--receipt", "p.json")
    words = [tmp_path / word if "." in word else word for word in names]
    done = run_script("prepare_data.py", "--source", tmp_path / "in.jsonl", *words, "--fields", "mask=not loss")
    assert done.returncode == 0, done.stderr
    assert "warning: fields not used: notes in 1 of 1 records, first in in.jsonl:1\n" in done.stderr
    done = run_script("prepare_data.py", "--source", tmp_path / "in.jsonl", *words, "--fields", "mask=no")
    assert done.returncode == 2 and "--fields 'mask=no' says no meaning" in done.stderr


# ---- two fields for one thing


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A", "content": "B"}]},
         "invalid_message"),
        ({"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "role": "user", "value": "A"}]},
         "invalid_message"),
        (chat(user(), {**called("f"), "function_call": {"name": "g", "arguments": "{}"}}, tool("4"), assistant()),
         "tool_call"),
        (RECORDS["OpenR1-Math-220k"][0] | {"is_reasoning_complete": [True]}, "missing_field"),
        (RECORDS["OpenR1-Math-220k"][0] | {"correctness_llama": [True]}, "missing_field"),
        (RECORDS["OpenThoughts-114k, raw columns"][0] | {"reasoning": "other"}, "reasoning_conflict"),
        (ALPACA | {"history": 7}, "missing_field"),
    ],
)  # fmt: skip
def test_of_two_fields_that_differ_none_is_dropped(record, reason):
    assert outcome(record).reason == reason


def test_content_that_says_something_else_than_info_is_counted():
    info = {"think_content": "R", "answer_content": "A"}
    assert unused({"messages": [user(), assistant("<think>R</think><answer>A</answer>", info=info)]}) == {}
    assert unused({"messages": [user(), assistant("something else", info=info)]}) == {
        "messages[].content (beside info)": False
    }


@pytest.mark.parametrize(
    ("name", "meaning"),
    [
        *((name, "not loss") for name in ("no_loss", "is_masked", "untrained", "noTrain", "skip_loss", "do_not_train")),
        *((name, "not loss") for name in ("exclude_from_loss", "unsupervised", "nontrainable")),
        *((name, "loss") for name in ("loss_mask", "unmasked", "not_masked", "is_trained", "supervised")),
        *((name, "system") for name in ("developer_prompt", "sysPrompt")),
        *((name, "reasoning") for name in ("cot", "no_reasoning")),
    ],
)
def test_meaning_that_is_suggested_for_a_name_follows_its_negations(name, meaning):
    assert is_telling(name)
    assert likely_meaning(name) == meaning
