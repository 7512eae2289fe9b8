"""The stages ``evaluate`` and ``evaluate_base``: whose results, where they lie, and what is left to do.

The smoke test's job evaluates the model that it serves anyway; its results wait in the experiment's folder until
``evaluate`` judges them. Only what is not measured then is served again.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from .. import files, json_files, receipts
from ..errors import BadInputError, CrashError, GateError, StageError
from ..settings.field_types import plain
from ..settings.served_evaluation import ServedEvaluation
from . import measured, verdict
from .measured import Subject

MODEL, BASE = "evaluate", "evaluate_base"
UPSTREAM = {MODEL: "verify_model", BASE: "prepare_model"}


def subject(settings: ServedEvaluation, rule: str, receipt: Path) -> Subject:
    """Whose results a rule makes.

    Args:
        receipt: of ``UPSTREAM[rule]``.

    Raises:
        BadInputError: it is missing or of another form.
    """
    if rule == MODEL:
        receipts.read(receipt, "verify_model")
        return Subject(files.fingerprint_file(receipt), settings.served, settings.template)
    value = receipts.read(receipt, "prepare_model", {"figures": {"fingerprint": str}})
    return Subject(value["figures"]["fingerprint"], settings.served, settings.template)


def folder(results: Path, rule: str) -> Path:
    """Where a rule's results are kept; those of bases beside the experiments, which share them."""
    return results / "evaluate" / "measured" if rule == MODEL else results.parent / measured.BASES


def receipt_of(results: Path, rule: str) -> Path:
    return results / "receipts" / f"{UPSTREAM[rule]}.json"


def is_measured(settings: ServedEvaluation, results: Path, rule: str) -> bool:
    """Whether every task has its result."""
    try:
        whose = subject(settings, rule, receipt_of(results, rule))
    except BadInputError:
        return False
    return not measured.missing(folder(results, rule), whose, settings.by_name)


def without_nodes(settings: ServedEvaluation, results: Path, rules: Collection[str]) -> set[str]:
    """Which of the rules to run now need no nodes: their results are there, or the smoke test's job makes them."""
    found = {name for name in (MODEL, BASE) if name in rules and UPSTREAM[name] not in rules}
    found = {name for name in found if is_measured(settings, results, name)}
    return found | ({MODEL} if {MODEL, "smoke_test"} <= set(rules) else set())


def reason(results: Path) -> Path:
    """What the smoke test's job leaves where it could not evaluate the model."""
    return results / "evaluate" / measured.REASON


def keep_reason(results: Path, error: StageError) -> None:
    files.write_json(reason(results), {"problem": error.problem, "fix": error.fix, "exit_code": error.exit_code})


def raise_reason(results: Path) -> None:
    """Raise what kept the smoke test's job from evaluating the model, if anything did."""
    try:
        told = json_files.load(reason(results))
    except (OSError, ValueError):
        return
    kind = CrashError if told.get("exit_code") == CrashError.exit_code else BadInputError
    raise kind(
        f"the smoke test's job could not evaluate the model: {told.get('problem')}",
        f"{told.get('fix') or 'see its log'}; the same command then serves the model for this alone",
    )


def judge(settings: ServedEvaluation, results: Path, receipt: Path) -> verdict.Verdict:
    """Judge the model's results and write the receipt.

    Raises:
        GateError: a gate is not passed; the figures are left in ``failed/evaluate.json``.
    """
    tasks = settings.by_name
    tuned = verdict.results(folder(results, MODEL), subject(settings, MODEL, receipt_of(results, MODEL)), tasks)
    base, inputs = {}, {"verify_model": receipts.input_entry(receipt_of(results, MODEL))}
    if settings.compared:
        base = verdict.results(folder(results, BASE), subject(settings, BASE, receipt_of(results, BASE)), tasks)
        inputs["evaluate_base"] = receipts.input_entry(results / "receipts" / f"{BASE}.json")
    found = verdict.judge(tasks, tuned, base)
    figures = {"checks": found.checks, "tasks": found.tasks}
    if found.failed:
        receipts.write_failed(receipt, MODEL, figures)
        raise GateError(
            f"the model failed {len(found.failed)} of {len(found.checks)} gates of its evaluation:"
            + "".join(f"\n  {sentence}" for sentence in found.failed),
            f"answers are in {folder(results, MODEL)}/*.answers.jsonl; look at data and steps of training, or change "
            "the gates (evaluate.tasks)",
        )
    _write(settings, MODEL, receipt, inputs, results, figures)
    return found


def record_base(settings: ServedEvaluation, results: Path, receipt: Path) -> dict[str, Any]:
    """Write the receipt of ``evaluate_base``; returns its figures.

    Raises:
        CrashError: a task has no result.
    """
    upstream = receipt_of(results, BASE)
    found = verdict.results(folder(results, BASE), subject(settings, BASE, upstream), settings.by_name)
    if lacking := sorted(set(settings.by_name) - set(found)):
        raise CrashError(f"the base has no result of {', '.join(lacking)}", "run the same command again")
    figures = {"tasks": {name: verdict.figures_of(result) for name, result in found.items()}}
    _write(settings, BASE, receipt, {"prepare_model": receipts.input_entry(upstream)}, results, figures)
    return figures


def _write(
    settings: ServedEvaluation, rule: str, receipt: Path, inputs: dict[str, Any], results: Path, figures: dict[str, Any]
) -> None:
    kept = {key: value for key, value in plain(settings).items() if key != "python"}
    result = {"measured": str(folder(results, rule))}
    receipts.write(receipt, rule, inputs=inputs, settings=kept, result=result, figures=figures)
