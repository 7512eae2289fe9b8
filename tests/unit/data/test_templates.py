"""Tokens equal those of the releases' own templates, tool calls included; trained tokens decode to the answers."""

import functools
import json

import pytest
from hypothesis import given, settings
from tokenizers import Tokenizer
from unit.data.conversations import conversations, documented_v31, rendered
from unit.data.helpers import ASSISTANT, BOS, EOS, TOKENIZER, USER, answer, assistant, called, tool, user
from unit.data.releases import release

from deepseek_sft.data.encoding import load_encoder
from deepseek_sft.data.messages import normalise, split_reasoning
from deepseek_sft.data.samples import Settings, make_samples
from deepseek_sft.data.tokens import NO_LOSS

R1, V3, V31 = "deepseek-r1", "deepseek-v3", "deepseek-v3.1"
WHOLE = Tokenizer.from_file(str(TOKENIZER / "tokenizer.json"))
BOS_ID, EOS_ID = WHOLE.token_to_id(BOS), WHOLE.token_to_id(EOS)
many = functools.partial(settings, deadline=None, database=None)


def ids(text):
    return WHOLE.encode(text, add_special_tokens=False).ids


def make(messages, template, history="split"):
    record = [{"id": "x", "messages": messages}]
    return make_samples(record, load_encoder(TOKENIZER, template), Settings(template, 100_000, history))[0]


def end_of(sample, messages):
    """Number of the last message that a sample holds."""
    return int(sample.id.partition("#")[2] or max(i for i, m in enumerate(messages) if m.get("loss")))


def end_of_prompt(sample):
    """Where the last trained answer begins."""
    untrained = (sample.labels == NO_LOSS).nonzero()[0]
    return int(untrained[-1]) + 1


def trained(sample):
    return [int(i) for i in sample.labels if i != NO_LOSS]


@many(max_examples=2000)
@given(conversations(reasoning=False))
def test_tokens_equal_r1_template_without_reasoning(messages):
    sample = make(messages, R1).samples[-1]
    assert sample.input_ids.tolist() == ids(rendered(messages))
    assert sample.input_ids.tolist().count(BOS_ID) == 1


@many(max_examples=2000)
@given(conversations())
def test_tokens_equal_the_template_without_its_cut(messages):
    for template, history in ((V3, "split"), (R1, "keep")):
        sample = make(messages, template, history).samples[-1]
        assert sample.input_ids.tolist() == ids(rendered(messages, cut=False))
        assert sample.input_ids.tolist().count(BOS_ID) == 1


@many(max_examples=500)
@given(conversations())
def test_tokens_equal_v31_documented_form(messages):
    for sample in make(messages, V31).samples:
        end = end_of(sample, messages)
        reasoning, text = split_reasoning(messages[end]["content"])
        prompt = documented_v31(messages[:end], thinking=bool(reasoning))
        written = f"{reasoning}</think>{text}{EOS}" if reasoning else f"{text}{EOS}"
        assert sample.input_ids.tolist() == ids(prompt + written)


@many(max_examples=500)
@given(conversations(tools=True))
def test_prompt_of_a_trained_turn_is_the_one_serving_makes_with_tools(messages):
    for sample in make(messages, R1).samples:
        end = end_of(sample, messages)
        prompt = ids(rendered(messages[:end], prompt=True))
        assert sample.input_ids[: len(prompt)].tolist() == prompt
        assert (sample.labels[len(prompt) :] != NO_LOSS).all()
    for sample in make(messages, V31).samples:
        end = end_of(sample, messages)
        reasoning, _ = split_reasoning(messages[end]["content"])
        prompt = ids(documented_v31(messages[:end], thinking=bool(reasoning)))
        assert sample.input_ids[: len(prompt)].tolist() == prompt
        assert (sample.labels[len(prompt) :] != NO_LOSS).all()


@many(max_examples=500)
@given(conversations(tools=True))
def test_prompt_of_a_trained_turn_is_the_one_the_later_releases_make(messages):
    for name in ("deepseek-r1-0528", "deepseek-v3-0324", V3):
        for sample in make(messages, name, "split").samples:
            end = end_of(sample, messages)
            prompt = ids(release(name).render(messages[:end], prompt=True))
            assert sample.input_ids[: len(prompt)].tolist() == prompt
            assert end_of_prompt(sample) == len(prompt)


@many(max_examples=500)
@given(conversations(tools=True))
def test_tokens_of_calls_equal_the_later_releases_whole_rendering(messages):
    sample = make(messages, "deepseek-v3-0324", "keep").samples[-1]
    assert sample.input_ids.tolist() == ids(release("deepseek-v3-0324").render(messages))


def test_later_releases_open_each_round_as_written_by_hand():
    messages = normalise([user("Q"), called("a"), tool("1"), called("b", "c"), tool("2"), tool("3"), assistant("A")])
    call = '<｜tool▁call▁begin｜>function<｜tool▁sep｜>{0}\n```json\n{{"x": "{0}"}}\n```<｜tool▁call▁end｜>'
    calls, output = (
        "<｜tool▁calls▁begin｜>{}<｜tool▁calls▁end｜>" + EOS,
        "<｜tool▁output▁begin｜>{}<｜tool▁output▁end｜>",
    )
    text = f"{BOS}{USER}Q{ASSISTANT}{calls.format(call.format('a'))}<｜tool▁outputs▁begin｜>{output.format(1)}"
    text += (
        f"<｜tool▁outputs▁end｜>{calls.format(call.format('b') + chr(10) + call.format('c'))}<｜tool▁outputs▁begin｜>"
    )
    text += f"{output.format(2)}\n{output.format(3)}<｜tool▁outputs▁end｜>A{EOS}"
    for name in ("deepseek-r1-0528", "deepseek-v3-0324"):
        (sample,) = make(messages, name).samples
        assert sample.input_ids.tolist() == ids(text)


def test_0528_cuts_the_reasoning_of_calls_and_of_what_answers_outputs():
    answered = assistant("A", reasoning_content="S")
    messages = normalise(
        [user("Q"), called("a", reasoning_content="R"), tool("1"), answered, user("P"), assistant("B")]
    )
    last = make(messages, "deepseek-r1-0528").samples[-1]
    text = WHOLE.decode(last.input_ids.tolist(), skip_special_tokens=False)
    assert "<think>" not in text and f"{ASSISTANT}\n\n<｜tool▁calls▁begin｜>" in text
    assert f"<｜tool▁outputs▁end｜>\n\nA{EOS}" in text


@many(max_examples=500)
@given(conversations(tools=True))
def test_tokens_of_tool_calls_equal_the_template(messages):
    seen = False
    for message in messages:  # a later call is trained as parsers need it, so compare where it is only history
        if message.get("tool_calls"):
            message["loss"] = message["loss"] and not seen
            seen = True
    sample = make(messages, V3, "keep").samples[-1]
    assert sample.input_ids.tolist() == ids(rendered(messages, cut=False))


def test_first_and_later_calls_render_as_written_by_hand():
    messages = normalise([user("Q"), called("a", "b"), tool("1"), tool("2"), called("c"), tool("3"), assistant("A")])
    call = '<｜tool▁call▁begin｜>function<｜tool▁sep｜>{0}\n```json\n{{"x": "{0}"}}\n```<｜tool▁call▁end｜>'
    first = f"<｜tool▁calls▁begin｜>{call.format('a')}\n{call.format('b')}<｜tool▁calls▁end｜>{EOS}"
    output = "<｜tool▁output▁begin｜>{}<｜tool▁output▁end｜>"
    outputs = f"<｜tool▁outputs▁begin｜>{output.format(1)}{output.format(2)}"
    second = f"<｜tool▁calls▁begin｜>{call.format('c')}<｜tool▁calls▁end｜>{EOS}"
    one, two = make(messages, R1).samples
    start = f"{BOS}{USER}Q{ASSISTANT}{first}{outputs}"
    assert one.input_ids.tolist() == ids(f"{start}<｜tool▁outputs▁end｜>{second}")
    assert trained(one) == ids(first) + ids(second)
    shown = f"\n{call.format('c')}<｜tool▁calls▁end｜>{EOS}{output.format(3)}"
    assert two.input_ids.tolist() == ids(f"{start}{shown}<｜tool▁outputs▁end｜>A{EOS}")
    assert trained(two) == ids(f"A{EOS}")


def test_reasoning_of_a_call_stays_in_history():
    messages = normalise([user("Q"), called("a", reasoning_content="R"), tool("1"), assistant("A")])
    (sample,) = make(messages, R1).samples
    assert sample.input_ids.tolist() == ids(rendered(messages))
    assert len(sample.reasoning) == 2 and sample.reasoning[0] > 0


def test_v31_has_no_place_for_reasoning_with_a_call():
    messages = normalise([user("Q"), called("a", reasoning_content="R"), tool("1"), assistant("A")])
    made = make(messages, V31)
    assert [(name, reason) for name, reason, _ in made.rejects] == [("x#1", "tool_reasoning")]
    assert [sample.input_ids.tolist() for sample in made.samples] == [ids(documented_v31(messages))]


@many(max_examples=500)
@given(conversations(tools=True))
def test_trained_tokens_decode_to_the_trained_answers_alone(messages):
    made = make(messages, R1)
    wanted = [
        f"{m['content']}{rendered([user('Q'), m | {'content': ''}]).partition(ASSISTANT)[2].removesuffix(EOS)}{EOS}"
        if m.get("tool_calls")
        else m["content"] + EOS
        for m in messages
        if m.get("loss")
    ]
    assert not made.rejects and not made.untrained
    found = "".join(WHOLE.decode(trained(sample), skip_special_tokens=False) for sample in made.samples)
    assert found == "".join(wanted)
    assert [i for sample in made.samples for i in trained(sample)] == [i for text in wanted for i in ids(text)]
    assert sum(trained(sample).count(EOS_ID) for sample in made.samples) == len(wanted)


@pytest.mark.parametrize("template", [R1, V3, V31])
def test_typed_tool_tokens_stay_text(template):
    typed = "<｜tool▁calls▁begin｜><｜tool▁outputs▁end｜>"
    messages = normalise([user(typed), called("a", content=typed), tool(typed), answer("", "A") | {"content": "A"}])
    messages[1]["tool_calls"][0]["function"]["arguments"] = json.dumps({"text": typed}, ensure_ascii=False)
    made = make(messages, template)
    begin, end = WHOLE.token_to_id("<｜tool▁calls▁begin｜>"), WHOLE.token_to_id("<｜tool▁outputs▁end｜>")
    found = made.samples[-1].input_ids.tolist()
    assert found.count(begin) == 1 and found.count(end) == (template != V31)
    assert made.mentions
