"""What a page that stays open shows: the rows of ``status``, the plots of the report, the end of the log.

Made anew only while somebody looks, no more often than ``EVERY_S``, and less often the longer it takes: a tenth of one
core at most. The queue is asked seldom (``slurm_jobs.Seldom``); files that grow are read on from where reading stopped.
"""

import dataclasses
import hashlib
import re
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .. import formatting
from ..cli import say
from ..errors import StageError
from ..training import run_folder
from . import build, collect, glance, overview, plots, plots_experts, progress, slurm_jobs, status
from .follow import LastLine, Lines

EVERY_S = 5.0
SHARE = 10  # a page that took a second to make is made again after ten
LOOKED_S = 60.0  # nobody has asked for so long: nobody looks
PATIENCE_S = 0.6  # how long one who comes after a pause waits for a new page
LOG_LINES = 16
CARDS = ("step", "loss", "validation", "gradient", "speed", "memory", "time left")
SMALL = re.compile(", |: | (?:of|at|to|before|after) ")
LEVELS = {"running": "run", "seems to run": "run", "queued": "wait", "stopped": "bad"}


@dataclasses.dataclass(frozen=True)
class Page:
    """The page's parts as they were at a time.

    Attributes:
        at: seconds since the epoch.
        parts: name → HTML, UTF-8.
        tags: name → what changes with it.
    """

    at: float
    parts: dict[str, bytes]
    tags: dict[str, str]

    @classmethod
    def of(cls, parts: dict[str, str]) -> "Page":
        encoded = {name: text.encode() for name, text in parts.items()}
        return cls(time.time(), encoded, {name: hashlib.sha256(e).hexdigest()[:16] for name, e in encoded.items()})


class Watched:
    """An experiment that is looked at again and again."""

    def __init__(self, results: Path, logs: Path | None):
        self.results, self.logs = results, logs
        self._jobs = slurm_jobs.Seldom(slurm_jobs.jobs)
        self._snakemakes = slurm_jobs.Seldom(progress.snakemakes)  # may ask squeue as well
        self._lines: Lines | None = None
        self._loads: LastLine | None = None
        self._drawn: tuple[Any, str] = (None, "")

    def _metrics(self, path: Path) -> list[dict[str, Any]]:
        if self._lines is None or self._lines.path != path:
            self._lines, self._loads = Lines(path), LastLine(path.with_name(run_folder.EXPERT_LOAD))
        return self._lines.read()

    def page(self) -> Page:
        """The page as things are now.

        Raises:
            BadInputError: there is no such experiment.
        """
        logs = self.logs or collect.default_logs(self.results)  # which a run that has just begun makes
        seen = status.look(self.results, logs, lambda: (self._jobs(), self._snakemakes(logs)), self._metrics)
        return Page.of({"state": self._state(seen), "plots": self._plots(seen), "log": _log(seen.now)})

    def _state(self, seen: status.Look) -> str:
        rows = [*status.rows_of(seen), *(row for row in status.log_rows(seen.now) if row[0] not in ("log", ""))]
        texts = {name: text for name, text in rows if text}
        steps = status.steps_of(seen.run) if seen.metrics and seen.run and seen.trains else None
        level, verdict = overview.verdict(seen.stages)
        running = LEVELS.get(seen.now.state)
        return build.page(
            "watch_state.html.j2",
            name=seen.results.name,
            level=running or level,
            verdict=texts.pop("stage") if running else verdict,
            stages=[
                (one.rule, one.state, LEVELS.get(one.state) or overview.level(one.state), one.note)
                for one in seen.found
            ],
            symbols=status.SYMBOLS,
            failures=glance.failures(seen.stages),
            attention=texts.pop("attention", ""),
            share=min(1.0, seen.metrics[-1]["step"] / steps) if steps else None,
            cards=[(name, *split(texts.pop(name))) for name in CARDS if name in texts],
            jobs=[(job, name, "" if job.reason == "None" else job.reason) for job, name in status.jobs_of(seen)],
            asked=formatting.duration(self._jobs.age()) if seen.known is not None else "",
            facts=list(texts.items()),
        )

    def _plots(self, seen: status.Look) -> str:
        """Drawn anew only where the metrics have changed."""
        loads = self._loads.read() if self._loads and seen.run else []
        key = (seen.run, self._lines.version if self._lines else 0, loads[-1].get("step") if loads else None)
        if self._drawn[0] != key:
            drawn = [*plots.training(seen.metrics), *plots_experts.experts(loads, seen.metrics)]
            self._drawn = key, build.page("watch_plots.html.j2", plots=build.as_figures(drawn))
        return self._drawn[1]


def _log(now: progress.Progress) -> str:
    silent = formatting.duration(max(0.0, now.silent)) if now.silent is not None else ""
    lines = collect.log_tail(now.log, LOG_LINES) if now.log else []
    return build.page("watch_log.html.j2", log=now.log, silent=silent, lines=lines)


def split(text: str) -> tuple[str, str]:
    """What a card shows large, a figure with its unit, and what small."""
    text = text.removeprefix("loss ")  # of the card `validation`
    end = SMALL.search(text)
    return (text[: end.start()], text[end.start() :].lstrip(",: ")) if end else (text, "")


class Refreshing(threading.Thread):
    """Makes the page again while somebody looks; a page that cannot be made leaves the one of before."""

    def __init__(self, make: Callable[[], Page], every: float = EVERY_S):
        super().__init__(daemon=True, name="page")
        self.make, self.every = make, every
        self.page = make()
        self.trouble = ""
        self._looked = time.monotonic()
        self._next = self._looked + every  # the first took longer than any other: it read all there was
        self._ended = False
        self._changed = threading.Condition()

    def look(self) -> tuple[Page, str]:
        """The page and why it is an old one (mostly empty); who comes after a pause waits a moment for a new one."""
        with self._changed:
            paused = time.monotonic() - self._looked > LOOKED_S
            self._looked = time.monotonic()
            self._changed.notify_all()
            if paused:
                before = self.page
                self._changed.wait_for(lambda: self.page is not before or self.trouble, PATIENCE_S)
            return self.page, self.trouble

    def end(self, patience: float) -> bool:
        """Make no more pages; whether the one that is being made was done after so many seconds."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()
        if self.is_alive():
            self.join(patience)
        return not self.is_alive()

    def run(self) -> None:
        while self._waited():
            begun = time.monotonic()
            page, trouble = None, ""
            try:
                page = self.make()
            except StageError as error:
                trouble = error.problem
            except Exception as error:  # whatever a file holds: the page goes on, and says so
                trouble = f"{type(error).__name__}: {error}"
                if trouble != self.trouble:  # once, not every few seconds
                    say(traceback.format_exc())
            with self._changed:
                self.page, self.trouble = page or self.page, trouble
                self._next = self._time_after(begun)
                self._changed.notify_all()

    def _time_after(self, begun: float) -> float:
        """When the page may be made again, on the clock of time.monotonic, now that one is made."""
        now = time.monotonic()
        return now + max(self.every, SHARE * (now - begun))

    def _waited(self) -> bool:
        """Wait until somebody looks and it is time; False at the end."""
        with self._changed:
            while not self._ended:
                now = time.monotonic()
                if now - self._looked > LOOKED_S:
                    self._changed.wait()
                elif now < self._next:
                    self._changed.wait(self._next - now)
                else:
                    return True
        return False
