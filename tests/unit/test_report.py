"""The report: complete, escaped, self-contained, and still there when stages are missing or broken."""

import copy
import html.parser
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_sft.errors import BadInputError
from deepseek_sft.report import build, collect, overview

RECEIPT_KEYS = (
    "inputs",
    "settings",
    "result",
    "figures",
    "hosts",
    "slurm",
    "versions",
    "command",
    "seconds",
    "finished",
)
REPOSITORY = Path(__file__).resolve().parents[2]
_spec = importlib.util.spec_from_file_location("report_results", Path(__file__).with_name("report_results.py"))
made = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(made)


class Page(html.parser.HTMLParser):
    """Tags with attributes, and the text, of a page."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)

    def handle_data(self, data):
        self.text += data


def section(page: str, rule: str) -> str:
    return re.search(rf'<section id="{rule}">.*?</section>', page, re.DOTALL).group(0)


@pytest.fixture
def results(tmp_path):
    return made.write_results(tmp_path)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return build.build(made.write_results(tmp_path_factory.mktemp("finished")), None).html


def run_script(*arguments, cwd):
    script = REPOSITORY / "workflow/scripts/build_report.py"
    command = [sys.executable, str(script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=cwd)


# ---- what is on the page


def test_every_stage_appears_in_chain_order(page):
    found = re.findall(r'<section id="(\w+)">', page)
    shown = [rule for rule in collect.CHAIN if rule not in collect.OPTIONAL]
    assert found == [*shown, "versions", "commands"]


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
    assert section(page, "train").count("<svg") == 4
    assert section(page, "tokenize_data").count("<svg") == 1


def test_rejects_are_counted_by_reason(page):
    text = Page(section(page, "prepare_data")).text
    assert re.search(r"no assistant turn\s*2", text)
    assert "not JSON <b>" in text


def test_checks_show_their_verdicts_and_skipped_ones_count_as_neither(page):
    text = Page(section(page, "smoke_test")).text
    assert text.count("passed") == 2
    assert text.count("skipped") == 1


def test_transcript_shows_question_reasoning_and_answer(page):
    text = Page(section(page, "smoke_test")).text
    for expected in ("What is 17 + 25?", "7 + 5 = 12, carry 1.", "42", "9.11 和 9.2 哪个大?"):
        assert expected in text


def test_held_out_chats_come_before_those_of_other_checks(results):
    samples = collect.transcript(results / "serve/transcript.jsonl", None, 4)
    assert [sample.title for sample in samples] == ["held_out_format"] * 3 + ["chat"]


def test_example_stands_in_for_an_absent_transcript():
    (sample,) = collect.transcript(None, {"prompt": "2 + 2?", "reasoning": "", "answer": "4"}, 4)
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
            assert (attributes.get(name) or "#").startswith("#"), (tag, attributes)
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


def test_equal_results_give_equal_drawings(results):
    first, second = (re.findall(r"<svg.*?</svg>", build.build(results, None).html, re.DOTALL) for _ in range(2))
    assert first == second


# ---- missing, broken, failed


def test_missing_stages_are_shown_as_not_run(tmp_path):
    results = made.write_results(tmp_path, ("prepare_data", "tokenize_data", "prepare_model"))
    page = build.build(results, None).html
    for rule in ("plan", "train", "convert_checkpoint", "verify_model", "smoke_test"):
        assert "not run" in section(page, rule)
    assert "Not complete: train is next" in page


def test_an_experiment_without_plan_is_complete(tmp_path):
    results = made.write_results(tmp_path, tuple(rule for rule in made.FIGURES if rule != "plan"))
    report = build.build(results, None)
    assert "not run" in section(report.html, "plan")
    assert report.figures["verdict"] == "Complete: every stage passed"


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"rule": "plan"}', "\x00\xff", "[" * 100_000])
def test_unreadable_receipt_is_shown_as_such(results, content):
    (results / "receipts/train.json").write_text(content)
    report = build.build(results, None)
    assert "unreadable" in section(report.html, "train")
    assert report.figures["verdict"] == "Unreadable: train"


def test_receipt_with_keys_absent_is_rendered(results):
    for rule in made.FIGURES:
        (results / f"receipts/{rule}.json").write_text(json.dumps({"schema": 1, "rule": rule}))
    assert build.build(results, None).figures["stages_complete"] == len(made.FIGURES)


def test_receipt_with_values_of_wrong_types_is_rendered(results):
    broken = dict.fromkeys(("inputs", "settings", "result", "figures", "hosts", "slurm", "versions", "command"), 7)
    made.write_receipt(results, "train", **broken)
    figures = {
        "world_size": "x",
        "seconds": None,
        "first_loss": "low",
        "checks": {},
        "steps": [[1], {"a": 2}],
        "example": 3,
    }
    made.write_receipt(results, "smoke_test", figures=figures)
    page = build.build(results, None).html
    assert re.findall(r'<section id="(\w+)">', page)[-2:] == ["versions", "commands"]
    assert "low" in section(page, "smoke_test")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
KEYS = st.sampled_from(["checks", "verdict", "example", "seconds", "world_size", "first_loss", "parameters", "rejects"])
CHECKS = st.fixed_dictionaries({"checks": st.dictionaries(st.text(), st.fixed_dictionaries({"passed": JSON}))})


@settings(max_examples=60, deadline=None)
@given(receipt=st.dictionaries(st.sampled_from(RECEIPT_KEYS), JSON), figures=CHECKS | st.dictionaries(KEYS, JSON))
def test_no_content_of_a_receipt_stops_the_report(tmp_path_factory, receipt, figures):
    results = tmp_path_factory.mktemp("any") / "results" / "any"
    (results / "receipts").mkdir(parents=True)
    for rule in ("plan", "train", "tokenize_data", "smoke_test"):
        content = {"figures": figures, **receipt, "rule": rule}
        (results / f"receipts/{rule}.json").write_text(json.dumps(content))
    build.build(results, None)
    overview.summary(results, None)


def test_last_lines_of_the_log_explain_a_stage_without_receipt(tmp_path):
    results = made.write_results(tmp_path, ("prepare_data",))
    logs = tmp_path / "logs/demo"
    logs.mkdir(parents=True)
    lines = [f"step {number} \x1b[31m<loss>\x1b[0m" for number in range(500)]
    (logs / "train.log").write_text("\n".join(lines) + "\nerror: node2 died\n")
    shown = section(build.build(results, logs).html, "train")
    text = Page(shown).text
    assert "not finished" in text
    assert "error: node2 died" in text
    assert "step 499 <loss>" in text
    assert "step 400 " not in text


def test_gate_that_failed_says_so_and_keeps_its_transcript(results, tmp_path):
    (results / "receipts/smoke_test.json").unlink()
    folder = tmp_path / "logs/demo/smoke_test"
    folder.mkdir(parents=True)
    (folder / "do-not-retry").write_text("attempt 1 ended with exit code 3, see logs/demo/smoke_test/17-1.log\n")
    (folder / "17-1.log").write_text("  FAILED logprobs: off by 0.8\n")
    (folder.parent / "smoke_test.log").symlink_to("smoke_test/17-1.log")
    report = build.build(results, tmp_path / "logs/demo")
    assert report.figures["verdict"] == "Failed: smoke_test"
    text = Page(section(report.html, "smoke_test")).text
    for expected in ("exit code 3", "FAILED logprobs: off by 0.8", "9.11 和 9.2 哪个大?"):
        assert expected in text


def test_training_without_receipt_still_shows_its_loss(tmp_path):
    results = made.write_results(tmp_path, ("prepare_data",))
    logs = tmp_path / "logs/demo"
    logs.mkdir(parents=True)
    (logs / "train.log").write_text("step 120\n")
    assert section(build.build(results, logs).html, "train").count("<svg") == 4


def test_failed_check_fails_the_stage_and_the_report(results):
    figures = copy.deepcopy(made.FIGURES["smoke_test"])
    figures["checks"]["logprobs"] = {"passed": False, "detail": "off by 0.8"}
    made.write_receipt(results, "smoke_test", figures=figures, finished="2026-01-31T12:07:30+00:00")
    report = build.build(results, None)
    assert report.figures["verdict"] == "Failed: smoke_test"
    assert "off by 0.8" in section(report.html, "smoke_test")


def test_stage_older_than_its_input_is_out_of_date(results):
    made.write_receipt(results, "convert_checkpoint", finished="2026-01-31T23:00:00+00:00")
    report = build.build(results, None)
    assert report.figures["verdict"] == "Out of date: verify_model, smoke_test"


def test_result_that_has_gone_is_named(results):
    (results / "model").rmdir()
    page = build.build(results, None).html
    assert "no longer there: results/demo/model" in section(page, "convert_checkpoint")


def test_plan_that_does_not_fit_fails(results):
    made.write_receipt(results, "plan", figures={"verdict": "does not fit"})
    report = build.build(results, None)
    assert report.figures["verdict"] == "Failed: plan"
    assert "does not fit" in section(report.html, "plan")


def test_experiment_of_the_same_name_in_the_working_folder_is_not_mixed_in(results, tmp_path, monkeypatch):
    before = build.build(results, None).html
    other = tmp_path / "checkout" / "results" / "demo"
    (other / "model").mkdir(parents=True)
    (other / "serve").mkdir()
    (other / "serve" / "transcript.jsonl").write_text("{}\n")
    monkeypatch.chdir(tmp_path / "checkout")
    assert Page(section(build.build(results, None).html, "smoke_test")).text == Page(section(before, "smoke_test")).text
    (results / "model").rmdir()
    assert "no longer there: results/demo/model" in section(build.build(results, None).html, "convert_checkpoint")


def test_copied_results_folder_gives_the_same_plots(results, tmp_path):
    moved = tmp_path / "elsewhere" / "demo"
    moved.parent.mkdir()
    results.rename(moved)
    report = build.build(moved, None)
    assert report.figures["plots"] == 5
    assert report.figures["verdict"] == "Complete: every stage passed"


# ---- the program


def test_script_writes_report_and_receipt(results, tmp_path):
    done = run_script("results/demo", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    receipt = json.loads((results / "receipts/build_report.json").read_text())
    page = results / "report.html"
    assert receipt["rule"] == "build_report"
    assert receipt["result"] == {"report": "results/demo/report.html"}
    assert receipt["figures"]["bytes"] == page.stat().st_size
    assert (receipt["figures"]["stages_complete"], receipt["figures"]["plots"]) == (8, 5)


def test_script_writes_where_it_is_told(results, tmp_path):
    done = run_script(results, "--output", tmp_path / "r.html", "--receipt", tmp_path / "r.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "r.html").exists()
    assert (tmp_path / "r.json").exists()
    assert not (results / "report.html").exists()


def test_summary_tells_loss_answer_verdict_and_report(results, tmp_path):
    before = sorted(results.rglob("*"))
    done = run_script("results/demo", "--summary", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for expected in ("Complete", "11.8 → 0.0421", "What is 17 + 25?", "42", "passed · 2 of 2 checks", "not built yet"):
        assert expected in done.stdout
    assert sorted(results.rglob("*")) == before
    run_script("results/demo", cwd=tmp_path)
    assert str(results / "report.html") in run_script("results/demo", "--summary", cwd=tmp_path).stdout


def test_folder_that_is_no_experiment_is_bad_input(tmp_path):
    with pytest.raises(BadInputError, match="no results folder"):
        build.build(tmp_path / "absent", None)
    done = run_script(tmp_path, cwd=tmp_path)
    assert done.returncode == 2
    assert "receipts" in done.stderr
    assert "Traceback" not in done.stderr


def test_place_that_cannot_be_written_is_bad_input(results, tmp_path):
    (tmp_path / "taken").write_text("")
    done = run_script(results, "--output", tmp_path / "taken" / "report.html", cwd=tmp_path)
    assert done.returncode == 2
    assert "cannot be written" in done.stderr
    assert not (results / "receipts/build_report.json").exists()
