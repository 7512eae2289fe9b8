"""``data.template: base``: what is trained is what the model writes after the prompt that serving makes."""

import os
import random
import re

import pytest
from unit.data import moonshot, releases
from unit.data.conversations import conversation
from unit.data.helpers import answer, assistant, called, system, tool, user

from deepseek_sft.data import template_process
from deepseek_sft.data.base_template import read_chat_template
from deepseek_sft.data.encoding import load_encoder
from deepseek_sft.data.messages import normalise
from deepseek_sft.data.samples import Settings, make_samples
from deepseek_sft.data.template_check import check
from deepseek_sft.errors import BadInputError

RECORDS = int(os.environ.get("BASE_RECORDS", 150))  # of each of the five templates
# As Kimi-K2-Thinking: reasoning has a field, turns up to the last answer lose it, tools stand first.
THINKING = (
    f"{moonshot.KIMI_HEAD}"
    "{{ m.role }}<|im_middle|>{%- if m.role == 'assistant' -%}"
    "<think>{{ m.get('reasoning_content') or '' if loop.index0 > ns.last else '' }}</think>{%- endif -%}{{ m.content }}"
    "{%- for c in m.tool_calls or [] -%}<|im_user|>functions.{{ c.function.name }}<|im_middle|>"
    "{{ c.function.arguments }}<|im_user|>{%- endfor -%}<|im_end|>{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|im_assistant|>assistant<|im_middle|>{%- endif -%}"
)
MARKED = (
    "{% for m in messages %}<|im_user|>{{ m.role }}<|im_middle|>{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}<|im_user|>assistant<|im_middle|>{% endif %}"
)


def encoder_of(path, template):
    return load_encoder(moonshot.folder(path, template), "base")


def make(encoder, messages, history="split", **more):
    record = {"id": "r", "messages": normalise(messages), **more}
    return make_samples([record], encoder, Settings("base", 100_000, history))[0]


def shown(encoder, sample):
    """Text of a sample, trained runs in double brackets."""
    names = {number: name for name, number in encoder.control.items()}
    text, before = "", False
    runs = [*zip(sample.input_ids.tolist(), (sample.labels >= 0).tolist(), strict=True), (None, False)]
    pending = []
    for number, trained in runs:
        if pending and (number is None or number in names or trained != before):
            text += encoder.text.decode(pending)
            pending = []
        text += "⟦" * (trained and not before) + "⟧" * (before and not trained)
        before = trained
        if number in names:
            text += names[number]
        elif number is not None:
            pending.append(number)
    return text


@pytest.mark.parametrize("name", releases.RELEASES)
def test_samples_equal_those_of_our_own_pieces(name, tmp_path):
    encoder = load_encoder(releases.base(tmp_path, releases.RELEASES[name]), name)
    records = []
    for seed in range(RECORDS):
        soup = "".join(random.Random(seed).choices("aé中 ,.\n12🙂'<|[", k=60))
        records.append({"id": str(seed), "messages": conversation(soup, seed, tools=seed % 2 == 0)})
    ours = make_samples(records, encoder, Settings(name, 100_000))
    base = make_samples(records, encoder, Settings("base", 100_000))
    compared = 0
    for own, found in zip(ours, base, strict=True):
        assert {r[1] for r in own.rejects} == {r[1] for r in found.rejects}
        if own.rejects:  # ours lose with such a turn those that would have been trained beside it
            continue
        one, other = (
            [(s.id, s.input_ids.tolist(), s.labels.tolist(), s.turns, s.reasoning) for s in made.samples]
            for made in (own, found)
        )
        assert one == other
        compared += len(one)
    assert compared > RECORDS / 2


@pytest.mark.parametrize("name", ["deepseek-r1", "deepseek-r1-0528"])
def test_stripped_samples_equal_those_of_our_own_pieces(name, tmp_path):
    encoder = load_encoder(releases.base(tmp_path, releases.RELEASES[name]), name)
    records = [{"id": "", "messages": conversation("ab c", seed, tools=True)} for seed in range(60)]
    ours, base = (make_samples(records, encoder, Settings(t, 100_000, "strip")) for t in (name, "base"))
    for own, found in zip(ours, base, strict=True):
        assert [s.labels.tolist() for s in own.samples] == [s.labels.tolist() for s in found.samples]


def test_moonlights_turns_are_trained_with_their_end_and_nothing_else(tmp_path):
    encoder = encoder_of(tmp_path, moonshot.TEMPLATE)
    made = make(encoder, [user("Hi 中文"), assistant("One."), user("More"), assistant("Two\n")])
    assert [shown(encoder, sample) for sample in made.samples] == [
        "<|im_system|>system<|im_middle|>You are a helpful assistant<|im_end|>"
        "<|im_user|>user<|im_middle|>Hi 中文<|im_end|><|im_assistant|>assistant<|im_middle|>⟦One.<|im_end|>⟧"
        "<|im_user|>user<|im_middle|>More<|im_end|><|im_assistant|>assistant<|im_middle|>⟦Two<|im_end|>⟧"
    ]


def test_control_tokens_typed_by_people_stay_text(tmp_path):
    encoder = encoder_of(tmp_path, moonshot.TEMPLATE)
    typed = "x<|im_end|><|im_system|>[EOS]"
    made = make(encoder, [system(typed), user(typed), assistant(typed)])
    ids = made.samples[0].input_ids.tolist()
    ends, systems = encoder.control["<|im_end|>"], encoder.control["<|im_system|>"]
    assert (ids.count(ends), ids.count(systems), ids.count(encoder.control["[EOS]"])) == (3, 1, 0)
    assert shown(encoder, made.samples[0]).count(typed) == 3
    assert made.mentions and made.spelled == 1


def test_reasoning_is_text_where_the_template_shows_answers_as_they_are(tmp_path):
    encoder = encoder_of(tmp_path, moonshot.TEMPLATE)
    made = make(encoder, [user(), answer("R", "A"), user("B"), assistant("C")])
    assert shown(encoder, made.samples[0]).count("⟦<think>\nR\n</think>\n\nA<|im_end|>⟧") == 1


def test_reasoning_that_a_template_writes_in_another_way_is_refused(tmp_path):
    text = THINKING.replace("<think>", "<|im_user|>thoughts").replace("</think>", "<|im_user|>")
    made = make(encoder_of(tmp_path, text), [user(), answer("R", "A")])
    assert [reason for _, reason, _ in made.rejects] == ["template_reasoning"]


def test_reasoning_that_the_template_cuts_is_put_back(tmp_path):
    encoder = encoder_of(tmp_path, THINKING)
    made = make(encoder, [user(), answer("R1", "A1"), user("Q2"), answer("R2", "A2")])
    assert [shown(encoder, sample) for sample in made.samples] == [
        "<|im_user|>user<|im_middle|>Q<|im_end|><|im_assistant|>assistant<|im_middle|>⟦<think>R1</think>A1<|im_end|>⟧",
        "<|im_user|>user<|im_middle|>Q<|im_end|><|im_assistant|>assistant<|im_middle|><think></think>A1<|im_end|>"
        "<|im_user|>user<|im_middle|>Q2<|im_end|><|im_assistant|>assistant<|im_middle|>⟦<think>R2</think>A2<|im_end|>⟧",
    ]


def test_calls_and_tools_stand_as_the_template_writes_them(tmp_path):
    encoder = encoder_of(tmp_path, THINKING)
    messages = [user(), {**called("f", content="I look"), "reasoning_content": "R"}, tool("21"), assistant("A")]
    made = make(encoder, messages, tools=[{"type": "function", "function": {"name": "f<|im_end|>"}}])
    text = shown(encoder, made.samples[-1])
    assert text.startswith(
        '<|im_system|>tool_declare<|im_middle|>[{"type":"function","function":{"name":"f<|im_end|>"}}]'
    )
    assert "<think>R</think>I look<|im_user|>functions.f<|im_middle|>" in text  # reasoning of this round is seen
    assert text.endswith("⟦<think></think>A<|im_end|>⟧")
    assert made.tools and not made.tools_lost


def test_calls_have_the_ids_that_a_server_gives_them(tmp_path):
    encoder = load_encoder(moonshot.folder(tmp_path, moonshot.KIMI_TEMPLATE, names=moonshot.KIMI_NAMES), "base")
    messages = [user(), called("f", "g"), tool("1"), tool("2"), called("f"), tool("3"), assistant("A")]
    made = make(encoder, messages)
    assert made.rejects == []
    text = shown(encoder, made.samples[-1])
    call = '<|tool_call_begin|>functions.{0}:{1}<|tool_call_argument_begin|>{{"x": "{0}"}}<|tool_call_end|>'
    first, second = call.format("f", 0) + call.format("g", 1), call.format("f", 2)
    for calls in (first, second):
        assert f"<|tool_calls_section_begin|>{calls}<|tool_calls_section_end|><|im_end|>⟧" in text
    answered = re.findall(r"## Return of (\S+)\n(\d)", text)
    assert answered == [("functions.f:0", "1"), ("functions.g:1", "2"), ("functions.f:2", "3")]


def test_marks_of_generation_decide(tmp_path):
    encoder = encoder_of(tmp_path, MARKED)
    made = make(encoder, [user(), assistant("A"), user("B"), assistant("C")])
    assert shown(encoder, made.samples[0]) == (
        "<|im_user|>user<|im_middle|>Q<|im_end|>\n<|im_user|>assistant<|im_middle|>⟦A<|im_end|>⟧\n"
        "<|im_user|>user<|im_middle|>B<|im_end|>\n<|im_user|>assistant<|im_middle|>⟦C<|im_end|>⟧"
    )


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        (("{{message['content']}}", "{{message['content'][:3]}}"), "template_mask"),
        (("{{message['content']}}", "{{message['content']}} Bye"), "template_mask"),
        (("<|im_end|>{%- endfor", "{%- endfor"), "template_mask"),
        (("assistant<|im_middle|>{%- endif", "assistant: {%- endif"), "template_mask"),
        (
            (
                "{%- for message",
                "{{ raise_exception('no') if messages[-1].content == 'A long answer' }}{%- for message",
            ),
            "template_refused",
        ),
    ],
)
def test_what_cannot_be_shown_to_be_right_is_rejected(tmp_path, changed, reason):
    text = moonshot.TEMPLATE.replace("{{ message['content'] }}", "{{message['content']}}")
    assert changed[0] in text
    made = make(encoder_of(tmp_path, text.replace(*changed)), [user(), assistant("A long answer")])
    assert [found for _, found, _ in made.rejects] == [reason]
    assert made.samples == []


def test_the_start_says_what_a_template_cannot_render(tmp_path):
    verdict = check(encoder_of(tmp_path, moonshot.TEMPLATE), "base")
    assert verdict.template == "base" and verdict.compared
    assert any("one call" in note and "does not show the call" in note for note in verdict.notes)
    with pytest.raises(BadInputError, match="no control token ends"):
        check(encoder_of(tmp_path / "other", "{% for m in messages %}{{ m.content }} {% endfor %}"), "base")


def test_kept_reasoning_is_refused_where_the_template_cuts_it(tmp_path):
    with pytest.raises(BadInputError, match="cuts the reasoning of earlier turns"):
        make(encoder_of(tmp_path, THINKING), [user(), answer("R", "A")], "keep")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "processor time"),
        ("{{ 9 ** (9 ** 9) }}", "too large"),
        ("{% for a in range(99999) %}{{ 'x' * 1000 }}{% endfor %}", "writes more than"),
        ("{{ 'x' * 10000000 }}", "writes more than"),
        ("{{ ('x' * 2000000000) | length }}", "memory"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}", "RecursionError"),
        ("{{ raise_exception('not so') }}", "not so"),
        ("{% include '/etc/passwd' %}", "TypeError"),
    ],
)
def test_a_hostile_template_ends_with_a_sentence(text, said, monkeypatch, tmp_path):
    monkeypatch.setattr(template_process, "SECONDS", 0)
    monkeypatch.setattr(template_process, "_child", [])
    folder = moonshot.folder(tmp_path, moonshot.TEMPLATE)
    (folder / "chat_template.jinja").write_text(text)
    with pytest.raises(BadInputError, match=said):
        check(load_encoder(folder, "base"), "base")
    assert template_process.render("{{ 1 + 1 }}", {}) == "2"  # the next template is rendered


def test_a_template_that_is_no_jinja_is_named(tmp_path):
    (moonshot.folder(tmp_path) / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(BadInputError, match="is no Jinja template"):
        read_chat_template(tmp_path)
