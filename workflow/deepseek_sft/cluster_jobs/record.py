"""What a running Snakemake notes in ``logs/<experiment>/snakemake``: itself, and the Slurm jobs it waits for.

``<host>-<pid>.json``  who it is (``holders.own``), its locks, and what the commands beside it need; gone when it ends
``<host>-<pid>.jobs``  one line of JSON for each job it has submitted or found again
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

from .. import files, json_files

FOLDER = "snakemake"
VARIABLE = "DEEPSEEK_SFT_SNAKEMAKE"  # path of the record, for the commands in workflow/slurm_commands
PYTHON = "DEEPSEEK_SFT_PYTHON"  # interpreter that runs them
MARKER = "do-not-retry"


@dataclasses.dataclass(frozen=True)
class Rule:
    """What tells a job of a rule from one that would do something else.

    Attributes:
        params: the rule's params, as text.
        inputs: files whose contents count.
        receipt: the file that its success leaves.
        shared: whether a job of an earlier Snakemake may stand for this one's.
    """

    params: str
    inputs: list[str]
    receipt: str
    shared: bool

    def fingerprint(self) -> str:
        """Hash over params and inputs; of inputs that are not there, over their absence."""
        digest = hashlib.sha256(self.params.encode())
        for name in sorted(self.inputs):
            path = Path(name)
            digest.update(b"\0" + name.encode() + b"\0" + (path.read_bytes() if path.is_file() else b"-"))
        return digest.hexdigest()[:12]


@dataclasses.dataclass(frozen=True)
class Record:
    """One Snakemake.

    Attributes:
        path: of the record.
        holder: what ``holders.own`` said in it.
        experiment, project, logs: whose jobs these are; ``logs`` is the experiment's folder of logs.
        path_variable: PATH without our commands.
        accounting: whether sacct answers on this cluster (slurmdbd).
        rules: rule → what its job does.
        locks: Snakemake's lock files of this run, with their times.
        command: how it was started.
    """

    path: Path
    holder: dict[str, Any]
    experiment: str
    project: str
    logs: str
    path_variable: str
    accounting: bool
    rules: dict[str, Rule]
    locks: dict[str, int]
    command: str

    @property
    def jobs_file(self) -> Path:
        return self.path.with_suffix(".jobs")

    @property
    def interrupted_file(self) -> Path:
        """There once the user has asked for the end: nobody waits for Slurm any longer."""
        return self.path.with_suffix(".interrupted")

    def write(self) -> None:
        value = {key: entry for key, entry in dataclasses.asdict(self).items() if key != "path"}
        files.write_json(self.path, value)

    @classmethod
    def read(cls, path: Path) -> "Record | None":
        """Read it; None where there is none, or none that this version understands."""
        try:
            value = json_files.load(path)
            rules = {name: Rule(**rule) for name, rule in value.pop("rules").items()}
            return cls(path=path, rules=rules, **value)
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return None

    def note(self, job: str, rule: str, run: str) -> None:
        """Add a job, on disk before anybody is told of it."""
        line = json.dumps({"job": job, "rule": rule, "run": run, "time": time.time()}) + "\n"
        with open(self.jobs_file, "a", encoding="utf-8") as stream:
            stream.write(line)
            stream.flush()
            os.fsync(stream.fileno())

    def jobs(self) -> list[dict[str, Any]]:
        """All jobs noted so far, in order."""
        try:
            lines = self.jobs_file.read_text(encoding="utf-8").splitlines()
        except OSError:
            return []
        found = []
        for line in lines:
            with contextlib.suppress(json_files.NotJsonError):  # the last one of a killed process may be torn
                entry = json_files.parse(line)
                json_files.require(entry, {"job": str, "rule": str, "run": str})
                found.append(entry)
        return found

    def marker(self, rule: str) -> Path:
        """File that ends the retries of a rule."""
        return marker_of(Path(self.logs), rule)

    def remove(self) -> None:
        """Forget this Snakemake, which has ended."""
        for path in (self.path, self.jobs_file, self.interrupted_file, self.path.with_suffix(".states")):
            path.unlink(missing_ok=True)


def marker_of(logs: Path, rule: str) -> Path:
    return logs / rule / MARKER


def all_records(logs: Path) -> list[Record]:
    """Records of an experiment, of living and dead Snakemakes."""
    found = [Record.read(path) for path in sorted((logs / FOLDER).glob("*.json"))]
    return [record for record in found if record]
