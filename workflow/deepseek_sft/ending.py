"""The last lines of a run: what failed, what to do, what is done already. At most ten lines, made from the logs."""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import chain, stages

LINES = 10
PROBLEM_LINES, FIX_LINES, WIDTH = 3, 2, 220
READ = 1 << 20  # bytes of a log's end that are looked through
CONTROL = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|[\x00-\x08\x0b-\x1f\x7f]")
NEVER_RETRIED = ("2", "3")  # docs/exit-codes.md


@dataclasses.dataclass(frozen=True)
class Failure:
    """One rule that failed.

    Attributes:
        log: its log; None without one.
        further: what else may say why: logs of the Slurm job.
        said: what Snakemake knows of it, such as the state of the Slurm job.
    """

    rule: str
    log: Path | None = None
    further: Sequence[Path] = ()
    said: str = ""


@dataclasses.dataclass(frozen=True)
class Cause:
    """Why a stage failed: lines of the problem, lines of the fix, exit code where it is known."""

    problem: list[str]
    fix: list[str]
    code: str = ""


def cause_of(failure: Failure) -> Cause:
    """The last error in the logs of a failed stage; without one, their last lines, or what Snakemake said."""
    texts = [_end_of(path) for path in (failure.log, *failure.further) if path]
    code = next((found[-1] for text in reversed(texts) if (found := re.findall(r"exit code (\d+)", text))), "")
    if failure.log:
        marker = _end_of(failure.log.with_suffix("") / "do-not-retry")
        code = (re.findall(r"exit code (\d+)", marker) or [code])[0]
    for text in texts:
        if found := _last_error(text):
            return Cause(*found, code)
    slurm = re.search(r"SLURM status is: '([A-Z_]+)", failure.said)
    if slurm and slurm[1] != "FAILED":
        key = {"TIMEOUT": "runtime", "OUT_OF_MEMORY": "mem_mb"}.get(slurm[1])
        fix = [f"raise `{key}` in the profile (set-resources: {failure.rule})"] if key else []
        return Cause([f"its Slurm job ended with {slurm[1]}"], fix, code)
    lines = [line for text in texts[:1] for line in text.splitlines() if line.strip()]
    return Cause(lines[-PROBLEM_LINES:] or [failure.said.strip() or "no log says why"], [], code)


def failed(failures: Sequence[Failure], results: Path, command: str, report: str, other: str = "") -> str:
    """The end of a run that failed.

    Args:
        failures: rules that failed, the one to speak of first.
        results: ``results/<experiment>``.
        command: the command line as it was typed.
        report: the report's path, or why there is none; may be empty.
        other: what went wrong where no rule failed.
    """
    done = [rule for rule in stages.CHAIN if chain.state(results, rule).receipt is not None]
    again = f"{command}    (goes on after what is done)"
    if failures:
        first, *rest = failures
        cause = cause_of(first)
        code = f" (exit code {cause.code})" if cause.code else ""
        also = f"; also {', '.join(f'{one.rule} ({one.log})' for one in rest)}" if rest else ""
        rows = [(f"failed: {first.rule}{code}{also}", "")]
        rows += [("  what", line) for line in cause.problem[:PROBLEM_LINES]]
        rows += [("  fix", line) for line in cause.fix[:FIX_LINES]]
        if first.log:
            rows.append(("  log", str(first.log)))
        if cause.code in NEVER_RETRIED or (cause.fix and not cause.code):
            again = f"after that the same again: {command}"
    else:
        rows = [(other or "stopped before the end", "")]
    rows.append(("  done", ", ".join(done) or "nothing yet"))
    if report:
        rows.append(("  report", report))
    rows.append(("  next", again))
    return _text(rows)


def finished(rules: Sequence[str], results: Path, seconds: float) -> str:
    """The end of a run that did all it was asked for.

    Args:
        rules: stages that ran now.
        seconds: since its start.
    """
    states = {rule: chain.state(results, rule) for rule in stages.NEEDS}
    open_stages = [rule for rule in stages.CHAIN if states[rule].receipt is None]
    rows = [(f"done: {results.name}, {', '.join(rules)} in {_duration(seconds)}", "")]
    for name, rule in (("report", stages.REPORT), ("model", "verify_model")):
        receipt = states[rule].receipt
        if receipt and not states[rule].gone and not open_stages:
            rows.append((f"  {name}", str(receipt["result"].get(name, ""))))
    if open_stages:
        rows.append(("  not yet", ", ".join(open_stages)))
    rows += [("  data", line) for line in _data(states["prepare_data"].receipt, states["tokenize_data"].receipt)]
    return _text(rows)


def _data(prepared: dict[str, Any] | None, tokenized: dict[str, Any] | None) -> list[str]:
    """What became of the records, where not all are trained on as they came: jobs say it in their logs alone."""
    lines = []
    found, samples = ((receipt or {}).get("figures") or {} for receipt in (prepared, tokenized))
    if prepared and found.get("rejected"):
        why = ", ".join(f"{reason} {count}" for reason, count in (found.get("rejects") or {}).items())
        where = (prepared.get("result") or {}).get("rejects", "")
        lines.append(
            f"{found.get('accepted')} of {found.get('records')} records accepted; rejected: {why}; see {where}"
        )
    if tokenized and samples.get("rejected"):
        why = ", ".join(f"{reason} {count}" for reason, count in (samples.get("rejects") or {}).items())
        where = (tokenized.get("result") or {}).get("rejects", "")
        lines.append(f"{samples['rejected']} samples left out of tokens: {why}; see {where}")
    if unused := found.get("unused_fields"):
        lines.append(f"fields not used: {', '.join(unused)}")
    return lines


def _text(rows: list[tuple[str, str]]) -> str:
    """Rows as aligned lines; a name is written once for the lines that follow it."""
    lines, before = [], ""
    for name, text in rows[:LINES]:
        shown = "" if name == before else name if not text else f"{name}:"
        lines.append(_cut(f"{shown:<9} {text}".rstrip() if text else shown, WIDTH if name != "  next" else 10_000))
        before = name
    return "\n".join(lines)


def _last_error(text: str) -> tuple[list[str], list[str]] | None:
    """Problem and fix of the last message of the form ``error: …``, ``  fix: …``."""
    lines = text.splitlines()
    starts = [number for number, line in enumerate(lines) if re.match(r"(\d+: )?error: ", line)]
    if not starts:
        return None
    label, first = lines[starts[-1]].split("error: ", 1)
    block = [first]
    for line in lines[starts[-1] + 1 :]:
        line = line.removeprefix(label)  # srun --label writes it before every line
        if not line.startswith((" ", "\t")) or not line.strip():
            break
        block.append(line.strip())
    fixes = [number for number, line in enumerate(block) if line.startswith("fix: ")]
    end = fixes[0] if fixes else len(block)
    problem, fix = block[:end], [line.removeprefix("fix: ") for line in block[end:]]
    if len(problem) > PROBLEM_LINES:
        problem = [*problem[: PROBLEM_LINES - 1], f"{problem[PROBLEM_LINES - 1]} … (all of it: the log)"]
    return problem, fix


def _end_of(path: Path) -> str:
    try:
        with open(path, "rb") as stream:
            stream.seek(max(0, path.stat().st_size - READ))
            return CONTROL.sub("", stream.read().decode("utf-8", "replace"))
    except OSError:
        return ""


def _cut(line: str, width: int) -> str:
    return line if len(line) <= width else f"{line[: width - 1]}…"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
