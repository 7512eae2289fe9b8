"""Rendering and loss: what each template shows, exactly which tokens are trained, and that typed text stays text."""

import itertools
import json

import jinja2.sandbox
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from unit.data.helpers import ASSISTANT, BOS, EOS, TOKENIZER, USER, answer, assistant, system, user

from deepseek_sft.data.chat_templates import TEMPLATES
from deepseek_sft.data.encoding import load_encoder
from deepseek_sft.data.messages import Rejection, normalise
from deepseek_sft.data.samples import Settings, make_samples
from deepseek_sft.data.tokens import NO_LOSS
from deepseek_sft.errors import BadInputError

R1, V3, V31, R1_0528, V3_0324 = TEMPLATES
WHOLE = Tokenizer.from_file(str(TOKENIZER / "tokenizer.json"))
CONFIG = json.loads((TOKENIZER / "tokenizer_config.json").read_text(encoding="utf-8"))
CONTROL = {WHOLE.id_to_token(i): i for i, token in WHOLE.get_added_tokens_decoder().items()}
EOS_ID = CONTROL[EOS]
TWO = [system("S"), user("Q1"), answer("R1", "A1"), user("Q2"), answer("R2", "A2")]


def make(messages, template=R1, history="split", max_length=10_000, truncate=False):
    choice = Settings(template, max_length, history, truncate)
    return make_samples([{"id": "x", "messages": messages}], load_encoder(TOKENIZER, template), choice)[0]


def text(sample):
    return WHOLE.decode(sample.input_ids.tolist(), skip_special_tokens=False)


def parts(sample):
    """The rendered sample as [untrained, trained, untrained, …] texts."""
    mask = sample.labels != NO_LOSS
    borders = [0, *np.flatnonzero(np.diff(mask)) + 1, len(mask)]
    ids = sample.input_ids.tolist()
    return [WHOLE.decode(ids[a:b], skip_special_tokens=False) for a, b in itertools.pairwise(borders)]


# Written by hand from the chat templates of the releases.
GOLDEN = {
    (R1, "split"): [
        [f"{BOS}S{USER}Q1{ASSISTANT}", f"<think>\nR1\n</think>\n\nA1{EOS}"],
        [f"{BOS}S{USER}Q1{ASSISTANT}\n\nA1{EOS}{USER}Q2{ASSISTANT}", f"<think>\nR2\n</think>\n\nA2{EOS}"],
    ],
    (R1, "strip"): [
        [f"{BOS}S{USER}Q1{ASSISTANT}\n\nA1{EOS}{USER}Q2{ASSISTANT}", f"<think>\nR2\n</think>\n\nA2{EOS}"],
    ],
    (R1, "keep"): [
        [
            f"{BOS}S{USER}Q1{ASSISTANT}", f"<think>\nR1\n</think>\n\nA1{EOS}",
            f"{USER}Q2{ASSISTANT}", f"<think>\nR2\n</think>\n\nA2{EOS}",
        ],
    ],
    (V31, "split"): [
        [f"{BOS}S{USER}Q1{ASSISTANT}<think>", f"R1</think>A1{EOS}"],
        [f"{BOS}S{USER}Q1{ASSISTANT}</think>A1{EOS}{USER}Q2{ASSISTANT}<think>", f"R2</think>A2{EOS}"],
    ],
    (V31, "keep"): [
        [
            f"{BOS}S{USER}Q1{ASSISTANT}<think>", f"R1</think>A1{EOS}",
            f"{USER}Q2{ASSISTANT}<think>", f"R2</think>A2{EOS}",
        ],
    ],
}  # fmt: skip
GOLDEN[V3, "split"] = GOLDEN[V3, "keep"] = GOLDEN[R1, "keep"]  # V3's template shows history as it is sent
GOLDEN[V3, "strip"] = GOLDEN[R1, "strip"]


@pytest.mark.parametrize(("template", "history"), GOLDEN)
def test_two_turns_render_as_written_by_hand(template, history):
    assert [parts(sample) for sample in make(TWO, template, history).samples] == GOLDEN[template, history]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (R1, [f"{BOS}{USER}Q{ASSISTANT}", f"A{EOS}"]),
        (V3, [f"{BOS}{USER}Q{ASSISTANT}", f"A{EOS}"]),
        (V31, [f"{BOS}{USER}Q{ASSISTANT}</think>", f"A{EOS}"]),
    ],
)
def test_answer_without_reasoning_and_without_system(template, expected):
    assert [parts(sample) for sample in make([user("Q"), assistant("A", loss=True)], template).samples] == [expected]


def test_untrained_turn_is_history_only():
    messages = [user("Q1"), answer("R1", "A1", loss=False), user("Q2"), answer("R2", "A2"), user("more")]
    assert [parts(s) for s in make(messages).samples] == [
        [f"{BOS}{USER}Q1{ASSISTANT}\n\nA1{EOS}{USER}Q2{ASSISTANT}", f"<think>\nR2\n</think>\n\nA2{EOS}"]
    ]


def test_turns_whose_history_is_uncut_share_one_sample():
    messages = [user("Q1"), assistant("A1", loss=True), user("Q2"), answer("R2", "A2"), user("Q3"), answer("R3", "A3")]
    made = make(messages)
    assert [s.id for s in made.samples] == ["x#3", "x#5"]
    assert [s.turns for s in made.samples] == [2, 1]
    assert parts(made.samples[0])[1::2] == [f"A1{EOS}", f"<think>\nR2\n</think>\n\nA2{EOS}"]


def test_turn_gets_its_own_sample_where_the_next_one_is_too_long():
    messages = [user("Q1"), assistant("A1", loss=True), user("Q2 " * 50), assistant("A2", loss=True)]
    made = make(messages, max_length=20)
    assert [parts(s)[1] for s in made.samples] == [f"A1{EOS}"]
    assert [(name, reason) for name, reason, _ in made.rejects] == [("x#3", "too_long")]


def test_strip_gives_up_turns_whose_reasoning_it_removed_and_counts_them():
    messages = [user("Q0"), assistant("A0", loss=True), *TWO[1:]]
    made = make(messages, history="strip")
    assert [s.turns for s in made.samples] == [2]  # the answer without reasoning and the last one
    assert made.untrained == 1


def test_lengths_of_reasoning_and_answers():
    sample = make(TWO, history="keep").samples[0]
    r1, a1 = (len(WHOLE.encode(t, add_special_tokens=False).ids) for t in ("\nR1\n", "\n\nA1"))
    assert (sample.reasoning[0], sample.answers[0]) == (r1, a1)


def test_too_long_is_rejected_with_its_length():
    made = make(TWO, max_length=15)
    assert not made.samples
    assert {reason for _, reason, _ in made.rejects} == {"too_long"}
    assert "more than 15" in made.rejects[0][2]


def test_truncated_answer_has_loss_but_no_end_of_sentence():
    whole = make([user("Q"), answer("R" + " R" * 49, "A")]).samples[0]
    cut = make([user("Q"), answer("R" + " R" * 49, "A")], max_length=20, truncate=True).samples[0]
    assert cut.truncated and not whole.truncated
    assert np.array_equal(cut.input_ids, whole.input_ids[:20])
    assert np.array_equal(cut.labels, whole.labels[:20])
    assert EOS_ID not in cut.input_ids


def test_nothing_left_after_truncation_is_rejected():
    made = make([user("Q " * 50), answer("R", "A")], max_length=20, truncate=True)
    assert [reason for _, reason, _ in made.rejects] == ["nothing_left"]


@pytest.mark.parametrize(
    "record", [{}, {"messages": [user("Q"), assistant("A")]}, {"messages": [user("Q"), answer("R", "")]}]
)
def test_line_that_prepare_data_would_not_write_is_rejected(record):
    made = make_samples([record], load_encoder(TOKENIZER, R1), Settings(R1, 100))[0]
    assert [reason for _, reason, _ in made.rejects] == ["invalid_record"]


def served_prompt(messages):
    """The prompt a server makes of these messages with the tokenizer's own template (R1's)."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(CONFIG["chat_template"])
    return template.render(messages=messages, add_generation_prompt=True, bos_token=BOS)


plain = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<>｜|"), min_size=1, max_size=20)
spoken = plain.filter(str.strip)
typed = st.lists(st.sampled_from([*sorted(CONTROL), "<", "｜>", " ", "a", "中"]), min_size=1, max_size=6).map("".join)


@st.composite
def conversations(draw, texts=spoken, answers=spoken):
    """Messages as train.jsonl holds them, the last one an answer."""
    messages = [system(draw(texts))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        reply = {"role": "assistant", "content": draw(answers), "loss": draw(st.booleans())}
        if draw(st.booleans()):
            reply["reasoning_content"] = draw(answers)
        messages += [user(draw(texts)), reply]
    messages[-1]["loss"] = True
    try:
        return normalise(messages)
    except Rejection:
        return normalise([user("Q"), assistant("A", reasoning="R")])


@settings(deadline=None, max_examples=50)
@given(conversations())
def test_trained_prompt_equals_served_prompt(messages):
    for sample in make(messages).samples:
        end = int(sample.id.partition("#")[2] or len(messages) - 1)
        last = WHOLE.encode(text(sample), add_special_tokens=False).ids
        prompt = WHOLE.encode(served_prompt(messages[:end]), add_special_tokens=False).ids
        assert sample.input_ids[: len(prompt)].tolist() == prompt
        assert (sample.labels[len(prompt) :] != NO_LOSS).all()
        assert len(last) == len(sample.input_ids)


@settings(deadline=None, max_examples=50)
@given(conversations(), st.sampled_from(list(TEMPLATES)), st.sampled_from(["split", "strip", "keep"]))
def test_segments_encode_as_the_whole_string_does(messages, template, history):
    encoder = load_encoder(TOKENIZER, template)
    for sample in make(messages, template, history).samples:
        assert sample.input_ids[0] == encoder.bos_token_id
        rendered = text(sample)
        if "\ufffd" not in rendered:  # decoding cannot be undone for a character that a token cuts
            assert WHOLE.encode(rendered, add_special_tokens=False).ids == sample.input_ids.tolist()


@settings(deadline=None, max_examples=50)
@given(conversations(typed | spoken, st.sampled_from(["A", f"A {EOS} {USER}", "中"])), st.sampled_from(list(TEMPLATES)))
def test_typed_control_tokens_never_become_control_tokens(messages, template):
    for history in ("split", "strip", "keep"):
        for sample in make(messages, template, history).samples:
            ids = sample.input_ids.tolist()
            end = int(sample.id.partition("#")[2] or max(i for i, m in enumerate(messages) if m.get("loss")))
            seen = messages[: end + 1]
            assert ids.count(CONTROL[BOS]) == 1 and ids[0] == CONTROL[BOS]
            assert ids.count(CONTROL[USER]) == sum(m["role"] == "user" for m in seen)
            assert ids.count(CONTROL[ASSISTANT]) == ids.count(EOS_ID) == sum(m["role"] == "assistant" for m in seen)
            known = {BOS, USER, ASSISTANT, EOS, "<think>", "</think>"}
            assert not {i for name, i in CONTROL.items() if name not in known} & set(ids)
            assert ids.count(CONTROL["<think>"]) <= ids.count(EOS_ID)
            assert ids.count(CONTROL["</think>"]) <= ids.count(EOS_ID)


@settings(deadline=None, max_examples=50)
@given(
    conversations(typed | spoken, spoken), st.sampled_from(list(TEMPLATES)), st.sampled_from(["split", "strip", "keep"])
)
def test_loss_is_exactly_on_trained_answers_and_their_end(messages, template, history):
    made = make(messages, template, history)
    wanted = [m for m in messages if m.get("loss")]
    assert sum(s.turns for s in made.samples) + made.untrained == len(wanted)
    encoder = load_encoder(TOKENIZER, template)
    for sample in made.samples:
        assert len(sample.input_ids) == len(sample.labels)
        mask = sample.labels != NO_LOSS
        assert np.array_equal(sample.labels[mask], sample.input_ids[mask])
        borders = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]])))
        spans = list(zip(borders[::2], borders[1::2], strict=True))
        assert len(spans) == sample.turns
        opening = {CONTROL[ASSISTANT]} if template != V31 else {CONTROL["<think>"], CONTROL["</think>"]}
        for start, end in spans:
            assert sample.input_ids[start - 1] in opening  # nothing of the prompt, all of the answer
            assert sample.input_ids[end - 1] == encoder.eos_token_id
            assert (sample.input_ids[start : end - 1] != encoder.eos_token_id).all()


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_tokenizer_folder_without_a_file_is_named(tmp_path, name):
    for file in ("tokenizer.json", "tokenizer_config.json"):
        if file != name:
            (tmp_path / file).write_bytes((TOKENIZER / file).read_bytes())
    with pytest.raises(BadInputError, match=f"no tokenizer in .*{name}"):
        load_encoder(tmp_path, R1)


def small_tokenizer(folder, drop=(), config=None):
    data = json.loads((TOKENIZER / "tokenizer.json").read_text(encoding="utf-8"))
    data["added_tokens"] = [t for t in data["added_tokens"] if t["content"] not in drop]
    (folder / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config or CONFIG), encoding="utf-8")
    return folder


def test_tokenizer_without_a_needed_token_is_refused(tmp_path):
    with pytest.raises(BadInputError, match=f"no token {USER}"):
        load_encoder(small_tokenizer(tmp_path, {USER}), R1)


def test_v31_needs_thinking_tokens(tmp_path):
    with pytest.raises(BadInputError, match="no token <think>, </think>"):
        load_encoder(small_tokenizer(tmp_path, {"<think>", "</think>"}), V31)


def test_thinking_tags_without_tokens_are_encoded_as_text(tmp_path):
    folder = small_tokenizer(tmp_path, {"<think>", "</think>"})
    sample = make_samples([{"id": "x", "messages": TWO[:3]}], load_encoder(folder, R1), Settings(R1, 100))[0].samples[0]
    whole = Tokenizer.from_file(str(folder / "tokenizer.json"))
    rendered = f"{BOS}S{USER}Q1{ASSISTANT}<think>\nR1\n</think>\n\nA1{EOS}"
    assert sample.input_ids.tolist() == whole.encode(rendered, add_special_tokens=False).ids


def test_broken_tokenizer_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(BadInputError, match="cannot be read"):
        load_encoder(tmp_path, R1)
