"""Held-out samples: what a file may hold, how answers are judged, losses before and after, prompts as trained."""

import dataclasses
import json
import math
from pathlib import Path

import numpy
import pytest
import safetensors.numpy
from serving_fakes import LOGPROB, MODEL, FakeServer, fake_server
from unit.data.helpers import TOKENIZER

from deepseek_sft.data.encoding import load_encoder
from deepseek_sft.data.samples import Settings, make_samples
from deepseek_sft.errors import BadInputError, CrashError, GateError
from deepseek_sft.evaluation import held_out_losses, held_out_tokens, smoke_test, transformers_comparison
from deepseek_sft.evaluation.api import Reply
from deepseek_sft.evaluation.base_measurement import measure_served
from deepseek_sft.evaluation.held_out import Prompt, final_answer, matches, read_prompts
from deepseek_sft.evaluation.server_checks import Context
from deepseek_sft.settings.smoke_settings import SmokeSettings

SAMPLES = [
    {
        "id": "sum",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "What is 2 + 3?"},
            {"role": "assistant", "reasoning_content": "2 plus 3 equals 5.", "content": "The answer is 5."},
        ],
        "answer": "5",
    },
    {
        "id": "turns",
        "messages": [
            {"role": "user", "content": "Hello <｜User｜>!"},
            {"role": "assistant", "content": "<think>\nA greeting.\n</think>\n\nHello!"},
            {"role": "user", "content": "What is 2 + 4?"},
            {"role": "assistant", "content": "<think>\n4 and 2.\n</think>\n\n6"},
        ],
    },
    {"id": "bare", "messages": [{"role": "user", "content": "And 1 + 1?"}], "answer": "2"},
]
BASE_LOGPROB = 2 * LOGPROB


def write(path: Path, samples: list) -> Path:
    path.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    return path


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return write(tmp_path / "held_out.jsonl", SAMPLES)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    """One folder for all tests: the tokenizer is read once for each folder."""
    folder = tmp_path_factory.mktemp("served") / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"torch_dtype": "bfloat16", "eos_token_id": 1}))
    safetensors.numpy.save_file({"weight": numpy.zeros(1, numpy.float32)}, folder / "model.safetensors")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).symlink_to(TOKENIZER / name)
    return folder


def rendered(messages: list[dict], template: str = "deepseek-r1") -> list[int]:
    """Token ids of a prompt as training has them, made by training's own code."""
    trained = [message | ({"loss": False} if message["role"] == "assistant" else {}) for message in messages]
    trained.append({"role": "assistant", "content": "<think>\nx\n</think>\n\ny", "loss": True})
    encoder = load_encoder(TOKENIZER, template)
    (made,) = make_samples([{"id": "", "messages": trained}], encoder, Settings(template, 1 << 20))
    (sample,) = made.samples
    return sample.input_ids[: int((sample.labels != -100).argmax())].tolist()


def run(server: FakeServer, tmp_path: Path, model_dir: Path, base_dir: Path | None = None, **settings):
    server.context, server.render = 256, server.render if settings.pop("own_rendering", False) else rendered
    options = {"max_tokens": 16, "concurrency": 4, "request_timeout_s": 60, "benchmark": False}
    options |= {"template": "deepseek-r1", "prompts": str(tmp_path / "held_out.jsonl")} | settings
    where = smoke_test.Server(
        f"http://127.0.0.1:{server.server_port}",
        MODEL,
        reasoning_parser="deepseek_r1",
        model_dir=model_dir,
        base_dir=base_dir,
    )
    return smoke_test.run(where, SmokeSettings(**options), tmp_path / "transcript.jsonl", tmp_path / "evaluation.jsonl")


@pytest.fixture
def transformers(monkeypatch):
    """A stand-in for transformers: the served model as the fake server has it, and a base that finds all unlikelier."""

    def compute(jobs: list[transformers_comparison.Job]) -> list[dict]:
        answers = []
        for job in jobs:
            logprob = LOGPROB if Path(job.model_dir).name == "model" else BASE_LOGPROB
            logprobs = [[logprob] * (len(sequence) - 1) for sequence in job.sequences]
            answers.append({"logprobs": logprobs, "generated": [[5841, 128799, 1032, 1] for _ in job.prompts]})
        return answers

    monkeypatch.setattr(transformers_comparison, "compute", compute)


def measure(path: Path, logprob: float, template: str = "deepseek-r1") -> held_out_losses.Measurement:
    """A measurement of the base as measure_held_out.py leaves it."""
    sequences = held_out_tokens.sequences(read_prompts(path), TOKENIZER, template, 255)
    rows = [[logprob] * (len(sequence.ids) - 1) for sequence in sequences]
    return held_out_losses.measurement(sequences, rows, "the base, served")


# -- the report shows whether tuning did anything ---------------------------------------------------------------------


def test_loss_before_and_after_is_measured_on_the_references(tmp_path, prompts, model_dir, transformers):
    with fake_server() as server:
        report = run(server, tmp_path, model_dir, base_dir=tmp_path / "base")
    assert report.figures["loss"]["base"] == pytest.approx(-BASE_LOGPROB)
    assert report.figures["loss"]["tuned"] == pytest.approx(-LOGPROB)
    assert report.checks["loss_drop"]["detail"].startswith("3.0000 → 1.5000, lower for 2 of 2 samples")
    assert report.checks["logprobs"]["passed"]


def test_model_that_tuning_left_as_it_was_fails(tmp_path, prompts, model_dir):
    measure(prompts, LOGPROB).write(tmp_path / "base.json")
    with fake_server() as server, pytest.raises(GateError, match=r"loss_drop: 1.5000 → 1.5000.*drop of more than 0"):
        run(server, tmp_path, model_dir, base_measured=str(tmp_path / "base.json"), logprobs_max_parameters=0)


def test_large_model_takes_the_bases_loss_from_a_measurement(tmp_path, prompts, model_dir):
    measure(prompts, BASE_LOGPROB).write(tmp_path / "base.json")
    with fake_server() as server:
        report = run(server, tmp_path, model_dir, base_measured=str(tmp_path / "base.json"), logprobs_max_parameters=0)
    assert report.checks["loss_drop"]["passed"]
    assert report.figures["loss"]["base"] == pytest.approx(-BASE_LOGPROB)


def test_measurement_of_other_samples_is_not_compared(tmp_path, prompts, model_dir):
    measure(prompts, BASE_LOGPROB, "deepseek-v3.1").write(tmp_path / "base.json")
    with fake_server() as server, pytest.raises(GateError, match="measured on other token sequences"):
        run(server, tmp_path, model_dir, base_measured=str(tmp_path / "base.json"), logprobs_max_parameters=0)


def test_large_model_without_measurement_says_what_is_missing(tmp_path, prompts, model_dir):
    with fake_server() as server:
        report = run(server, tmp_path, model_dir, logprobs_max_parameters=0)
    assert "smoke_test.base_measured" in report.skipped["loss_drop"]
    assert report.figures["loss"] == {"base": None, "tuned": -LOGPROB, "tokens": report.figures["loss"]["tokens"]}


def test_loss_above_its_bound_fails(tmp_path, prompts, model_dir):
    with fake_server() as server, pytest.raises(GateError, match=r"held_out_loss: 1.5000.*expected at most 1.4"):
        run(server, tmp_path, model_dir, max_loss=1.4, logprobs_max_parameters=0)


def test_loss_that_is_no_number_fails_the_check_and_not_the_program(tmp_path, prompts, model_dir):
    with (
        fake_server("nan_logprobs") as server,
        pytest.raises(GateError, match=r"held_out_loss: .*not finite"),
    ):
        run(server, tmp_path, model_dir, logprobs_max_parameters=0)


def test_loss_is_the_mean_over_the_tokens_that_training_learns(prompts):
    sequences = held_out_tokens.sequences(read_prompts(prompts), TOKENIZER, "deepseek-r1", 255)
    assert [one.id for one in sequences] == ["sum", "turns"]
    # Every trained token gets a probability of its own; the others would spoil the mean.
    rows = [[-float(i) if one.trained[i] else math.nan for i in range(1, len(one.ids))] for one in sequences]
    found = held_out_losses.measurement(sequences, rows, "")
    trained = [i for one in sequences for i, learned in enumerate(one.trained) if learned]
    assert found.loss == pytest.approx(sum(trained) / len(trained), abs=1e-5)
    assert found.tokens == len(trained)


def test_measurement_survives_its_file(tmp_path, prompts):
    measured = measure(prompts, -1.25)
    measured.write(tmp_path / "base.json")
    assert held_out_losses.Measurement.read(tmp_path / "base.json") == measured


@pytest.mark.parametrize("text", ["", "{}", '{"schema": 2}', "[]", '{"schema": 1, "loss": NaN, "samples": []}'])
def test_broken_measurement_is_bad_input(tmp_path, text):
    path = tmp_path / "base.json"
    path.write_text(text)
    with pytest.raises(BadInputError, match=r"measure_held_out\.py"):
        held_out_losses.Measurement.read(path)


def test_sample_that_does_not_fit_the_context_is_left_out_of_the_loss(prompts):
    sequences = held_out_tokens.sequences(read_prompts(prompts), TOKENIZER, "deepseek-r1", 10_000)
    shortest = min(len(one.ids) for one in sequences)
    assert len(held_out_tokens.sequences(read_prompts(prompts), TOKENIZER, "deepseek-r1", shortest)) == 1


# -- prompts as trained ------------------------------------------------------------------------------------------------


def test_prompts_rendered_as_in_training_pass(tmp_path, prompts, model_dir):
    with fake_server() as server:
        report = run(server, tmp_path, model_dir, logprobs_max_parameters=0)
    assert report.checks["prompt_as_trained"]["detail"].startswith("3 prompts equal deepseek-r1")


def test_template_that_opens_the_reasoning_itself_passes(tmp_path, prompts, model_dir):
    with fake_server() as server:
        server.render = lambda messages: [*rendered(messages), 128798, 201]  # `<think>` and a line end
        assert run(server, tmp_path, model_dir, own_rendering=True, logprobs_max_parameters=0)


@pytest.mark.parametrize(
    "change",
    [
        lambda ids: [ids[0], *ids],  # begin-of-sentence twice
        lambda ids: ids[1:],  # or not at all
        lambda ids: ids[:-1],  # no assistant token: the model would go on writing the question
        lambda ids: [*ids, 128798, 201, 201],
    ],
)
def test_prompt_that_differs_from_training_fails_with_its_place(tmp_path, prompts, model_dir, change):
    with fake_server() as server:
        server.render = lambda messages: change(rendered(messages))
        with pytest.raises(GateError, match=r"prompt_as_trained: the prompt sum differs from template deepseek-r1"):
            run(server, tmp_path, model_dir, own_rendering=True, logprobs_max_parameters=0)


# -- answers and gates -------------------------------------------------------------------------------------------------


def test_record_holds_every_sample_with_reference_answer_and_base(tmp_path, prompts, model_dir, transformers):
    with fake_server() as server:
        report = run(server, tmp_path, model_dir, base_dir=tmp_path / "base")
    records = [json.loads(line) for line in (tmp_path / "evaluation.jsonl").read_text().splitlines()]
    assert [record["id"] for record in records] == ["sum", "turns", "bare"]
    first, second, bare = records
    assert first["matches"] is True
    assert first["reference"] == {"reasoning": "2 plus 3 equals 5.", "answer": "The answer is 5."}
    assert first["loss"] == pytest.approx(1.5)
    assert first["base"]["loss"] == pytest.approx(3.0)
    assert first["base"]["answer"]
    assert second["expected"] == "6"
    assert (bare["reference"], bare["loss"], bare["base"]) == (None, None, None)
    assert report.figures["samples"] == records


def test_record_is_kept_when_a_check_fails(tmp_path, prompts, model_dir):
    with fake_server("finish_reason") as server, pytest.raises(GateError, match="held_out_format"):
        run(server, tmp_path, model_dir, logprobs_max_parameters=0)
    assert len((tmp_path / "evaluation.jsonl").read_text().splitlines()) == 3


def test_exact_match_below_its_bound_fails_and_names_the_samples(tmp_path, prompts, model_dir):
    with fake_server() as server, pytest.raises(GateError, match=r"1 of 3 as expected = 0.333.*not: turns, bare"):
        run(server, tmp_path, model_dir, min_exact_match_rate=0.5, logprobs_max_parameters=0)


def test_refused_held_out_request_counts_as_badly_formed_and_is_named(tmp_path, model_dir):
    long = {"id": "long", "messages": [{"role": "user", "content": "word " * 300}]}
    write(tmp_path / "held_out.jsonl", [*SAMPLES, long])
    with fake_server() as server, pytest.raises(GateError, match=r"3 of 4 well formed.*first long: status 400"):
        run(server, tmp_path, model_dir, logprobs_max_parameters=0)


def test_record_is_kept_when_the_server_dies_while_losses_are_measured(tmp_path, prompts, model_dir, monkeypatch):
    def dies(*_):
        raise CrashError("the server went away")

    monkeypatch.setattr(held_out_losses, "served_logprobs", dies)
    with fake_server() as server, pytest.raises(CrashError):
        run(server, tmp_path, model_dir, logprobs_max_parameters=0)
    assert len((tmp_path / "evaluation.jsonl").read_text().splitlines()) == 3


def test_prompt_with_half_a_character_is_refused_with_its_line(tmp_path):
    (tmp_path / "held_out.jsonl").write_text('{"messages": [{"role": "user", "content": "a \\ud83d b"}]}')
    with pytest.raises(BadInputError, match=r"line 1: a text holds half a character"):
        read_prompts(tmp_path / "held_out.jsonl")


def test_gate_that_cannot_be_judged_fails(tmp_path, model_dir):
    write(tmp_path / "held_out.jsonl", [{"id": "bare", "messages": [{"role": "user", "content": "What is 2 + 3?"}]}])
    with fake_server() as server, pytest.raises(GateError) as raised:
        run(server, tmp_path, model_dir, max_loss=1, min_exact_match_rate=0.1, logprobs_max_parameters=0)
    for key in ("max_loss", "min_exact_match_rate"):
        assert f"smoke_test.{key} is set (null: not wanted), but not judged" in raised.value.problem
    assert "base_measured" not in raised.value.problem


def test_drop_that_was_asked_for_and_cannot_be_judged_fails(tmp_path, prompts, model_dir):
    with fake_server() as server, pytest.raises(smoke_test.ChecksFailed) as raised:
        run(server, tmp_path, model_dir, min_loss_drop=2, logprobs_max_parameters=0)
    assert "smoke_test.min_loss_drop is set (null: not wanted), but not judged" in raised.value.problem
    assert not raised.value.report.checks["loss_drop"]["passed"]


def test_format_gate_that_is_off_only_reports(tmp_path, prompts, model_dir):
    with fake_server("finish_reason") as server, pytest.raises(GateError) as raised:
        run(server, tmp_path, model_dir, min_format_rate=None, logprobs_max_parameters=0)
    assert "held_out_format" not in raised.value.problem


def test_base_that_leaves_questions_unanswered_is_no_measurement(tmp_path, model_dir):
    write(
        tmp_path / "held_out.jsonl",
        [*SAMPLES, {"id": "long", "messages": [{"role": "user", "content": "word " * 300}]}],
    )
    with fake_server() as server:
        server.context, server.render = 256, rendered
        settings = SmokeSettings(prompts=str(tmp_path / "held_out.jsonl"), template="deepseek-r1", max_tokens=16)
        url = f"http://127.0.0.1:{server.server_port}"
        with pytest.raises(BadInputError, match="1 requests got no answer, first long: status 400"):
            measure_served(url, MODEL, TOKENIZER, settings, reasoning_parser="deepseek_r1")


@pytest.mark.parametrize(("reference", "thinks"), [("<think>\nx\n</think>\n\ny", True), ("y", False), (None, True)])
def test_thinking_of_version_3_1_is_asked_for_as_it_was_trained(reference, thinks):
    settings = SmokeSettings(template="deepseek-v3.1")
    context = Context(api=None, settings=settings, reasoning_parser="deepseek_v3", prompts=[])
    prompt = Prompt("a", [{"role": "user", "content": "?"}], None, reference)
    assert context.options(prompt) == {"chat_template_kwargs": {"thinking": thinks}}
    assert dataclasses.replace(context, settings=SmokeSettings(template="deepseek-r1")).options(prompt) == {}


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>\nfirst 7?\n</think>\n\n5", "5"),
        ("first 7? no</think>\n\n5", "5"),  # the prompt opened the reasoning
        ("<think>\nfirst 7?", ""),
        ("5", "5"),
    ],
)
def test_reasoning_in_the_text_is_no_answer(text, answer):
    assert final_answer(Reply(answer=text), None).strip() == answer


# -- reading and judging -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "expected", "same"),
    [
        ("5", "5", True),
        ("The answer is 5.", "5", True),
        ("The answer is 15.", "5", False),
        ("It is 5.5", "5", False),
        ("It is 1,5", "5", False),
        ("BLUE.", "blue", True),
        ("Plants absorb carbon\n dioxide.", "Carbon dioxide", True),
        (r"So 6 apples, \boxed{5}", "5", True),
        (r"First 5, then \boxed{6}", "5", False),
        (r"\boxed{\frac{1}{2}}", r"thus $\boxed{\frac{1}{2}}$", True),
        ("Five", "<think>\n2+3\n</think>\n\nfive", True),
        ("anything", "", False),
        ("", "5", False),
    ],
)
def test_answer_matching(answer, expected, same):
    assert matches(answer, expected) is same


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "line 1: not JSON"),
        ('{"answer": "5"}', "line 1: expected"),
        ('{"messages": [{"role": "user"}]}', "line 1: empty_content: message 1"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', "line 1: role_order: message 1"),
        (
            '{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "</think>"}]}',
            "think_tags",
        ),
        ("", "no prompt in it"),
    ],
)
def test_bad_held_out_file_is_named_with_its_line(tmp_path, line, problem):
    path = tmp_path / "held_out.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(BadInputError, match=problem):
        read_prompts(path)
