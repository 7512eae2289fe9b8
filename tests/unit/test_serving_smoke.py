"""The smoke test's checks against a server that misbehaves in one way at a time."""

import json
from pathlib import Path

import numpy
import pytest
import safetensors.numpy
from serving_fakes import LOGPROB, MODEL, fake_server

from deepseek_sft.errors import BadInputError, CrashError, GateError
from deepseek_sft.serving import smoke
from deepseek_sft.serving.held_out import matches, read_prompts
from deepseek_sft.serving.settings import SmokeSettings

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
    options = {"max_tokens": 16, "concurrency": 4, "request_timeout_s": 1} | settings
    return smoke.run(
        f"http://127.0.0.1:{server.server_port}",
        MODEL,
        SmokeSettings(**options),
        reasoning_parser=parser,
        model_dir=model_dir,
        transcript=tmp_path / "transcript.jsonl",
    )


def failed_checks(error: GateError) -> set[str]:
    return {line.split(":")[0].strip() for line in error.problem.splitlines()[1:]}


def test_healthy_server_passes_every_check(tmp_path, prompts):
    with fake_server() as server:
        report = run(server, tmp_path, prompts=str(prompts))
    assert all(entry["passed"] for entry in report.checks.values())
    assert set(report.skipped) == {"logprobs"}
    figures = report.figures
    assert (figures["prompts"], figures["format_rate"], figures["exact_match_rate"]) == (2, 1.0, 0.5)
    assert figures["tokens_per_second"] > 0
    assert figures["example"]["prompt"] == "What is 2 + 3?"


@pytest.mark.parametrize(
    ("flaw", "checks"),
    [
        ("health", {"health", "health_after"}),
        ("model_name", {"model_name", "over_long_prompt"}),
        ("unknown_model", {"unknown_model"}),
        ("chat", {"chat", "reasoning_separate", "finish_reason"}),
        ("reasoning_separate", {"reasoning_separate"}),
        ("no_template_tokens", {"no_template_tokens"}),
        ("finish_reason", {"finish_reason"}),
        ("repeatable", {"repeatable"}),
        ("streaming", {"streaming"}),
        ("stream_end", {"streaming"}),
        ("concurrency", {"concurrency"}),
        ("over_long_prompt", {"over_long_prompt"}),
        ("health_after", {"health_after"}),
    ],
)
def test_each_misbehaviour_fails_its_check_by_name(tmp_path, flaw, checks):
    with fake_server(flaw) as server, pytest.raises(GateError) as raised:
        run(server, tmp_path, benchmark=False)
    assert failed_checks(raised.value) == checks


def test_slow_server_fails_with_the_deadline_named(tmp_path):
    with fake_server("silent") as server, pytest.raises(GateError, match=r"no answer within 0\.5 s"):
        run(server, tmp_path, benchmark=False, request_timeout_s=0.5, concurrency=1)


def test_older_name_of_the_reasoning_field_is_understood(tmp_path):
    with fake_server(reasoning_field="reasoning_content") as server:
        report = run(server, tmp_path)
    assert report.checks["reasoning_separate"]["passed"]


def test_temperature_zero_is_sent_with_every_request(tmp_path):
    with fake_server() as server:
        run(server, tmp_path)
    assert {request["temperature"] for request in server.requests} == {0}


def test_format_rate_below_the_bound_fails_and_names_the_prompts(tmp_path):
    path = tmp_path / "held_out.jsonl"
    endless = {"id": "e7", "messages": [{"role": "user", "content": "endless"}], "answer": "5"}
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


def test_absent_server_is_a_crash_not_a_failed_gate(tmp_path):
    with fake_server() as server:
        pass
    with pytest.raises(CrashError, match="went away"):
        run(server, tmp_path)


@pytest.mark.parametrize(("shift", "passes"), [(0.0, True), (0.04, True), (0.06, False), (float("nan"), False)])
def test_logprobs_must_agree_with_the_reference(tmp_path, model_dir, monkeypatch, shift, passes):
    def reference(folder: Path, dtype: str, sequences: list[list[int]]) -> dict:
        assert (folder, dtype) == (model_dir, "bfloat16")
        return {"logprobs": [[LOGPROB + shift] * (len(sequence) - 1) for sequence in sequences]}

    monkeypatch.setattr(smoke, "_reference", reference)
    with fake_server() as server:
        if passes:
            report = run(server, tmp_path, model_dir=model_dir, benchmark=False)
            assert "over 10 tokens" in report.checks["logprobs"]["detail"]
        else:
            with pytest.raises(GateError) as raised:
                run(server, tmp_path, model_dir=model_dir, benchmark=False)
            assert failed_checks(raised.value) == {"logprobs"}


def test_incomplete_logprobs_fail_the_check_and_not_the_program(tmp_path, model_dir):
    with fake_server("short_logprobs") as server, pytest.raises(GateError, match="do not fit the prompt"):
        run(server, tmp_path, model_dir=model_dir, benchmark=False)


def test_large_model_is_not_compared_and_the_receipt_says_so(tmp_path, model_dir):
    with fake_server() as server:
        report = run(server, tmp_path, model_dir=model_dir, benchmark=False, logprobs_max_parameters=11)
    assert "12 parameters" in report.skipped["logprobs"]
    assert "logprobs" not in report.checks


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
        ('{"messages": [{"role": "user"}]}', "line 1: a message is not"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', "expected user"),
        ("", "no prompt in it"),
    ],
)
def test_bad_held_out_file_is_named_with_its_line(tmp_path, line, problem):
    path = tmp_path / "held_out.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(BadInputError, match=problem):
        read_prompts(path)
