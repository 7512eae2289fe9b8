"""The smoke test: run the checks against a served model, keep the transcript, decide."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from .. import files
from ..cli import say
from ..errors import CrashError, GateError
from ..settings.smoke_settings import SmokeSettings
from . import as_trained, benchmark, held_out_answers, held_out_losses, server_checks, transformers_comparison
from .api import Api, CheckFailed, CheckSkipped
from .base_measurement import base_answers, base_job, base_measurement
from .held_out import read_prompts
from .held_out_losses import Measurement
from .held_out_tokens import Sequence, sequences, settled
from .server_checks import Context
from .transformers_comparison import Job, ModelFolder

MOST_NEEDED = 3  # tokens of context: two of a row, and one to ask for
COMPARED_ANSWERS = 4  # of the model's own, compared with transformers besides the references


@dataclasses.dataclass(frozen=True)
class Server:
    """The server to test.

    Attributes:
        url: its base URL.
        model: name it serves the model under.
        reasoning_parser: its parser; None if reasoning stays in the text.
        tool_call_parser: its parser of tool calls; None if they stay in the text.
        dtype: dtype it computes in; ``auto`` is that of config.json.
        max_model_len: context it was started with; None if unknown.
        model_dir: folder of the served model; None skips what needs it.
        base_dir: folder of the model that training started from; None where it is not at hand.
        api_key: sent with every request, if not empty.
        trained: losses that training left with these weights; None where there are none.
    """

    url: str
    model: str
    reasoning_parser: str | None = None
    tool_call_parser: str | None = None
    dtype: str = "auto"
    max_model_len: int | None = None
    model_dir: Path | None = None
    base_dir: Path | None = None
    api_key: str = ""
    trained: as_trained.Trained | None = None


@dataclasses.dataclass
class Report:
    """Verdicts and figures as the receipt has them.

    Attributes:
        checks: name → {"passed", "detail"}.
        skipped: name → why it was not run; "not measured: …" where that is a lack.
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


class ChecksFailed(GateError):
    """At least one check failed; ``report`` has all of them."""

    def __init__(self, problem: str, fix: str, report: Report):
        super().__init__(problem, fix)
        self.report = report


def run(server: Server, settings: SmokeSettings, transcript: Path, record: Path) -> Report:
    """Run all checks; whatever they find, the transcript and the record of the held-out samples are kept.

    Args:
        transcript: JSONL of all requests and answers.
        record: JSONL of the held-out samples; see ``held_out_answers``. Not written without samples.

    Raises:
        BadInputError: the held-out samples or a measurement of the base cannot be read.
        ChecksFailed: at least one check failed; lists them.
        CrashError: the server went away.
    """
    settings = settled(settings, server.model_dir)
    held_out = read_prompts(Path(settings.prompts)) if settings.prompts else []
    measured = Measurement.read(Path(settings.base_measured)) if settings.base_measured else None
    transcript.parent.mkdir(parents=True, exist_ok=True)
    record.unlink(missing_ok=True)  # that of an earlier test says nothing about this one
    partial = transcript.with_name(f"{transcript.name}.part")
    api = Api(server.url, server.model, settings.request_timeout_s, server.api_key, partial)
    context = Context(
        api=api,
        settings=settings,
        reasoning_parser=server.reasoning_parser,
        tool_call_parser=server.tool_call_parser,
        prompts=held_out or list(server_checks.DEFAULT_PROMPTS),
        held_out=bool(held_out),
        model=ModelFolder(server.model_dir) if server.model_dir else None,
        base=server.base_dir,
        dtype=server.dtype,
        expected_len=server.max_model_len,
    )
    test = _Test(context, server, measured, record)
    try:
        test.run()
    finally:
        api.close()
        os.replace(partial, transcript)
    failed = {name: entry["detail"] for name, entry in test.report.checks.items() if not entry["passed"]}
    if failed:
        lines = "".join(f"\n  {name}: {detail}" for name, detail in failed.items())
        raise ChecksFailed(
            f"the served model failed {len(failed)} of {len(test.report.checks)} checks:{lines}",
            f"requests and answers are in {transcript}; the weights already passed verify_model, so look at training "
            "(data, steps) for wrong answers and at serve.* for everything else",
            test.report,
        )
    return test.report


class _Test:
    """One run of all checks."""

    def __init__(self, context: Context, server: Server, measured: Measurement | None, record: Path):
        self.context = context
        self.server = server
        self.measured = measured
        self.record = record
        self.report = Report()
        self.evaluation: held_out_answers.Evaluation | None = None

    def run(self) -> None:
        check, report, context = self._check, self.report, self.context
        for function in (
            *(server_checks.health, server_checks.model_name, server_checks.unknown_model),
            *(
                server_checks.chat,
                server_checks.reasoning_separate,
                server_checks.finish_reason,
                server_checks.repeatable,
                server_checks.streaming,
            ),
            *(server_checks.concurrency, server_checks.context_limit, server_checks.over_long_prompt),
        ):
            check(function.__name__, function, context)
        if context.tool_call_parser:
            check("tool_calls", server_checks.tool_calls, context)
        report.figures |= {"prompts": 0, "format_rate": None, "exact_match_rate": None}
        if context.held_out:
            check("held_out_format", self._answer_held_out)
        else:
            report.skip("held_out_format", "no held-out samples are configured")
        if self.evaluation:
            check("held_out_exact_match", held_out_answers.held_out_exact_match, context, self.evaluation)
        check("answers_are_text", server_checks.answers_are_text, context)
        check("no_template_tokens", server_checks.no_template_tokens, context)
        check("prompt_as_trained", server_checks.prompt_as_trained, context)
        try:
            self._compare()
        finally:  # the answers are kept also if measuring losses is too much for the server
            if self.evaluation:
                self.evaluation.write(self.record)
        self._as_trained()
        self._fail_gates_not_judged()
        if self.evaluation:
            report.figures["samples"] = self.evaluation.shown()
        if context.settings.benchmark:
            check("benchmark", self._benchmark)
        else:
            report.skip("benchmark", "smoke_test.benchmark is false")
        check("health_after", server_checks.health, context)
        if context.example:
            texts = {"reasoning": context.example.reasoning, "answer": context.example.answer}
            report.figures["example"] = {"prompt": context.prompt.question, **texts}

    def _fail_gates_not_judged(self) -> None:
        """A gate that somebody has set and that cannot be judged is not passed."""
        settings, done = self.context.settings, self.report.checks
        wanted = {
            "held_out_exact_match": settings.min_exact_match_rate is not None and "min_exact_match_rate",
            "held_out_loss": settings.max_loss is not None and "max_loss",
            "loss_drop": (settings.base_measured is not None and "base_measured")
            or (settings.min_loss_drop not in (None, SmokeSettings.min_loss_drop) and "min_loss_drop"),
        }
        for name, key in wanted.items():
            if key and name not in done:
                why = self.report.skipped.pop(name, "no held-out samples are configured")
                self.report.record(name, False, f"smoke_test.{key} is set (null: not wanted), but not judged: {why}")

    def _check(self, name: str, function: Callable[..., str], *arguments: Any) -> None:
        self.context.api.check = name
        try:
            self.report.record(name, True, function(*arguments))
        except CheckSkipped as reason:
            self.report.skip(name, str(reason))
        except CheckFailed as failure:
            self.report.record(name, False, str(failure))
        except httpx.TimeoutException:
            self._raise_if_gone(name)
            limit = self.context.settings.request_timeout_s
            self.report.record(name, False, f"no complete answer within {limit:g} s")
        except httpx.HTTPError as error:
            self._raise_if_gone(name)
            self.report.record(name, False, f"the connection broke: {error!r}")

    def _raise_if_gone(self, name: str) -> None:
        """Tell a server that refuses or is slow (a failed check) from one that is dead or hangs (a crash)."""
        try:
            self.context.api.get("/health")
        except httpx.HTTPError as error:
            raise CrashError(f"the server went away during the check {name}: {error!r}") from None

    def _answer_held_out(self) -> str:
        self.evaluation = held_out_answers.ask_all(self.context)
        self.report.figures |= self.evaluation.figures()
        return held_out_answers.held_out_format(self.context, self.evaluation)

    def _benchmark(self) -> str:
        settings, context = self.context.settings, self.context
        to_do = benchmark.loads(
            context.max_model_len,
            settings.benchmark_concurrency,
            settings.benchmark_input_tokens,
            settings.benchmark_output_tokens,
        )
        tokenizer = context.model.path if context.model else None
        figures = benchmark.measure(context.api, self.server.url, tokenizer, to_do, self.server.api_key)
        self.report.figures |= benchmark.headline(figures) | {"benchmark": figures}
        return benchmark.summary(figures)

    # -- log-probabilities: against transformers, and of the references before and after tuning ------------------------

    def _compare(self) -> None:
        """The checks ``logprobs``, ``held_out_loss`` and ``loss_drop``: one process of transformers serves them."""
        context, report = self.context, self.report
        samples = self._sequences()
        if isinstance(samples, str):
            report.skip("held_out_loss", samples)
            report.skip("loss_drop", samples)
            samples = []
        why_not = "no model folder was given"
        if context.model:
            why_not = context.model.too_large(context.settings.logprobs_max_parameters)
        own = [] if why_not else self._own_sequences()
        if not (why_not or own or samples):
            why_not = "the server returned no token ids (vLLM does since 0.10.2)"
        if why_not:
            report.skip("logprobs", why_not)
        if not (own or samples):
            return
        try:
            context.api.check = "logprobs"
            served = held_out_losses.served_logprobs(
                context.api, [*own, *(s.ids for s in samples)], context.settings.concurrency
            )
            if samples:
                name = f"{self.server.model} served at {self.server.url}"
                self.evaluation.tuned = held_out_losses.measurement(samples, served[len(own) :], name)
        except (CheckFailed, httpx.HTTPError) as error:
            failed = error  # `error` itself ends with this block
            self._check("held_out_loss" if why_not else "logprobs", lambda: _raise(failed))
            for name in ("logprobs", "held_out_loss", "loss_drop"):
                if name not in {**report.checks, **report.skipped}:
                    report.skip(name, "the server gave no usable log-probabilities")
            return
        if not why_not:
            self._against_transformers(own, samples, served)
        if samples:
            self._before_and_after(why_not)

    def _sequences(self) -> list[Sequence] | str:
        """The references as token sequences, or why there are none."""
        context = self.context
        if not self.evaluation:
            return "no held-out samples were answered"
        if not context.model:
            return "no model folder was given"
        if not context.settings.template:
            return "training's template is not known"
        # One token must be left to ask for.
        found = sequences(context.prompts, context.model.path, context.settings.template, context.max_model_len - 1)
        references = sum(prompt.reference is not None for prompt in context.prompts)
        if len(found) < references:
            say(
                f"warning: {references - len(found)} of {references} references do not fit the context: no loss of them"
            )
        return found or "no held-out sample has a reference that fits the context"

    def _own_sequences(self) -> list[list[int]]:
        """Prompts and the model's own answers to them, as token ids; none where the server does not tell them."""
        told = [reply.token_ids for _, reply in self.context.replies if reply.token_ids]
        unique = {(*prompt, *answer) for prompt, answer in told}
        # By their hash: the answers of concurrent requests come in any order.
        return [list(ids) for ids in sorted(unique, key=files.digest)[:COMPARED_ANSWERS]]

    def _against_transformers(self, own: list[list[int]], samples: list[Sequence], served: list[list[float]]) -> None:
        context = self.context
        base = None if self.measured else context.base
        dtype = context.model.dtype(context.dtype)
        jobs = [Job(str(context.model.path), dtype, [*own, *(s.ids for s in samples)], [], 1, [0])]
        if base and samples:
            jobs.append(base_job(context, base, dtype, samples))

        def compared() -> str:
            computed = transformers_comparison.compute(jobs)
            if len(jobs) > 1:
                self.measured = base_measurement(samples, computed[1]["logprobs"], base, dtype)
                base_answers(context, self.measured, samples, computed[1]["generated"])
            return transformers_comparison.agreement(served, computed[0]["logprobs"], dtype)

        self._check("logprobs", compared)

    def _as_trained(self) -> None:
        """The check ``weights_as_trained``: the server against the engine that trained its weights."""
        context, trained = self.context, self.server.trained
        if trained is None:
            why = (
                "training left no losses with these weights: it went on, ended under an older version, or was another's"
            )
            self.report.skip("weights_as_trained", f"{as_trained.NOT_MEASURED}: {why}")
            return

        def compared() -> str:
            if context.max_model_len < MOST_NEEDED:
                raise CheckFailed(f"not possible: the server reports a context of {context.max_model_len} tokens")
            asked = trained.cut(context.max_model_len - 1)  # one token must be left to ask for
            served = held_out_losses.served_logprobs(context.api, asked.tokens, context.settings.concurrency)
            judged = as_trained.judged_as(trained.dtype, context.model, context.dtype)
            figures, wrong = as_trained.compare(asked, served, judged, context.settings.trained_difference_factor)
            self.report.figures["weights_as_trained"] = figures
            return as_trained.verdict(figures, wrong)

        self._check("weights_as_trained", compared)

    def _before_and_after(self, why_not: str) -> None:
        self.evaluation.base = self.measured
        tuned, base = self.evaluation.tuned, self.measured
        self.report.figures["loss"] = {"base": base.loss if base else None, "tuned": tuned.loss, "tokens": tuned.tokens}
        self._check("held_out_loss", held_out_answers.held_out_loss, self.context, self.evaluation)
        if base:
            self._check("loss_drop", held_out_answers.loss_drop, self.context, self.evaluation)
        else:
            why = f"the base is not measured: {why_not or 'its folder is not known'}"
            self.report.skip("loss_drop", f"{why}; see smoke_test.base_measured")


def _raise(error: Exception) -> str:
    raise error
