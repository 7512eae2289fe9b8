"""What `render` shows is what would be submitted: golden files, and the plugin's own call of sbatch. About 20 s."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from project_copy import copy_of

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
FAKE_SBATCH = """#!/bin/bash
for word in "$@"; do printf '%s\\0' "$word"; done > {calls}
exit 1
"""


class Site:
    """A clone on a machine whose sbatch only notes how it is called; sinfo knows nothing, other programs fail."""

    def __init__(self, project: Path, folder: Path):
        self.clone, self.environment = copy_of(project, folder), (project / ".envs/workflow").resolve()
        programs = folder / "programs"
        programs.mkdir()
        self.calls = folder / "calls"
        (programs / "sbatch").write_text(FAKE_SBATCH.format(calls=self.calls))
        (programs / "sbatch").chmod(0o755)
        for name in ("sinfo", "sacctmgr", "sacct", "squeue", "scontrol", "sshare", "scancel"):
            answer = {"sacctmgr": "echo project-7", "sinfo": "exit 0"}.get(name, "exit 1")
            (programs / name).write_text(f"#!/bin/sh\n{answer}\n")
            (programs / name).chmod(0o755)
        self.variables = os.environ | {"PATH": f"{programs}:{os.environ['PATH']}", "PYTHONHASHSEED": "0"}
        profile = self.clone / "profiles/slurm/config.yaml"
        text = profile.read_text()
        assert "# slurm_account: my-project" in text
        profile.write_text(text.replace("# slurm_account: my-project", "slurm_account: project-7"))
        (self.clone / "overlay.yaml").write_text(
            "experiment: deepseek-r1-sft\ndata: {sources: [resources/demo/chats.jsonl]}\n"
        )

    def snakemake(self, *arguments: str) -> subprocess.CompletedProcess:
        command = [str(self.environment / "bin/snakemake"), "--profile", "profiles/slurm", *arguments]
        command[1:1] = ["--configfile", "overlay.yaml"]
        return subprocess.run(
            command, cwd=self.clone, env=self.variables, capture_output=True, text=True, check=False, timeout=300
        )

    def plain(self, text: str) -> str:
        """Text without what differs from machine to machine and from start to start."""
        text = text.replace(str(self.clone), "PROJECT").replace(str(self.environment), "ENVIRONMENT")
        text = re.sub(r"'[^']*snakemake-runtime-cache/[^']*'", "SOURCE-CACHE", text)
        return re.sub(r"'?(TEMPORARY-FOLDER|PROJECT/\.snakemake/tmp\.[^/' ]*)'?", "TEMPORARY-FOLDER", text)


@pytest.fixture(scope="module")
def site(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Site:
    site = Site(project, tmp_path_factory.mktemp("render"))
    done = site.snakemake("--", "render")
    assert done.returncode == 0, done.stdout + done.stderr
    return site


def shown(site: Site, rule: str) -> str:
    return site.plain((site.clone / f"results/deepseek-r1-sft/render/{rule}/{rule}.submission.txt").read_text())


@pytest.mark.parametrize("rule", ["convert_checkpoint", "train"])
def test_preview_of_a_submission_equals_its_golden_file(site: Site, rule: str) -> None:
    call, *_ = shown(site, rule).split("\n---- it runs")
    assert call == (GOLDEN / f"{rule}.submission.txt").read_text()


def test_every_rule_with_a_job_of_its_own_is_previewed(site: Site) -> None:
    files = (site.clone / "results/deepseek-r1-sft/render").glob("*/*.submission.txt")
    jobs = {"prepare_data", "tokenize_data", "prepare_model", "preflight", "train"}
    assert {file.parent.name for file in files} == jobs | {"convert_checkpoint", "verify_model", "smoke_test"}


def test_preview_is_what_the_plugin_hands_to_sbatch(site: Site) -> None:
    done = site.snakemake("--", "results/deepseek-r1-sft/receipts/prepare_data.json")
    assert site.calls.exists(), done.stdout + done.stderr
    called = [site.plain(word) for word in site.calls.read_text().split("\0")[:-1]]

    call, inner, own = (
        part.split("\n", 1)[1].replace("\\\n", "") for part in shown(site, "prepare_data").split("---- ")[1:]
    )
    assert "workflow/scripts/prepare_data.py --source resources/demo/chats.jsonl" in own
    expected = shlex.split(call)[1:]
    called[called.index("--job-name") + 1] = "RUN-ID"
    assert called[:-1] == expected[:-1]
    assert shlex.split(called[-1].removeprefix("--wrap=")) == shlex.split(inner)
