"""The report of a finished experiment: complete, escaped, self-contained."""

import re

import pytest
from unit.report import results as made
from unit.report.page import Page, section

from deepseek_sft import formatting, stages
from deepseek_sft.report import build, chat_section, collect, overview

SOURCES = (("bad", "0 of 3"), ("good", "1,000 of 1,000"))


@pytest.fixture
def results(tmp_path):
    return made.write_results(tmp_path)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return build.build(made.write_results(tmp_path_factory.mktemp("finished")), None).html


# ---- what is on the page


def test_every_stage_appears_in_chain_order(page):
    found = re.findall(r'<section id="(\w+)">', page)
    shown = [stage.name for stage in stages.ROWS if stage.purpose and not stage.shown_where_run]
    assert found == [*shown, "config", "versions", "commands"]


def test_top_shows_the_five_numbers_that_matter(page):
    top = Page(page[: page.index("<section")]).text
    for expected in ("1,000", "11.8 → 0.0421", "CPU rank hours", "16.02 MiB", "results/demo/model", "2 of 2 checks"):
        assert expected in top


def test_gpu_hours_are_ranks_times_time(results):
    command = ["workflow/scripts/train.py", "--accelerator", "cuda"]
    figures = {"world_size": 256, "seconds": 36_000.0}
    made.write_receipt(results, "train", figures=figures, command=command)
    cards = {label: value for label, value, _ in overview.headline(collect.stages(results, None), [])}
    assert cards["GPU hours"] == "2,560"


def test_run_that_ended_before_the_data_did_does_not_claim_all_samples(results):
    made.write_receipt(results, "train", figures=made.FIGURES["train"] | {"trained_tokens": 22839})
    label, value, note = overview.headline(collect.stages(results, None), [])[0]
    assert (label, value) == ("samples trained", "≈ 500")
    assert "0.5 × the data" in note


def test_verdict_of_a_finished_experiment_is_complete(page):
    assert "Complete: every stage passed" in page


def test_each_figures_table_names_its_receipt(page):
    for rule in made.FIGURES:
        assert f"from receipts/{rule}.json" in section(page, rule)


def test_hosts_job_and_duration_are_shown(page):
    text = Page(section(page, "train")).text
    for expected in ("node1, node2", "Slurm job 17", "took 30.2 s"):
        assert expected in text


def test_plots_of_training_and_lengths_are_drawn(page):
    assert page[: page.index("<section")].count("<svg") == 1  # the loss
    assert section(page, "train").count("<svg") == 5
    assert section(page, "tokenize_data").count("<svg") == 1


def test_rejects_are_counted_by_reason(page):
    text = Page(section(page, "prepare_data")).text
    assert re.search(r"no assistant turn\s*2", text)
    assert "not JSON <b>" in text


def test_sources_and_unused_fields_are_shown_the_lost_source_first(page):
    text = Page(section(page, "prepare_data")).text
    bad, good = (re.search(rf"chats/{name}\.jsonl\s*{counts}", text) for name, counts in SOURCES)
    assert bad.start() < good.start()
    assert re.search(r"messages\[\]\.thought_of <i>\s*500 of 1,000\s*chats/good\.jsonl:1", text)


def test_checks_show_their_verdicts_and_skipped_ones_count_as_neither(page):
    text = Page(section(page, "smoke_test")).text
    assert text.count("passed") == 2
    assert text.count("skipped") == 1


def test_transcript_shows_question_reasoning_and_answer(results):
    (results / "serve/evaluation.jsonl").write_text("")
    text = Page(section(build.build(results, None).html, "smoke_test")).text
    for expected in ("What is 17 + 25?", "7 + 5 = 12, carry 1.", "42", "9.11 和 9.2 哪个大?"):
        assert expected in text


def test_held_out_samples_show_both_answers_and_losses(page):
    text = Page(section(page, "smoke_test")).text
    for expected in ("before tuning (loss of the reference 12.100)", "的 zoo|| untrained", "after tuning (loss of the"):
        assert expected in text
    assert text.count("expected42") == 8


def test_held_out_samples_of_the_receipt_stand_in_for_an_absent_record(results):
    (results / "serve/evaluation.jsonl").unlink()
    made.write_receipt(results, "smoke_test", figures=made.FIGURES["smoke_test"] | {"samples": [made.held_out(3)]})
    (sample,) = chat_section.answered(results, collect.stages(results, None)["smoke_test"])
    assert (sample.question, sample.expected, sample.base_answer) == ("What is 17 + 25?", "42", "的 zoo|| untrained")


def test_held_out_chats_come_before_those_of_other_checks(results):
    found = chat_section.transcript(results / "serve/transcript.jsonl", None, 4)
    assert [sample.title for sample in found] == ["held_out_format"] * 3 + ["chat"]


def test_example_stands_in_for_an_absent_transcript():
    (sample,) = chat_section.transcript(None, {"prompt": "2 + 2?", "reasoning": "", "answer": "4"}, 4)
    assert (sample.question, sample.reasoning, sample.answer) == ("2 + 2?", "", "4")


def test_long_tables_fold_away(results):
    figures = {"sha256": {f"model-{number}.safetensors": "ab" * 32 for number in range(13)}, "short": {"a": 1.5}}
    made.write_receipt(results, "verify_model", figures=figures)
    shown = section(build.build(results, None).html, "verify_model")
    assert "<summary>sha256 (13)</summary>" in shown
    assert "<summary>short" not in shown


def test_a_new_figure_appears_without_code(results):
    figures = made.FIGURES["train"] | {"longest_stall_s": 12.5, "read_gib_per_second": 3.5}
    made.write_receipt(results, "train", figures=figures, finished="2026-01-31T12:04:30+00:00")
    text = Page(section(build.build(results, None).html, "train")).text
    assert re.search(r"longest stall\s*12.5 s", text)
    assert re.search(r"read speed\s*3.50 GiB/s", text)


def test_versions_that_differ_between_stages_are_told_apart(results):
    made.write_receipt(results, "plan", versions={"python": "3.12.1", "workflow": "0.1.0"})
    text = Page(section(build.build(results, None).html, "versions")).text
    assert re.search(r"3\.12\.1\s*plan", text)


# ---- safe and self-contained


def test_text_from_data_is_escaped(page):
    parsed = Page(page)
    assert made.HOSTILE in parsed.text
    assert not [tag for tag, _ in parsed.tags if tag in ("script", "img", "b")]


def test_no_part_of_the_page_comes_from_elsewhere(page):
    for tag, attributes in Page(page).tags:
        for name in ("src", "href", "xlink:href", "data", "srcset", "action"):
            own = "data:image/png;base64," if tag == "image" else "#"
            assert (attributes.get(name) or own).startswith(("#", own)), (tag, attributes)
        assert tag not in ("link", "script", "iframe", "object", "embed", "base")
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)


def test_element_ids_are_unique(page):
    ids = [attributes["id"] for _, attributes in Page(page).tags if attributes.get("id")]
    assert len(ids) == len(set(ids))


def test_drawings_take_their_colours_from_the_page(page):
    drawings = "".join(re.findall(r"<svg.*?</svg>", page, re.DOTALL))
    assert "var(--series-1)" in drawings
    assert "currentColor" in drawings
    assert not re.search(r"#[0-9a-fA-F]{6}\b", re.sub(r'href="#[^"]*"|url\(#[^)]*\)', "", drawings))


def test_secrets_in_settings_and_commands_are_hidden(page):
    assert "hunter2" not in page
    assert page.count("(hidden)") >= 2


def test_secrets_of_engine_options_and_addresses_are_hidden():
    settings = {
        "engine_args": {"hf-token": "hunter2", "max-num-batched-tokens": 2048},
        "environment": {"TOKEN": "hunter2", "OPENAI_KEY": "hunter2", "http_proxy": "http://me:hunter2@proxy:3128"},
    }
    shown = formatting.without_secrets(settings)
    assert "hunter2" not in str(shown)
    assert shown["engine_args"]["max-num-batched-tokens"] == 2048
    assert shown["environment"]["http_proxy"] == "http://(hidden)@proxy:3128"


def test_equal_results_give_equal_drawings(results):
    first, second = (re.findall(r"<svg.*?</svg>", build.build(results, None).html, re.DOTALL) for _ in range(2))
    assert first == second
