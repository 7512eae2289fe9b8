"""What a report is made of, read from a results folder: receipts, metrics, histogram, warnings and ends of logs.

Nothing here raises for absent or broken files: a report is read most carefully when something went wrong. What cannot
be read becomes the stage's state and a note.
"""

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from .. import formatting, json_files, secrets_file
from .. import stages as stage_rows
from ..errors import BadInputError
from ..training import run_folder

# Where a result has gone: what brings it back. Later stages do not need it, or run again with it.
REMAKES = {
    "train": "nothing needs it once the model is verified; to train again, on purpose: snakemake … --forcerun train",
    **{
        rule: f"to make it again, with what follows from it: snakemake … --forcerun {rule}"
        for rule in stage_rows.CHAIN[: stage_rows.CHAIN.index("train")]
    },
}
LOG_LINES = 30
WARNING = re.compile(r"\bwarning: .*", re.IGNORECASE)
RANK = re.compile(r"^\d+: ")  # srun's label of the task
WARNINGS, WARNINGS_READ = 20, 8 << 20  # of one stage: lines shown, bytes of its log that are looked through


@dataclasses.dataclass(frozen=True)
class Check:
    """One named check; ``passed`` is None where it did not apply."""

    name: str
    passed: bool | None
    detail: str


@dataclasses.dataclass
class Stage:
    """One stage as found.

    Attributes:
        state: ``complete``, ``failed``, ``out of date``, ``result gone``, ``unreadable``, ``not finished`` (a log but
            no receipt) or ``not run``.
        note: one sentence on the state, may be empty.
        receipt: the receipt's content; empty unless it could be read.
        source: the receipt's path relative to the results folder.
        left: figures that a failed stage left instead of a receipt.
        error: what the newest log says went wrong, and how to mend it; kept for the states that need it.
        log: last lines of the newest log, kept for the states that need it.
        warnings: different warnings of the newest log.
    """

    rule: str
    state: str
    note: str = ""
    receipt: dict[str, Any] = dataclasses.field(default_factory=dict)
    source: str = ""
    left: dict[str, Any] = dataclasses.field(default_factory=dict)
    error: str = ""
    log: list[str] = dataclasses.field(default_factory=list)
    warnings: list[str] = dataclasses.field(default_factory=list)

    @property
    def figures(self) -> dict[str, Any]:
        """The receipt's figures, else those that a failed stage left, or nothing."""
        return mapping(self.receipt.get("figures")) or self.left

    @property
    def command(self) -> list[str]:
        """The command line that made the receipt, or nothing."""
        command = self.receipt.get("command")
        return [str(word) for word in command] if isinstance(command, list) else []

    @property
    def checks(self) -> list[Check]:
        """The receipt's checks, then those that were skipped, with the reason."""
        made = [
            Check(
                str(name), check["passed"] if isinstance(check["passed"], bool) else None, str(check.get("detail", ""))
            )
            for figure in self.figures.values()
            if is_checks(figure)
            for name, check in figure.items()
        ]
        return made + [Check(str(name), None, str(why)) for name, why in mapping(self.figures.get("skipped")).items()]


def is_checks(entry: Any) -> bool:
    """Whether a figure is a table of checks: {name: {"passed": …, "detail": …}}."""
    return (
        isinstance(entry, dict) and bool(entry) and all(isinstance(c, dict) and "passed" in c for c in entry.values())
    )


def mapping(entry: Any) -> dict[str, Any]:
    """The entry if it is a dictionary, else an empty one."""
    return entry if isinstance(entry, dict) else {}


def check_folder(results: Path, logs: Path | None) -> None:
    """Raise BadInputError where there is nothing to report on, most likely a mistyped folder."""
    if not results.is_dir():
        raise BadInputError(
            f"no results folder at {results}", "give the folder of one experiment, results/<experiment>"
        )
    if not any((results / "receipts").glob("*.json")) and not (logs and any(logs.glob("*.log"))):
        raise BadInputError(
            f"{results} holds no receipts/*.json, and there are no logs of it",
            "give the folder of one experiment, results/<experiment>, after at least one stage has started",
        )


def default_logs(results: Path) -> Path | None:
    """Where the workflow logs this experiment: logs/<experiment> in the project, seen from here or from the results."""
    results = results.resolve()
    places = (Path("logs") / results.name, results.parent.parent / "logs" / results.name)
    return next((place for place in places if place.is_dir()), None)


def stages(results: Path, logs: Path | None, warnings: bool = True) -> dict[str, Stage]:
    """Every stage of the chain in order, then receipts of rules that are not part of it.

    Args:
        warnings: whether whole logs are looked through for them.
    """
    known = {path.stem for path in (results / "receipts").glob("*.json")} - {stage_rows.REPORT}
    known |= {path.stem for path in (results / "failed").glob("*.json")} & set(stage_rows.SECTIONS)
    sections = [name for name in stage_rows.SECTIONS if name in known or not stage_rows.BY_NAME[name].shown_where_run]
    rules = sections + sorted(known - set(sections))
    found = {rule: _stage(results, logs, rule) for rule in rules}
    for rule, stage in found.items():
        stage.warnings = log_warnings(logs / f"{rule}.log") if logs and warnings else []
    for rule in stage_rows.CHAIN:
        if rule not in found:
            continue
        stage = found[rule]
        newer = [
            name for name in stage_rows.above(rule) if name in found and _finished(found[name]) > _finished(stage) > ""
        ]
        if stage.state == "complete" and newer:
            stage.state, stage.note = "out of date", f"finished before {' and '.join(newer)} ran again; run it again"
    return found


def _finished(stage: Stage) -> str:
    """ISO time at which the stage finished (always UTC, so that text order is time order), or empty."""
    return str(stage.receipt.get("finished") or "")


def _stage(results: Path, logs: Path | None, rule: str) -> Stage:
    source = f"receipts/{rule}.json"
    log = log_tail(logs / f"{rule}.log") if logs else []
    try:
        receipt = json_files.load(results / source)
        if not isinstance(receipt, dict) or receipt.get("rule", rule) != rule:
            raise ValueError(f"it is not a receipt of {rule}")
    except FileNotFoundError:
        error = last_error(logs / f"{rule}.log") if logs else ""
        if ended := _given_up(logs, rule):
            left = mapping(read_json(results / "failed" / f"{rule}.json")).get("figures")
            place = f"failed/{rule}.json" if left else ""
            return Stage(rule, "failed", ended, source=place, left=mapping(left), error=error, log=log)
        state, note = ("not finished", "there is a log but no receipt") if log else ("not run", "")
        return Stage(rule, state, note, error=error, log=log)
    except (OSError, ValueError, RecursionError) as error:
        return Stage(rule, "unreadable", f"the receipt cannot be read: {error}", source=source, log=log)
    stage = Stage(rule, "complete", receipt=receipt, source=source)
    failed = [check.name for check in stage.checks if check.passed is False]
    gone = [str(place) for place in mapping(receipt.get("result")).values() if locate(results, place) is None]
    if failed:
        stage.state, stage.log = "failed", log
        stage.note = f"{len(failed)} of {len(stage.checks)} checks failed: {', '.join(failed)}"
    elif gone:
        stage.state, stage.note = "result gone", f"no longer there: {', '.join(gone)}"
    elif stage.figures.get("verdict") == "does not fit":
        stage.state = "failed"
    return stage


def _given_up(logs: Path | None, rule: str) -> str:
    """What the marker says that a stage leaves when a retry could not help (bad input, failed gate); empty if none."""
    try:
        return (logs / rule / "do-not-retry").read_text(encoding="utf-8", errors="replace").strip() if logs else ""
    except OSError:
        return ""


def log_tail(path: Path, lines: int = LOG_LINES) -> list[str]:
    """Last lines of a log, without terminal sequences and secrets; empty if there is none."""
    try:
        with open(path, "rb") as stream:
            stream.seek(max(0, path.stat().st_size - 64_000))
            text = stream.read().decode("utf-8", "replace")
    except OSError:
        return []
    last = text.rstrip("\n").split("\n")[-lines:] if text.strip() else []
    return [secrets_file.masked(formatting.clean(line, 500)) for line in last]


def last_error(path: Path, most: int = 1500) -> str:
    """The last error that one of our programs told in a log, with its fix; empty where there is none."""
    found: list[str] = []
    inside = False
    for line in log_tail(path, 400):
        text = RANK.sub("", line)
        if text.startswith("error: "):
            found, inside = [text.removeprefix("error: ")], True
        elif inside and text.startswith("  "):  # what follows an error of ours is indented: details, then the fix
            found.append(text)
        else:
            inside = False
    return formatting.clean("\n".join(found), most)


def log_warnings(path: Path) -> list[str]:
    """Different warnings of our own programs in a log, the first ones; ranks and nodes that say the same count once."""
    found: dict[str, None] = {}
    try:
        with open(path, "rb") as stream:
            text = stream.read(WARNINGS_READ).decode("utf-8", "replace")
    except OSError:
        return []
    for line in text.splitlines():
        if "warning: " in line and len(found) < WARNINGS and (match := WARNING.search(line)):
            found[secrets_file.masked(formatting.clean(match[0].removeprefix("warning: "), 500))] = None
    return list(found)


def locate(results: Path, place: Any) -> Path | None:
    """Where a path of a receipt lies now, or None.

    Receipts hold paths as the stage was given them, often relative to the project; a results folder may also have been
    copied elsewhere. A path that names the experiment is looked for in this results folder first, and never from the
    folder this runs in, which may hold another experiment of that name.
    """
    if not isinstance(place, str) or not place:
        return None
    path = Path(place)
    candidates = [path, results.parent.parent / path]
    if results.name in path.parts:
        after = len(path.parts) - path.parts[::-1].index(results.name)
        candidates.insert(0, results.joinpath(*path.parts[after:]))
        if not path.is_absolute():
            candidates.remove(path)
    try:
        return next((candidate for candidate in candidates if candidate.exists()), None)
    except (OSError, ValueError):
        return None


def result_path(results: Path, stage: Stage, name: str) -> Path | None:
    """Where one result of a stage lies now, or None."""
    return locate(results, mapping(stage.receipt.get("result")).get(name))


def training_metrics(results: Path, train: Stage) -> list[dict[str, Any]]:
    """The metrics that the receipt names; the newest run's where training began but left no readable receipt."""
    return metrics(_metrics_path(results, train))


def _metrics_path(results: Path, train: Stage) -> Path | None:
    if train.receipt or train.state == "not run":
        return result_path(results, train, "metrics")
    runs = (results / "train" / "runs").glob(f"*/{run_folder.METRICS}")
    return max(runs, key=lambda file: file.stat().st_mtime, default=None)


def run_of(results: Path, train: Stage) -> Path | None:
    """Folder of the run whose metrics these are."""
    path = _metrics_path(results, train)
    return path.parent if path else None


def expert_loads(results: Path, train: Stage) -> list[dict[str, Any]]:
    """Lines of ``expert_load.jsonl`` by step, which lies beside the metrics."""
    path = _metrics_path(results, train)
    return metrics(path.with_name(run_folder.EXPERT_LOAD)) if path else []


def config(results: Path) -> dict[str, Any]:
    """The resolved configuration of the last start, as config.yaml has it; empty where it cannot be read."""
    try:
        return mapping(yaml.safe_load((results / "config.yaml").read_text(encoding="utf-8")))
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return {}


def read_json(path: Path | None) -> Any:
    """What a JSON file holds; None without a file that can be read."""
    try:
        return json_files.load(path) if path else None
    except (OSError, ValueError, RecursionError):
        return None


def metrics(path: Path | None) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl by step; of a step that ran twice (resumed) the later line counts, broken lines do not."""
    by_step: dict[int, dict[str, Any]] = {}
    for line in json_lines(path):
        if isinstance(line.get("step"), int):
            by_step[line["step"]] = line
    return [by_step[step] for step in sorted(by_step)]


def json_lines(path: Path | None) -> Iterator[dict[str, Any]]:
    """Objects of a JSON-lines file; lines that are none (a half-written last line) are skipped."""
    if path is None:
        return
    try:
        with open(path, encoding="utf-8", errors="replace") as stream:
            for line in stream:
                try:
                    entry = json_files.parse(line)
                except (ValueError, RecursionError):
                    continue
                if isinstance(entry, dict):
                    yield entry
    except OSError:
        return
