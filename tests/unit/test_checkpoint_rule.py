"""The rules of conversion as Snakemake would run them on a cluster: what they are given, and what runs them again."""

import re
import subprocess

import pytest

GOLDEN = "tests/golden/convert.slurm.txt"
NODES = ["--set-resources", "convert_checkpoint:nodes=4", "verify_model:cpus_per_task=32", "--"]


@pytest.fixture(scope="module")
def commands(project, environment):
    """Rule → its shell command for four nodes, one option a line, as a dry run with the Slurm profile prints it."""
    results = "results/none"  # never made: a dry run
    settings = ["--profile", "profiles/slurm", "--config", f"results={results}", "convert={dtype: fp8, mtp: copy}"]
    snakemake = environment("workflow").parent / "snakemake"
    done = subprocess.run(
        [snakemake, "--dry-run", "--printshellcmds", "--nolock", *settings, *NODES, "convert"],
        cwd=project, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.findall(r"Shell command: (.*(convert_checkpoint|verify_model)\.py .*)", done.stdout + done.stderr)
    return {
        rule: re.sub(r"[^\s(]+/bin/python", "python", re.sub(" +", " ", command))
        .replace(results, "results")
        .replace(" --", "\n    --")
        for command, rule in found
    }


def test_profile_scatters_conversion_over_its_nodes_and_verification_expects_the_same_format(commands, project):
    """A wanted change: write the printed text to the golden file and read the difference."""
    text = "".join(f"{command}\n" for command in commands.values())
    print(text)
    assert set(commands) == {"convert_checkpoint", "verify_model"}
    assert text == (project / GOLDEN).read_text()
