"""A project with one experiment, and scripts in place of Slurm's commands, for unit tests of cluster_jobs."""

from pathlib import Path

import pytest

from deepseek_sft.cluster_jobs import holders, jobs, queue, record

BUSY = "echo 'error: Unable to contact slurm controller (connect failure)' >&2; exit 1"
CALL = ["--parsable", "--job-name", "run-1", "--comment", "rule_train", "--nodes=32"]


class Site:
    """A project with one experiment, a record of this process's, and Slurm's commands as scripts."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch):
        self.folder, self.monkeypatch = folder, monkeypatch
        self.tools = folder / "tools"
        self.tools.mkdir()
        (folder / "input").write_text("tokens")
        monkeypatch.chdir(folder)
        self.path = f"{self.tools}:/usr/bin:/bin"
        monkeypatch.setenv("PATH", self.path)
        self.rule = record.Rule('{"settings": "{}"}', ["input"], "receipt.json", True)
        self.record = self.new_record()
        self.tool("squeue", "true")
        self.tool("sbatch", 'printf "%s\\n" "$@" > called; echo 78')
        monkeypatch.setattr(queue, "PATIENCE_S", 5.0)
        monkeypatch.setattr(queue, "LONGEST_PAUSE_S", 0.05)

    def new_record(self, **changes) -> record.Record:
        values = {
            "path": self.folder / "logs/mine/snakemake/here-1.json",
            "holder": holders.own(),
            "experiment": "mine",
            "project": str(self.folder),
            "logs": "logs/mine",
            "path_variable": self.path,
            "accounting": False,
            "rules": {"train": self.rule},
            "locks": {},
            "command": "snakemake",
        }
        made = record.Record(**(values | changes))
        made.path.parent.mkdir(parents=True, exist_ok=True)
        made.write()
        return made

    def tool(self, name: str, text: str) -> None:
        (self.tools / name).write_text(f"#!/bin/bash\n{text}\n")
        (self.tools / name).chmod(0o755)

    def row(
        self, job: str, state: str, fingerprint: str | None = None, name: str = "run-0", rule: str = "train"
    ) -> str:
        comment = jobs.comment(rule, "mine", fingerprint or self.rule.fingerprint())
        return f"{job}|{state}|{name}|(null)|{self.folder}|{comment}"

    def queue(self, *rows: str) -> None:
        self.tool("squeue", "\n".join(f"echo '{row}'" for row in rows) or "true")

    def called(self) -> list[str]:
        return (self.folder / "called").read_text().splitlines() if (self.folder / "called").exists() else []


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    return Site(tmp_path, monkeypatch)
