"""Whether the chain of stages holds: no receipt missing, no result gone, below others that stand on it.

Snakemake asks for the last receipt alone: where that one exists it makes no missing one again, and it knows nothing of
models and checkpoints, which are no declared outputs. So what has gone is found here, from the files alone, and its
stage is forced. Training is never started again by that: it is named, with the command.
"""

import dataclasses
from collections.abc import Collection
from pathlib import Path
from typing import Any

from . import engines, json_files, receipts, stages
from .errors import BadInputError, StageError

# A file without which the folder that is a stage's result is none any more.
INSIDE = {"model": "config.json", "base": "config.json", "tokens": "tokens.json", "checkpoint": engines.MARKER}
AGAIN = "snakemake --profile <profile> [--configfile <yours>] --forcerun"


@dataclasses.dataclass(frozen=True)
class State:
    """One stage's receipt as found.

    Attributes:
        receipt: its content; None where it is missing or cannot be read.
        exists: whether there is a file at all.
        gone: results that it names and that are not there any more, name → path.
    """

    rule: str
    receipt: dict[str, Any] | None
    exists: bool
    gone: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What follows from the state of the chain.

    Attributes:
        forced: rules to run again though Snakemake sees no reason, with the reason.
        notes: what has gone and is not made again by itself, one sentence each.
        lost: rules that cannot run any more, with what is wrong and what to do.
    """

    forced: dict[str, str]
    notes: list[str]
    lost: dict[str, BadInputError]


def state(results: Path, rule: str) -> State:
    """The receipt of a rule, and which of its results are still there."""
    path = results / "receipts" / f"{rule}.json"
    try:
        receipt = json_files.load(path)
        receipts.check(receipt)
    except (OSError, ValueError):
        receipt = None
    if receipt is None or receipt["rule"] != rule:
        return State(rule, None, path.exists(), {})
    return State(rule, receipt, True, {name: str(p) for name, p in receipt["result"].items() if not _is_there(name, p)})


def _is_there(name: str, place: Any) -> bool:
    path = Path(str(place))
    return (path / INSIDE[name] if name in INSIDE and path.is_dir() else path).exists()


def judge(results: Path) -> Verdict:
    """What must run again, cannot run any more, or is worth saying, whatever Snakemake thinks of it."""
    states = {rule: state(results, rule) for rule in stages.NEEDS}
    verdict = Verdict({}, [], {})
    for rule, found in states.items():
        if found.receipt is None:
            if found.exists or any(states[name].exists for name in stages.below(rule)):
                verdict.forced[rule] = "its receipt cannot be read" if found.exists else "its receipt is missing"
        elif found.gone:
            _judge_gone(found, states, verdict)
    return verdict


def _judge_gone(found: State, states: dict[str, State], verdict: Verdict) -> None:
    rule, what = found.rule, ", ".join(f"{name} {place}" for name, place in found.gone.items())
    trained = states["train"].receipt is not None
    if rule == "train":
        if "checkpoint" in found.gone and not _has_model(states):
            verdict.lost["convert_checkpoint"] = _lost(found.gone["checkpoint"], "and no converted model is there")
    elif rule == "convert_checkpoint" and "checkpoint" in states["train"].gone:
        if "model" in found.gone:
            missing = f"and so has the model {found.gone['model']} that was made from it"
            verdict.lost["convert_checkpoint"] = _lost(states["train"].gone["checkpoint"], missing)
    elif rule == "verify_model" and states["convert_checkpoint"].gone:
        pass  # the same folder; it is verified again once it is converted again
    elif trained and "train" in stages.below(rule):
        verdict.notes.append(
            f"{what} of {rule} has gone; training is done and does not need it. To make it again, with whatever "
            f"follows from it: {AGAIN} {rule}"
        )
    else:
        verdict.forced[rule] = f"{what} has gone"


def _has_model(states: dict[str, State]) -> bool:
    return all(states[rule].receipt and not states[rule].gone for rule in ("convert_checkpoint", "verify_model"))


def _lost(checkpoint: str, further: str) -> BadInputError:
    return BadInputError(
        f"the checkpoint of the finished training, {checkpoint}, has gone, {further}",
        f"put one of them back; or train again from the first step, on purpose: {AGAIN} train",
    )


def check_inputs(results: Path, rules: Collection[str]) -> None:
    """Refuse at start what a stage would miss hours later: results of stages that do not run now.

    Raises:
        BadInputError: a rule of ``rules`` reads a result that has gone.
    """
    for rule in (name for name in stages.CHAIN if name in rules):
        for upstream, name in stages.BY_NAME[rule].needs.items():
            found = state(results, upstream)
            if upstream in rules or name not in found.gone:
                continue
            if upstream == "train":
                raise _lost(found.gone[name], f"and {rule} needs it")
            raise BadInputError(
                f"{rule} needs {name} {found.gone[name]} of {upstream}, which has gone",
                f"put it back, or make it again: {AGAIN} {upstream}",
            )


def check_training(results: Path, rules: Collection[str], on_purpose: bool) -> None:
    """Refuse to train a finished run once more only because its checkpoints were removed.

    Args:
        rules: rules that would run.
        on_purpose: training was asked for by name, or its settings have changed.

    Raises:
        BadInputError: the run would silently start again at its first step.
    """
    found = state(results, "train")
    if "train" not in rules or on_purpose or found.receipt is None or "checkpoint" not in found.gone:
        return
    figures = found.receipt.get("figures", {})
    raise BadInputError(
        f"training is done ({figures.get('steps', '?')} steps), but its checkpoint {found.gone['checkpoint']} has "
        "gone: it would start again at its first step, since something that it stands on runs again",
        f"put the checkpoint back; or train again on purpose: {AGAIN} train",
    )


def check_complete(results: Path) -> None:
    """Raise BadInputError naming every stage without which the chain is not complete."""
    verdict = judge(results)
    missing = [rule for rule in stages.CHAIN if state(results, rule).receipt is None or rule in verdict.forced]
    missing += [rule for rule in verdict.lost if rule not in missing]
    if missing:
        raise BadInputError(f"the chain is not complete: {', '.join(missing)}", "the report has no receipt before")


def said(error: StageError) -> str:
    """An error as one line."""
    return f"{error.problem}; {error.fix}" if error.fix else error.problem
