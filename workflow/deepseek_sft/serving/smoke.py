"""The smoke test: run the checks against a served model, keep the transcript, decide."""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from ..cli import say
from ..errors import CrashError, GateError
from . import checks
from .api import Api, CheckFailed, parsed
from .held_out import Prompt, final_answer, matches, read_prompts, well_formed
from .settings import SmokeSettings

# Largest mean difference of log-probabilities to transformers, by the dtype of the weights.
LOGPROB_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.05, "float16": 0.05}
COMPARED_PROMPTS = 4
COMPARED_TOKENS = 64  # of each answer
REFERENCE_TIMEOUT_S = 900


@dataclasses.dataclass
class Report:
    """Verdicts and figures as the receipt has them.

    Attributes:
        checks: name → {"passed", "detail"}.
        skipped: name → why it was not run.
        figures: measured values.
    """

    checks: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    skipped: dict[str, str] = dataclasses.field(default_factory=dict)
    figures: dict[str, Any] = dataclasses.field(default_factory=dict)

    def record(self, name: str, passed: bool, detail: str) -> None:
        self.checks[name] = {"passed": passed, "detail": detail}
        say(f"  {'ok    ' if passed else 'FAILED'} {name}: {detail}")

    def skip(self, name: str, why: str) -> None:
        self.skipped[name] = why
        say(f"  skipped {name}: {why}")


def run(
    url: str,
    model: str,
    settings: SmokeSettings,
    *,
    reasoning_parser: str | None,
    model_dir: Path | None,
    transcript: Path,
    dtype: str = "auto",
    api_key: str = "",
) -> Report:
    """Run all checks; whatever they find, the transcript is at ``transcript`` afterwards.

    Args:
        url: base URL of the server.
        model: name it serves the model under.
        reasoning_parser: the server's parser; None if reasoning stays in the text.
        model_dir: folder of the served model, for the comparison with transformers; None skips that.
        dtype: dtype the server computes in; ``auto`` is that of config.json.

    Raises:
        BadInputError: the prompts cannot be read.
        GateError: at least one check failed; lists them.
        CrashError: the server went away.
    """
    held_out = read_prompts(Path(settings.prompts)) if settings.prompts else None
    transcript.parent.mkdir(parents=True, exist_ok=True)
    partial = transcript.with_name(f"{transcript.name}.part")
    api = Api(url, model, settings.request_timeout_s, api_key, partial)
    context = checks.Context(api, settings, reasoning_parser, held_out or list(checks.DEFAULT_PROMPTS))
    report = Report()
    try:
        _run_checks(context, report, held_out is not None, model_dir, dtype)
    finally:
        api.close()
        os.replace(partial, transcript)
    failed = {name: entry["detail"] for name, entry in report.checks.items() if not entry["passed"]}
    if failed:
        lines = "".join(f"\n  {name}: {detail}" for name, detail in failed.items())
        raise GateError(
            f"the served model failed {len(failed)} of {len(report.checks)} checks:{lines}",
            f"requests and answers are in {transcript}; the weights already passed verify_model, so look at training "
            "(data, steps) for wrong answers and at serve.* for everything else",
        )
    return report


def _run_checks(context: checks.Context, report: Report, held_out: bool, model_dir: Path | None, dtype: str) -> None:
    def check(name: str, function: Callable[..., str], *arguments: Any) -> None:
        context.api.check = name
        try:
            report.record(name, True, function(context, *arguments))
        except CheckFailed as failure:
            report.record(name, False, str(failure))
        except httpx.TimeoutException:
            _raise_if_gone(context.api, name)
            report.record(name, False, f"no answer within {context.settings.request_timeout_s:g} s")
        except httpx.HTTPError as error:
            _raise_if_gone(context.api, name)
            report.record(name, False, f"the connection broke: {error!r}")

    check("health", checks.health)
    check("model_name", checks.model_name)
    check("unknown_model", checks.unknown_model)
    check("chat", checks.chat)
    if context.reasoning_parser:
        check("reasoning_separate", checks.reasoning_separate)
    else:
        report.skip("reasoning_separate", "the server has no reasoning parser")
    check("no_template_tokens", checks.no_template_tokens)
    check("finish_reason", checks.finish_reason)
    check("repeatable", checks.repeatable)
    check("streaming", checks.streaming)
    check("concurrency", checks.concurrency)
    check("over_long_prompt", checks.over_long_prompt)
    too_large = _too_large(model_dir, context.settings)
    if too_large:
        report.skip("logprobs", too_large)
    else:
        check("logprobs", compare_logprobs, model_dir, dtype)
    if held_out:
        check("held_out_format", _judge_held_out, report)
    else:
        report.skip("held_out_format", "no held-out prompts are configured")
    _measure(context, report)
    check("health_after", checks.health)
    _keep_example(context, report)


def _raise_if_gone(api: Api, name: str) -> None:
    """Tell a server that refuses or is slow (a failed check) from one that is dead or hangs (a crash)."""
    try:
        api.get("/health")
    except httpx.HTTPError as error:
        raise CrashError(f"the server went away during the check {name}: {error!r}") from None


def _judge_held_out(context: checks.Context, report: Report) -> str:
    replies = checks.ask_all(context)
    parser = context.reasoning_parser
    pairs = list(zip(context.prompts, replies, strict=True))
    expected = [(prompt, reply) for prompt, reply in pairs if prompt.answer is not None]
    exact = [matches(final_answer(reply, parser), prompt.answer) for prompt, reply in expected]
    report.figures |= {
        "prompts": len(replies),
        "format_rate": round(sum(well_formed(reply, parser) for reply in replies) / len(replies), 4),
        "exact_match_rate": round(sum(exact) / len(exact), 4) if exact else None,
    }
    return checks.held_out_format(context, replies)


def _measure(context: checks.Context, report: Report) -> None:
    figures = {"time_to_first_token_s": None, "tokens_per_second": None, "tokens_per_second_concurrent": None}
    if context.streamed:
        figures["time_to_first_token_s"] = context.streamed.first_token_s
    context.api.check = "benchmark"
    if context.settings.benchmark:
        try:
            figures |= checks.benchmark(context)
        except (CheckFailed, httpx.HTTPError) as error:
            report.record("benchmark", False, f"a measured request failed: {error!r}")
    report.figures = {"prompts": 0, "format_rate": None, "exact_match_rate": None} | report.figures | figures


def _keep_example(context: checks.Context, report: Report) -> None:
    if context.example:
        prompt: Prompt = context.prompts[0]
        texts = {"reasoning": context.example.reasoning, "answer": context.example.answer}
        report.figures["example"] = {"prompt": prompt.messages[-1]["content"], **texts}


# -- comparison with transformers --------------------------------------------------------------------------------------


def count_parameters(model_dir: Path) -> int:
    """Parameters of a safetensors folder, from the files' headers alone."""
    total = 0
    for file in sorted(model_dir.glob("*.safetensors")):
        with open(file, "rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        for name, entry in header.items():
            if name != "__metadata__":
                size = 1
                for length in entry["shape"]:
                    size *= length
                total += size
    return total


def _too_large(model_dir: Path | None, settings: SmokeSettings) -> str:
    """Why the comparison is not run, empty if it is."""
    if model_dir is None:
        return "no model folder was given"
    parameters = count_parameters(model_dir)
    if parameters > settings.logprobs_max_parameters:
        limit = settings.logprobs_max_parameters
        return f"{parameters:.3g} parameters, above smoke_test.logprobs_max_parameters {limit:.3g}"
    return ""


def compare_logprobs(context: checks.Context, model_dir: Path, dtype: str) -> str:
    """The server gives tokens the probability that transformers gives them."""
    if dtype == "auto":
        config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
        dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    sequences, served = [], []
    for prompt in context.prompts[:COMPARED_PROMPTS]:
        tokens = min(COMPARED_TOKENS, context.max_tokens)
        reply = context.api.chat(prompt.messages, tokens, return_token_ids=True)
        if not reply.token_ids:
            raise CheckFailed("the server returned no token ids")
        sequence = [*reply.token_ids[0], *reply.token_ids[1]]
        # Asked as a prompt, every token gets its log-probability, those of the chat template included.
        body = {"model": context.api.model, "prompt": sequence, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
        served.append(_prompt_logprobs(parsed(context.api.post("/v1/completions", body)), sequence))
        sequences.append(sequence)
    reference = _reference(model_dir, dtype, sequences)
    differences = [
        abs(ours - theirs)
        for row, expected in zip(served, reference["logprobs"], strict=True)
        for ours, theirs in zip(row, expected, strict=True)
    ]
    mean, largest = sum(differences) / len(differences), max(differences)
    tolerance = LOGPROB_TOLERANCE.get(dtype, LOGPROB_TOLERANCE["bfloat16"])
    figures = f"mean difference {mean:.5f}, largest {largest:.5f} over {len(differences)} tokens, {dtype}"
    if not mean < tolerance:
        raise CheckFailed(f"{figures}; expected a mean below {tolerance}")
    return figures


def _prompt_logprobs(completion: dict[str, Any], sequence: list[int]) -> list[float]:
    """Log-probability of every token of ``sequence`` but the first, which has nothing before it."""
    try:
        entries = completion["choices"][0]["prompt_logprobs"][1:]
        return [entry[str(token)]["logprob"] for token, entry in zip(sequence[1:], entries, strict=True)]
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise CheckFailed(f"the server's log-probabilities do not fit the prompt ({error!r})") from None


def _reference(model_dir: Path, dtype: str, sequences: list[list[int]]) -> dict[str, Any]:
    library = str(Path(__file__).resolve().parents[2])
    environment = os.environ | {"PYTHONPATH": f"{library}:{os.environ.get('PYTHONPATH', '')}".rstrip(":")}
    with tempfile.TemporaryDirectory() as folder:
        request, answer = Path(folder, "request.json"), Path(folder, "answer.json")
        request.write_text(json.dumps({"model_dir": str(model_dir), "dtype": dtype, "sequences": sequences}))
        command = [sys.executable, "-m", f"{__package__}.reference", str(request), str(answer)]
        try:
            child = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=REFERENCE_TIMEOUT_S, check=False
            )
        except subprocess.TimeoutExpired:
            raise CheckFailed(f"transformers needed more than {REFERENCE_TIMEOUT_S} s") from None
        if child.returncode or not answer.exists():
            raise CheckFailed(f"transformers failed with exit code {child.returncode}: {child.stderr[-1500:]}")
        return json.loads(answer.read_text())
