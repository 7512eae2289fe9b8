"""The smoke test's checks against a server that misbehaves in one way at a time."""

import functools
import json
import threading
from pathlib import Path

import numpy
import pytest
import safetensors.numpy
from serving_fakes import LOGPROB, MODEL, fake_server

from deepseek_sft.errors import CrashError, GateError
from deepseek_sft.evaluation import server_checks, smoke_test, transformers_comparison
from deepseek_sft.settings.smoke_settings import SmokeSettings

PROMPTS = [
    {"id": "a", "messages": [{"role": "user", "content": "What is 2 + 3?"}], "answer": "5"},
    {"id": "b", "messages": [{"role": "user", "content": "And 2 + 4?"}], "answer": "6"},
]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "held_out.jsonl"
    path.write_text("".join(json.dumps(prompt) + "\n" for prompt in PROMPTS))
    return path


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"torch_dtype": "bfloat16"}))
    safetensors.numpy.save_file({"weight": numpy.zeros((3, 4), numpy.float32)}, folder / "model.safetensors")
    return folder


def run(server, tmp_path: Path, parser: str | None = "deepseek_r1", model_dir: Path | None = None, **settings):
    options = {"max_tokens": 16, "concurrency": 4, "request_timeout_s": 20} | settings
    return smoke_test.run(
        smoke_test.Server(
            f"http://127.0.0.1:{server.server_port}", MODEL, reasoning_parser=parser, model_dir=model_dir
        ),
        SmokeSettings(**options),
        tmp_path / "transcript.jsonl",
        tmp_path / "evaluation.jsonl",
    )


def failed_checks(error: GateError) -> set[str]:
    return {line.split(":")[0].strip() for line in error.problem.splitlines()[1:]}


def test_healthy_server_passes_every_check(tmp_path, prompts):
    with fake_server() as server:
        report = run(server, tmp_path, prompts=str(prompts), benchmark_concurrency=(1, 4))
    assert all(entry["passed"] for entry in report.checks.values())
    assert set(report.skipped) == {
        *("logprobs", "held_out_loss", "loss_drop", "prompt_as_trained", "weights_as_trained")
    }
    figures = report.figures
    assert (figures["prompts"], figures["format_rate"], figures["exact_match_rate"]) == (2, 1.0, 0.5)
    assert figures["tokens_per_second"] > 0
    assert figures["example"]["prompt"] in [prompt["messages"][0]["content"] for prompt in PROMPTS]


@pytest.mark.parametrize(
    ("flaw", "checks"),
    [
        ("health", {"health", "health_after"}),
        ("model_name", {"model_name", "over_long_prompt", "context_limit"}),
        ("unknown_model", {"unknown_model"}),
        ("chat", {"chat", "reasoning_separate", "finish_reason"}),
        ("mumbles", {"answers_are_text"}),
        ("stream_without_end", {"streaming"}),
        ("stream_other_end", {"streaming"}),
        ("stream_error", {"streaming"}),
        ("stream_begins_like_it", {"streaming"}),
        ("reasoning_separate", {"reasoning_separate"}),
        ("no_template_tokens", {"no_template_tokens"}),
        ("finish_reason", {"finish_reason"}),
        ("repeatable", {"repeatable"}),
        ("streaming", {"streaming"}),
        ("stream_end", {"streaming"}),
        ("stream_order", {"streaming"}),
        ("concurrency", {"concurrency"}),
        ("empty_when_busy", {"concurrency"}),
        ("context_limit", {"context_limit"}),
        ("context_cut", {"context_limit"}),
        ("one_more", {"context_limit"}),
        ("refused_by_500", {"context_limit"}),
        ("over_long_prompt", {"over_long_prompt"}),
        ("health_after", {"health_after"}),
    ],
)
def test_each_misbehaviour_fails_its_check_by_name(tmp_path, flaw, checks):
    with fake_server(flaw) as server, pytest.raises(GateError) as raised:
        run(server, tmp_path, benchmark=False)
    assert failed_checks(raised.value) == checks


def endless_first(path: Path, endless: int) -> None:
    """Ten prompts; answers to the first ``endless`` of those that single requests are made with never end."""
    found = [server_checks.Prompt(f"p{n}", [{"role": "user", "content": f"Count {n}"}], "5", None) for n in range(200)]
    for one in found[::2]:
        one.messages[0]["content"] += ", endless"
    first = sorted(found, key=lambda one: server_checks.order(one))
    broken, sound = (
        [one for one in first if ("endless" in one.messages[0]["content"]) is flag] for flag in (True, False)
    )
    chosen = (
        broken[:endless]
        + [one for one in sound if server_checks.order(one) > server_checks.order(broken[endless - 1])][:8]
    )
    path.write_text(
        "".join(json.dumps({"id": o.id, "messages": o.messages, "answer": o.answer}) + "\n" for o in chosen)
    )


def test_an_answer_without_end_is_judged_by_the_rate_that_is_allowed(tmp_path):
    prompts = tmp_path / "held_out.jsonl"
    endless_first(prompts, 1)
    with fake_server() as server:
        report = run(server, tmp_path, prompts=str(prompts), min_format_rate=0.8, benchmark=False)
        assert "reached the limit" in report.checks["chat"]["detail"]
        assert all(entry["passed"] for entry in report.checks.values())
        with pytest.raises(GateError) as raised:
            run(server, tmp_path, prompts=str(prompts), min_format_rate=1.0, benchmark=False)
        assert {"chat", "held_out_format"} <= failed_checks(raised.value)
        endless_first(prompts, 3)
        with pytest.raises(GateError) as raised:
            run(server, tmp_path, prompts=str(prompts), min_format_rate=0.5, benchmark=False)
    assert {"chat", "finish_reason"} <= failed_checks(raised.value)


PLAIN = {"id": "plain", "messages": [{"role": "user", "content": "2 + 3?"}, {"role": "assistant", "content": "5"}]}
THINKING = {
    "id": "thinking",
    "messages": [
        {"role": "user", "content": "Say five"},
        {"role": "assistant", "content": "<think>\nSay it.\n</think>\n\nThe answer is 5"},
    ],
}


@pytest.mark.parametrize("samples", [[PLAIN, THINKING], [THINKING, PLAIN]])
def test_reasoning_is_judged_on_a_prompt_that_asks_for_it_whatever_the_order(tmp_path, samples):
    path = tmp_path / "held_out.jsonl"
    path.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    settings = {"prompts": str(path), "template": "deepseek-v3.1", "benchmark": False}
    with fake_server("thinks_when_asked") as server:
        report = run(server, tmp_path, **settings)
    assert report.checks["reasoning_separate"]["passed"]
    with fake_server("thinks_when_asked", "reasoning_separate") as server, pytest.raises(GateError) as raised:
        run(server, tmp_path, **settings)
    assert failed_checks(raised.value) == {"reasoning_separate"}


def test_reasoning_is_not_judged_where_no_prompt_asks_for_it(tmp_path):
    path = tmp_path / "held_out.jsonl"
    path.write_text(json.dumps(PLAIN))
    with fake_server("thinks_when_asked") as server:
        report = run(server, tmp_path, prompts=str(path), template="deepseek-v3.1", benchmark=False)
    assert report.skipped["reasoning_separate"] == "no prompt asks for reasoning"


def test_verdict_does_not_depend_on_the_order_of_the_samples(tmp_path):
    path = tmp_path / "held_out.jsonl"
    endless = {"id": "e7", "messages": [{"role": "user", "content": "an endless answer"}], "answer": "5"}
    verdicts = []
    for samples in ([*PROMPTS, endless], [endless, *PROMPTS]):
        path.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
        with fake_server() as server, pytest.raises(GateError) as raised:
            run(server, tmp_path, prompts=str(path), min_format_rate=0.9, benchmark=False, concurrency=2)
        verdicts.append(failed_checks(raised.value))
    assert verdicts[0] == verdicts[1]


def test_slow_server_fails_with_the_deadline_named(tmp_path):
    with fake_server("silent") as server, pytest.raises(GateError, match=r"no complete answer within 0\.5 s"):
        run(server, tmp_path, benchmark=False, request_timeout_s=0.5, concurrency=1)


def test_server_that_hangs_under_load_fails_that_check_within_its_deadline(tmp_path):
    with fake_server("hangs_when_busy") as server, pytest.raises(GateError) as raised:
        server.seconds = 0.3  # so that requests overlap
        run(server, tmp_path, benchmark=False, concurrency=8, request_timeout_s=2)
    assert failed_checks(raised.value) == {"concurrency"}
    assert "no complete answer within 2 s" in raised.value.problem


def test_answer_that_never_ends_meets_the_deadline_of_the_whole_request(tmp_path):
    with fake_server("drips") as server, pytest.raises(GateError, match=r"chat: no complete answer within 0\.5 s"):
        run(server, tmp_path, benchmark=False, request_timeout_s=0.5, concurrency=1)


def test_context_other_than_configured_fails(tmp_path):
    with fake_server() as server, pytest.raises(GateError, match="context 64 tokens, configured are 128"):
        url = f"http://127.0.0.1:{server.server_port}"
        smoke_test.run(
            smoke_test.Server(url, MODEL, reasoning_parser="deepseek_r1", max_model_len=128),
            SmokeSettings(max_tokens=16, benchmark=False),
            tmp_path / "transcript.jsonl",
            tmp_path / "evaluation.jsonl",
        )


def test_answer_must_end_with_the_models_end_of_sentence(tmp_path, model_dir):
    (model_dir / "generation_config.json").write_text(json.dumps({"eos_token_id": 1}))
    options = {"model_dir": model_dir, "benchmark": False, "logprobs_max_parameters": 0}
    with fake_server() as server:
        report = run(server, tmp_path, **options)
    assert report.checks["finish_reason"]["detail"] == "stop at end-of-sentence token 1"
    with fake_server("wrong_end") as server, pytest.raises(GateError, match="stopped at token 9"):
        run(server, tmp_path, **options)


def test_leak_in_any_answer_is_found_and_its_prompt_named(tmp_path, prompts):
    with fake_server("late_leak") as server, pytest.raises(GateError, match=r"<think> \(first in the answer to b\)"):
        run(server, tmp_path, prompts=str(prompts), benchmark=False, min_format_rate=0.5)


def test_older_name_of_the_reasoning_field_is_understood(tmp_path):
    with fake_server(reasoning_field="reasoning_content") as server:
        report = run(server, tmp_path)
    assert report.checks["reasoning_separate"]["passed"]


def test_temperature_zero_is_sent_with_every_request(tmp_path):
    with fake_server() as server:
        run(server, tmp_path)
    assert {request["temperature"] for request in server.requests} == {0}


def test_concurrency_is_reached(tmp_path, monkeypatch):
    check = server_checks.concurrency

    @functools.wraps(check)
    def meeting(context):
        server.meeting = threading.Barrier(32, timeout=60)
        try:
            return check(context)
        finally:
            server.meeting = None

    monkeypatch.setattr(server_checks, "concurrency", meeting)
    with fake_server() as server:
        report = run(server, tmp_path, benchmark=False, concurrency=32, request_timeout_s=60)
    assert report.checks["concurrency"]["passed"]
    assert server.most_running == 32


def test_format_rate_below_the_bound_fails_and_names_the_prompts(tmp_path):
    path = tmp_path / "held_out.jsonl"
    endless = {"id": "e7", "messages": [{"role": "user", "content": "an endless answer"}], "answer": "5"}
    path.write_text("".join(json.dumps(prompt) + "\n" for prompt in [*PROMPTS, endless]))
    with fake_server() as server, pytest.raises(GateError, match=r"2 of 3 well formed.*not: e7"):
        run(server, tmp_path, prompts=str(path), min_format_rate=0.9, benchmark=False)
    with fake_server() as server:
        report = run(server, tmp_path, prompts=str(path), min_format_rate=0.6, benchmark=False)
    assert report.figures["format_rate"] == pytest.approx(2 / 3, abs=1e-4)


def test_transcript_is_kept_when_checks_fail(tmp_path):
    with fake_server("chat") as server, pytest.raises(GateError, match=r"transcript\.jsonl"):
        run(server, tmp_path, benchmark=False)
    lines = [json.loads(line) for line in (tmp_path / "transcript.jsonl").read_text().splitlines()]
    assert {"health", "chat", "streaming", "over_long_prompt"} <= {line["check"] for line in lines}
    assert not list(tmp_path.glob("*.part"))


def test_request_that_got_no_answer_is_in_the_transcript(tmp_path):
    with fake_server("silent") as server, pytest.raises(GateError):
        run(server, tmp_path, benchmark=False, request_timeout_s=0.3, concurrency=1)
    lines = [json.loads(line) for line in (tmp_path / "transcript.jsonl").read_text().splitlines()]
    unanswered = [line for line in lines if line["check"] == "chat" and line["request"]]
    assert [line["status"] for line in unanswered] == [None]
    assert "Timeout" in unanswered[0]["problem"]


def test_absent_server_is_a_crash_not_a_failed_gate(tmp_path):
    with fake_server() as server:
        pass
    with pytest.raises(CrashError, match="went away"):
        run(server, tmp_path)


@pytest.mark.parametrize(("shift", "passes"), [(0.0, True), (0.04, True), (0.06, False), (float("nan"), False)])
def test_logprobs_must_agree_with_the_reference(tmp_path, model_dir, monkeypatch, shift, passes):
    def compute(jobs: list[transformers_comparison.Job]) -> list[dict]:
        (job,) = jobs
        assert (job.model_dir, job.dtype) == (str(model_dir), "bfloat16")
        return [{"logprobs": [[LOGPROB + shift] * (len(sequence) - 1) for sequence in job.sequences]}]

    monkeypatch.setattr(transformers_comparison, "compute", compute)
    with fake_server() as server:
        if passes:
            report = run(server, tmp_path, model_dir=model_dir, benchmark=False)
            assert "over 5 tokens" in report.checks["logprobs"]["detail"]
        else:
            with pytest.raises(GateError) as raised:
                run(server, tmp_path, model_dir=model_dir, benchmark=False)
            assert failed_checks(raised.value) == {"logprobs"}


def test_incomplete_logprobs_fail_the_check_and_not_the_program(tmp_path, model_dir):
    with fake_server("short_logprobs") as server, pytest.raises(GateError, match="do not fit the prompt"):
        run(server, tmp_path, model_dir=model_dir, benchmark=False)


def test_server_of_an_older_version_that_tells_no_token_ids_passes_and_the_receipt_says_what_was_skipped(
    tmp_path, model_dir
):
    with fake_server("no_token_ids") as server:
        report = run(server, tmp_path, model_dir=model_dir, benchmark=False)
    assert "no token ids" in report.skipped["logprobs"]


def test_large_model_is_not_compared_and_the_receipt_says_so(tmp_path, model_dir):
    with fake_server() as server:
        report = run(server, tmp_path, model_dir=model_dir, benchmark=False, logprobs_max_parameters=11)
    assert "12 parameters" in report.skipped["logprobs"]
    assert "logprobs" not in report.checks
