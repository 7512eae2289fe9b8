"""What Snakemake (pinned) prints where a person looks: less of it, warnings of a dry run last, and our own last lines.

Its log file, .snakemake/log/, keeps everything; `--verbose` leaves the terminal as Snakemake would have it too.
"""

import atexit
import dataclasses
import logging
import re
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from snakemake.logging import DefaultFormatter, get_event, logger
from snakemake_interface_logger_plugins.common import LogEvent

from .ending import Failure

HANDLER = "DefaultStreamHandler"
REASON = 160  # characters
# What stands in our own last lines, in the job's line, or in the log file.
SILENT = (
    "At least one job did not complete successfully",
    "Reasons:\n",
    "Some jobs were triggered by provenance information",
    "Rules with provenance triggered jobs",
    "Exiting because a job execution failed",
    "Shutting down, this might take some time",
    "Complete log(s): ",
    "Removing output files of failed job",
)
PLACE = re.compile(r"^(\w+(?:Error|Exception))(?: in [^\n]*)?:\n", re.MULTILINE)
TRACE = re.compile(r"\n  File \"[^\n]*", re.MULTILINE)


@dataclasses.dataclass
class Seen:
    """What went by: failed jobs by their number, rules that finished, errors outside jobs."""

    failures: dict[int, Failure] = dataclasses.field(default_factory=dict)
    rules: dict[int, str] = dataclasses.field(default_factory=dict)
    finished: list[str] = dataclasses.field(default_factory=list)
    errors: list[str] = dataclasses.field(default_factory=list)
    interrupted: bool = False


class Collector(logging.Handler):
    """Keeps what the last lines are made of; prints nothing."""

    def __init__(self, seen: Seen):
        super().__init__()
        self.seen = seen

    def emit(self, record: logging.LogRecord) -> None:
        """Note one record."""
        event, fields = get_event(record), record.__dict__
        if event == LogEvent.JOB_INFO:
            self.seen.rules[fields["jobid"]] = fields["rule_name"]
        elif event == LogEvent.JOB_ERROR:
            logs = [Path(path) for path in fields.get("log") or []]
            said = str(fields.get("rule_msg") or "")  # the executor's words
            failure = Failure(fields["rule_name"], logs[0] if logs else None, logs[1:], said)
            self.seen.failures[fields["jobid"]] = failure
        elif event == LogEvent.JOB_FINISHED:
            number = fields.get("job_id", fields.get("jobid"))
            self.seen.failures.pop(number, None)  # a retry went well
            if number in self.seen.rules:
                self.seen.finished.append(self.seen.rules[number])
        elif "Terminating processes on user request" in str(record.msg):
            self.seen.interrupted = True
        elif record.levelno >= logging.ERROR:
            self.seen.errors.append(str(record.msg))


class Formatter(DefaultFormatter):
    """Snakemake's texts, with long reasons and failed jobs in a line each."""

    def __init__(self, own: logging.Formatter, dry_run: bool):
        super().__init__(getattr(own, "quiet", None), show_failed_logs=False)
        self.dry_run = dry_run

    def format_job_info(self, msg: dict[str, Any]) -> str:
        """One line for a job of a dry run."""
        reason = short_reason(str(msg["reason"]))
        text = str(msg["rule_msg"] or msg["rule_name"])
        if not self.dry_run:
            return super().format_job_info(msg | {"reason": reason})
        if not msg["rule_msg"]:
            return f"{msg['rule_name']}: {reason}" if reason else msg["rule_name"]
        return f"{msg['rule_name']}: {text}" + (f"  ({reason})" if reason else "")

    def format_job_error(self, msg: dict[str, Any]) -> str:
        """That it failed; why stands at the end."""
        said = str(msg.get("rule_msg") or "").strip().split("\n")[0]
        return f"rule {msg['rule_name']} failed{f': {said}' if said else ''}"

    def format(self, record: logging.LogRecord) -> str:
        """An error without the place in our Snakefile where it was raised."""
        text = super().format(record)
        return plain_error(text) if get_event(record) == LogEvent.ERROR else text


def short_reason(reason: str) -> str:
    """Why a job runs, in a line: names of receipts for their paths, no settings spelled out."""
    reason = re.sub(r"(Params have changed since last execution).*", r"\1", reason, flags=re.DOTALL)
    reason = re.sub(r"[^\s,;]*/receipts/(\w+)\.json", r"\1", reason)
    reason = re.sub(r"Missing output files: \w+", "no receipt yet", reason)
    reason = re.sub(r"Input files updated by another job: ", "after ", reason)
    reason = re.sub(r"Updated input files: ", "newer: ", reason)
    return reason if len(reason) <= REASON else f"{reason[: REASON - 1]}…"


def plain_error(text: str) -> str:
    """Snakemake's text of an exception, without places in Snakefiles."""
    if text.startswith("LockException"):
        return (
            "error: this folder is locked: another snakemake works here, or one was killed\n"
            "  fix: wait for it (`make status` shows how far it is); if none runs any more, "
            f"{command_line()} --unlock, then the same command again"
        )
    if not PLACE.match(text) or "Traceback" in text:
        return text
    return "error: " + TRACE.sub("", PLACE.sub("", text, count=1)).strip()


def command_line() -> str:
    """The command as it was typed."""
    return shlex.join(["snakemake", *sys.argv[1:]])


class Terminal:
    """The terminal of the one Snakemake process that a person started.

    Attributes:
        seen: what the last lines are made of.
    """

    def __init__(self, workflow: Any):
        self.seen = Seen()
        self.started = time.monotonic()
        self.dry_run = bool(workflow.output_settings.dryrun)
        self._last: list[str] = []
        self._tables = 0
        settings = workflow.output_settings
        if settings.verbose:
            return
        for handler in logger.handlers:
            if handler.name == HANDLER:
                handler.addFilter(self._is_shown)
                handler.setFormatter(Formatter(handler.formatter, self.dry_run))
        logger.addHandler(Collector(self.seen))
        atexit.register(self._print_last)

    def warn(self, text: str) -> None:
        """A warning: at once, or, in a dry run, where it is not scrolled away."""
        if self.dry_run:
            self.at_end(f"warning: {text}")
        else:
            logger.warning(f"warning: {text}")

    def at_end(self, text: str) -> None:
        """Text to print as the very last thing."""
        if text not in self._last:
            self._last.append(text)

    def _is_shown(self, record: logging.LogRecord) -> bool:
        event, text = get_event(record), str(record.msg)
        if event == LogEvent.WORKFLOW_STARTED:
            return False
        if event == LogEvent.SHELLCMD:  # kilobytes of settings; profiles copied long ago ask for them
            return any(re.fullmatch(r"-[a-zA-Z]*p[a-zA-Z]*|--printshellcmds", word) for word in sys.argv)
        if event == LogEvent.RUN_INFO and self.dry_run:
            self._tables += 1
            return self._tables == 1
        if event == LogEvent.ERROR and "CalledProcessError" in text:
            return False  # the failed job has been named
        return not text.startswith(SILENT) and "At least one job did not complete" not in text

    def _print_last(self) -> None:
        if self._last:
            sys.stdout.flush()
            print("\n" + "\n".join(self._last), file=sys.stderr, flush=True)
