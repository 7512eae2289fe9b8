"""A project copy with the receipts and results (stand-ins) of a finished chain, to see what Snakemake does.

Snakemake knows nothing of these receipts but their times, so a whole chain has nothing to do, as after a real one.
"""

import json
import os
import subprocess
from pathlib import Path

from project_copy import copy_of

from deepseek_sft import stages

EXPERIMENT = "mine"
# In which the stages of a chain end whose tokenizer comes with the tiny model of prepare_model.
ORDER = [rule for rule in stages.NEEDS if rule != "prepare_model"]
ORDER.insert(ORDER.index("tokenize_data"), "prepare_model")
RESULTS = {
    "prepare_data": {"data": "data/train.jsonl"},
    "plan": {"plan": "plan/plan.json"},
    "prepare_model": {"base": "base/config.json"},
    "tokenize_data": {"tokens": "data/tokens/tokens.json"},
    "refine_plan": {"plan": "plan/refined/plan.json"},
    "train": {"checkpoint": "train/runs/a/step_9/committed.json", "metrics": "train/runs/a/metrics.jsonl"},
    "convert_checkpoint": {"model": "model/config.json"},
    "verify_model": {"model": "model/config.json"},
    "smoke_test": {"transcript": "serve/transcript.jsonl"},
    "build_report": {"report": "report.html"},
}
FOLDERS = ("base", "tokens", "checkpoint", "model")  # results that are folders; what is named above lies in them


class Chain:
    """A clone in which experiment `mine` is finished."""

    def __init__(self, project: Path, folder: Path):
        self.clone = copy_of(project, folder)
        (self.clone / ".envs").symlink_to(project / ".envs")
        self.results = self.clone / "results" / EXPERIMENT
        (self.clone / "mine.yaml").write_text(f"experiment: {EXPERIMENT}\n")
        for number, rule in enumerate(ORDER):
            self.write(rule, number)

    def write(self, rule: str, number: int) -> None:
        """Results and receipt of a rule, older than those of later ones."""
        result = {}
        for name, place in RESULTS[rule].items():
            path = self.results / place
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("{}\n")
            result[name] = str((path.parent if name in FOLDERS else path).relative_to(self.clone))
        content = {"schema": 1, "rule": rule, "finished": f"2026-01-01T00:{number:02}:00+00:00", "seconds": 1.0}
        content |= {"inputs": {}, "settings": {}, "result": result, "figures": {"steps": 9}}
        receipt = self.receipt(rule)
        receipt.parent.mkdir(parents=True, exist_ok=True)
        receipt.write_text(json.dumps(content))
        os.utime(receipt, (1_780_000_000 + 60 * number,) * 2)

    def receipt(self, rule: str) -> Path:
        return self.results / "receipts" / f"{rule}.json"

    def snakemake(
        self, *more: str, config: tuple[str, ...] = ("mine.yaml",), profile: str = "local"
    ) -> tuple[int, str]:
        """Exit code and output of Snakemake as a person calls it."""
        command = [".envs/workflow/bin/snakemake", *more]
        command += ["--profile", f"profiles/{profile}"] if profile else []
        command += ["--configfile", "config/experiments/demo.yaml", *config] if config else []
        return self.run(command)

    def run(self, command: list[str]) -> tuple[int, str]:
        done = subprocess.run(command, cwd=self.clone, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr

    def files(self) -> set[str]:
        """Everything below the results, to see that nothing was changed."""
        return {f"{path} {path.stat().st_mtime_ns}" for path in self.results.rglob("*") if path.is_file()}
