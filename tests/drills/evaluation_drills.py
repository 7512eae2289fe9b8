"""The demo and an early step of it, evaluated on 100 questions without Slurm: `make evaluation`.

Real training, vLLM on CPU and lm-eval. Figures go to docs/evaluation.md.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from project_copy import copy_of

pytestmark = [pytest.mark.stage("train"), pytest.mark.stage("serve-cpu"), pytest.mark.stage("evaluate")]
DEADLINE_S = 3600  # only a hang reaches it
CONFIG = ["config/experiments/demo.yaml", "config/evaluation/demo.yaml"]
EARLY = {"experiment": "demo-early", "train": {"max_steps": 10}}


class Site:
    """A clone in which both experiments run."""

    def __init__(self, project: Path, folder: Path):
        self.clone = copy_of(project, folder)
        (self.clone / ".envs").symlink_to(project / ".envs")
        (self.clone / "early.yaml").write_text(yaml.safe_dump(EARLY))

    def run(self, *config: str, targets: tuple[str, ...] = (), more: tuple[str, ...] = ()) -> tuple[int, str]:
        command = [".envs/workflow/bin/snakemake", *targets, "--profile", "profiles/local", *more]
        command += ["--configfile", *CONFIG, *config]
        variables = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        done = subprocess.run(
            command, cwd=self.clone, env=variables, capture_output=True, text=True, timeout=DEADLINE_S, check=False
        )
        print(done.stdout[-3000:], done.stderr[-3000:])
        return done.returncode, done.stdout + done.stderr

    def read(self, place: str) -> dict[str, Any]:
        return json.loads((self.clone / "results" / place).read_text())["figures"]

    def served(self, experiment: str) -> int:
        """How often a model was loaded."""
        return len(list((self.clone / "results" / experiment).glob("**/job-*")))


@pytest.fixture(scope="module")
def site(project, tmp_path_factory) -> Site:
    return Site(project, tmp_path_factory.mktemp("evaluation"))


@pytest.fixture(scope="module")
def tuned(site) -> tuple[int, str]:
    return site.run()


@pytest.fixture(scope="module")
def early(site, tuned) -> tuple[int, str]:
    return site.run("early.yaml", targets=("evaluate",))  # alone: the smoke test would fail first


def test_the_base_is_near_chance_and_the_tuned_model_above_its_gate(site, tuned):
    code, said = tuned
    figures = site.read("demo-evaluated/receipts/evaluate.json")["tasks"]["kinds"]
    print(json.dumps(figures))
    assert code == 0, said[-3000:]
    assert figures["items"] == 100 and figures["base"]["mean"] <= 0.05
    assert figures["score"]["mean"] >= figures["min"]


def test_model_and_base_are_loaded_once_each(site, tuned):
    assert site.served("demo-evaluated") == 2


def test_another_gate_is_judged_without_serving_and_fails_with_a_sentence(site, tuned):
    gate = 'evaluate={"tasks": {"kinds": {"min": 1.01}}}'
    code, said = site.run(targets=("evaluate",), more=("--config", gate))
    assert code and "kinds.min" in said and "is below 1.01" in said
    assert site.served("demo-evaluated") == 2


def test_a_model_of_an_early_step_fails_the_same_gate(site, early):
    code, said = early
    figures = site.read("demo-early/failed/evaluate.json")
    print(json.dumps(figures))
    assert code and "kinds.min" in said
    assert not figures["checks"]["kinds.min"]["passed"]
    assert not (site.clone / "results/demo-early/receipts/evaluate.json").exists()
    assert not (site.clone / "results/demo-early/receipts/smoke_test.json").exists()


def test_the_base_is_not_served_again_for_another_experiment(site, early):
    assert site.served("demo-early") == 1
