"""The template of training is the base's: it is compared before anything is rendered, and tools are shown as there."""

import json

import pytest
from unit.data.helpers import PROJECT, TOKENIZER, assistant, read_lines, run_script, user, write_lines
from unit.data.releases import OPENS_REASONING, RELEASES, base, read, with_tools
from unit.data.test_templates import ids

from deepseek_sft import known_at_start
from deepseek_sft.data import template_check
from deepseek_sft.data.base_template import TemplateError
from deepseek_sft.data.chat_templates import TEMPLATES
from deepseek_sft.data.encoding import load_encoder
from deepseek_sft.data.messages import normalise
from deepseek_sft.data.samples import Settings, make_samples
from deepseek_sft.errors import BadInputError, GateError
from deepseek_sft.experiment import Experiment

TOOLS = [{"type": "function", "function": {"name": "f", "description": '<é> <｜User｜> & "', "parameters": {}}}]


def checked(folder, template, policy="fail"):
    return template_check.check(load_encoder(folder, template), template, policy)


@pytest.mark.parametrize("release", RELEASES)
def test_auto_takes_the_one_template_that_fits_and_says_so(release, tmp_path):
    folder = base(tmp_path / "base", RELEASES[release])
    verdict = checked(folder, "auto")
    assert verdict.template == release and verdict.agrees and verdict.compared > 25
    assert f"auto takes {release}" in verdict.notes[0]
    fits = [name for name in TEMPLATES if not template_check.compare(load_encoder(folder, name), name)[0]]
    assert fits == [release]


@pytest.mark.parametrize("release", [name for name in RELEASES if name != "deepseek-r1"])
def test_another_releases_template_stops_with_both_texts_and_the_name_that_fits(release, tmp_path):
    with pytest.raises(GateError) as caught:
        checked(base(tmp_path / "base", RELEASES[release]), "deepseek-r1")
    assert f"set data.template: {release}, which gives the base's prompts" in caught.value.fix
    lines = [line.split() for line in caught.value.problem.splitlines()]
    assert [words[0] for words in lines if words[0] in ("base", "deepseek-r1")][:2] == ["base", "deepseek-r1"]


def test_a_difference_may_be_allowed_and_is_then_said(tmp_path):
    verdict = checked(base(tmp_path / "base", RELEASES["deepseek-v3.1"]), "deepseek-r1", "warn")
    assert verdict.template == "deepseek-r1" and not verdict.agrees and "prompts differ" in verdict.notes[0]


def test_a_base_without_a_chat_template_is_not_passed_in_silence(tmp_path):
    folder = base(tmp_path / "base", None)
    verdict = checked(folder, "deepseek-r1")
    assert not verdict.agrees and "cannot be compared" in verdict.notes[0]
    with pytest.raises(BadInputError, match="no chat template to choose by"):
        checked(folder, "auto")


def test_a_prompt_that_opens_the_reasoning_itself_is_r1s_and_is_noted(tmp_path):
    verdict = checked(base(tmp_path / "base", OPENS_REASONING), "deepseek-r1")
    assert verdict.template == "deepseek-r1" and "opens the reasoning in every prompt" in verdict.notes[0]


def test_where_calls_alone_fit_no_template_records_with_tools_are_refused(tmp_path):
    own = RELEASES["deepseek-r1"].replace("<｜tool▁output▁begin｜>", "<｜tool▁output▁begin｜>:")
    verdict = checked(base(tmp_path / "base", own), "deepseek-r1")
    assert "prompts differ" in verdict.tools_differ
    messages = [user(), assistant("", tool_calls=[{"function": {"name": "f", "arguments": "{}"}}])]
    messages += [{"role": "tool", "content": "1"}, assistant()]
    for name, chat, code in (("plain", [user(), assistant()], 0), ("tools", messages, 3)):
        done = tokenized(tmp_path / name, tmp_path / "base", [{"id": name, "messages": normalise(chat)}])
        assert done.returncode == code, done.stderr


def tokenized(folder, tokenizer, records, *more):
    folder.mkdir()
    source = write_lines(folder / "train.jsonl", records)
    return run_script(
        *("tokenize_data.py", "--input", source, "--tokenizer", tokenizer, "--output", folder / "tokens"),
        *("--rejects", folder / "rejects.jsonl", "--statistics", folder / "statistics.json"),
        *("--receipt", folder / "receipt.json", "--max-length", 1000, *more),
    )


def test_tokenize_data_stops_before_it_renders_and_receipt_names_what_auto_took(tmp_path):
    folder = base(tmp_path / "base", RELEASES["deepseek-r1-0528"])
    records = [{"id": "a", "messages": normalise([user(), assistant()])}]
    done = tokenized(tmp_path / "r1", folder, records)
    assert done.returncode == 3 and "deepseek-r1-0528" in done.stderr and not (tmp_path / "r1/tokens").exists()
    done = tokenized(tmp_path / "auto", folder, records, "--template", "auto")
    assert done.returncode == 0, done.stderr
    receipt = json.loads((tmp_path / "auto/receipt.json").read_text())
    assert receipt["settings"]["template"] == "deepseek-r1-0528"
    assert json.loads((tmp_path / "auto/tokens/tokens.json").read_text())["template"] == "deepseek-r1-0528"


def test_start_compares_the_base_too_where_the_tokenizer_lies_elsewhere(tmp_path):
    import yaml

    config = yaml.safe_load((PROJECT / "config/config.yaml").read_text())
    config["model"] = {"base": str(base(tmp_path / "base", RELEASES["deepseek-v3.1"]))}
    config["data"] |= {"tokenizer": str(TOKENIZER)}
    with pytest.raises(GateError, match=r"deepseek-v3\.1"):
        known_at_start.check_template(Experiment.from_config(config))
    assert known_at_start.check_template(Experiment.from_config(config), ["train"]) == []
    config["data"] |= {"on_template_difference": "warn"}
    assert "prompts differ" in known_at_start.check_template(Experiment.from_config(config))[0]


@pytest.mark.parametrize("release", [name for name in RELEASES if name != "deepseek-v3.1"])
def test_definitions_of_tools_stand_where_the_base_shows_them(release, tmp_path):
    folder = base(tmp_path / "base", with_tools(release))
    encoder = load_encoder(folder, release)
    assert checked(folder, "auto").template == release
    for chat in ([user("Q"), assistant("A")], [{"role": "system", "content": "S"}, user("Q"), assistant("A")]):
        tools = json.loads(json.dumps(TOOLS, ensure_ascii=False).replace("<｜User｜>", "U"))
        record = {"id": "x", "messages": normalise(chat), "tools": tools}
        made = make_samples([record], encoder, Settings(release, 1000))[0]
        prompt = ids(read(folder).render(chat[:-1], tools=tools, prompt=True))
        assert made.samples[0].input_ids[: len(prompt)].tolist() == prompt
        assert made.calls and not made.tools_lost


def test_control_tokens_of_the_template_are_such_and_typed_ones_stay_text(tmp_path):
    folder = base(tmp_path / "base", with_tools("deepseek-r1"))
    record = {"id": "x", "messages": normalise([user("Q"), assistant("A")]), "tools": TOOLS}
    made = make_samples([record], load_encoder(folder, "deepseek-r1"), Settings("deepseek-r1", 1000))[0]
    found = made.samples[0].input_ids.tolist()
    assert found.count(ids("<｜tool▁calls▁begin｜>")[0]) == 1 and found.count(ids("<｜User｜>")[0]) == 1


def test_definitions_that_the_base_does_not_show_are_counted(tmp_path):
    folder = base(tmp_path / "base", RELEASES["deepseek-r1"])
    record = {"id": "x", "messages": normalise([user(), assistant()]), "tools": TOOLS}
    done = tokenized(tmp_path / "t", folder, [record])
    assert done.returncode == 0 and "1 records come with definitions of tools" in done.stderr
    assert json.loads((tmp_path / "t/receipt.json").read_text())["figures"]["records_with_tools_not_shown"] == 1


def test_definitions_shown_elsewhere_are_refused(tmp_path):
    text = RELEASES["deepseek-r1"] + "{% if tools %}{{ tools | tojson }}{% endif %}"
    record = {"id": "x", "messages": normalise([user(), assistant()]), "tools": TOOLS}
    made = make_samples([record], load_encoder(base(tmp_path / "b", text), "deepseek-r1"), Settings("deepseek-r1", 999))
    assert [reason for _, reason, _ in made[0].rejects] == ["tool_definitions"]


def test_named_templates_and_files_are_chosen_as_servers_choose(tmp_path):
    named = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b{{ bos_token }}"}]
    folder = base(tmp_path / "base", named)
    assert read(folder).render([]) == "a" and read(folder).render([], tools=TOOLS).startswith("b<｜begin")
    (folder / "chat_template.jinja").write_text("c{{ strftime_now('%Y') | length }}{{ {'é': 1} | tojson }}")
    assert read(folder).render([]) == 'c4{"é": 1}'
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/tool_use.jinja").write_text("{{ raise_exception('no tools') }}")
    assert read(folder).render([]) == 'c4{"é": 1}'
    with pytest.raises(TemplateError, match="no tools"):
        read(folder).render([], tools=TOOLS)


def test_a_chat_template_that_is_no_jinja_is_named(tmp_path):
    with pytest.raises(BadInputError, match="no Jinja template"):
        checked(base(tmp_path / "base", "{% if %}"), "deepseek-r1")


def test_tools_that_are_no_definitions_cost_that_record_alone(tmp_path):
    messages = normalise([user(), assistant()])
    records = [{"id": "a", "messages": messages, "tools": "x"}, {"id": "b", "messages": messages}]
    done = tokenized(tmp_path / "t", TOKENIZER, records)
    assert done.returncode == 0, done.stderr
    assert [r["reason"] for r in read_lines(tmp_path / "t/rejects.jsonl")] == ["invalid_record"]
