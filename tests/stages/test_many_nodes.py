"""The published shape, 32 nodes of 8 ranks, on the emulated cluster: preflight and the launch part of train.sbatch.

All is real up to torchrun: Slurm's 32 nodes, train.sbatch as it is rendered, preflight.py, train.py. In place of
torchrun and 256 ranks stands tests/stand_ins. GPUs are Slurm's only: nvidia-smi is a stand-in, and preflight's sum over
all ranks is the ring of sockets that CPU nodes use, not NCCL. About 20 s with other work on two cores.
"""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import cluster_fixture
import pytest
from cluster_fixture import Cluster
from training_helpers import SETTINGS
from training_inputs import make_inputs

cluster = cluster_fixture.cluster
CLUSTER_NODES = 32
NODES, RANKS = 32, 8
pytestmark = pytest.mark.cluster

NVIDIA_SMI = """#!/bin/bash
case $1 in *query-gpu*)
    for i in 0 1 2 3 4 5 6 7; do echo "$i, GPU-$(hostname)-$i, NVIDIA H100 80GB HBM3, 580.65, 81559, 4, 0, No, No"; done
esac
"""
LATE = """#!/bin/bash
# an interpreter that starts slowly on one node, as from a file system under load
[ "$SLURM_PROCID" != 2 ] || sleep 20
case "$*" in *train.py*) touch {stop} ;; esac # a stop file that is there before ends the job before its nodes begin
exec {python} "$@"
"""
PLAN = {"host_memory_bytes": 1e9, "disk_bytes": 2e8, "checkpoint_bytes": 5e7, "rank_memory_bytes": 7e10}
PREFLIGHT = {
    "local_disk_gb": 0.01,
    "shared_memory_gb": 0.01,
    "all_reduce_backend": "sockets",
    "all_reduce_mb": 4,
    "skip": ["locked_memory"],
}


class Job:
    """Receipts of everything before training, and train.sbatch as rule train renders it."""

    def __init__(self, cluster: Cluster, project: Path, python: Path, name: str, nodes: int, *more: str):
        self.cluster, self.nodes = cluster, nodes
        self.results = cluster.folder / "results" / name
        self.logs = cluster.folder / "logs" / name
        made = cluster.folder / name
        made.mkdir()
        make_inputs(made, rows=600)
        (self.results / "receipts").mkdir(parents=True)
        for rule in ("prepare_model", "tokenize_data"):
            (made / f"{rule}.json").rename(self.results / "receipts" / f"{rule}.json")
        plan = {"schema": 1, "rule": "refine_plan", "result": {}, "figures": PLAN}
        (self.results / "receipts" / "refine_plan.json").write_text(json.dumps(plan))
        words = ["--results", str(self.results), "--logs", str(self.logs), "--accelerator", "cuda"]
        words += ["--python", str(python), "--output", str(self.results / "train"), "--settings", json.dumps(SETTINGS)]
        words += ["--nodes", str(nodes), "--mem-mb", "2000", "--gres", f"gpu:{RANKS}", "--cpus-per-task", "8", *more]
        render = [str(project / ".envs/workflow/bin/python"), "workflow/scripts/render_sbatch.py", "train"]
        subprocess.run([*render, *words], cwd=project, check=True)

    def run(self) -> subprocess.CompletedProcess:
        """Run the script in an allocation; what it says goes to the only log."""
        allocation = ["salloc", "--quiet", f"--nodes={self.nodes}", f"--gres=gpu:{RANKS}", "--mem=2000"]
        script = self.results / "train" / "train.sbatch"
        return self.cluster.exec(*allocation, "--cpus-per-task=8", "bash", str(script), check=False, timeout=500)

    @property
    def log(self) -> str:
        return "".join(path.read_text() for path in self.logs.glob("train/*.log"))


def test_32_nodes_are_checked_and_every_one_of_256_ranks_starts_once(
    cluster: Cluster, project: Path, environment: Callable[[str], Path]
) -> None:
    programs = cluster.folder / "bin"
    programs.mkdir()
    (programs / "nvidia-smi").write_text(NVIDIA_SMI)
    (programs / "nvidia-smi").chmod(0o755)
    cluster.environment["PATH"] = f"{programs}:{os.environ['PATH']}"
    cluster.environment["PYTHONPATH"] = str(project / "tests" / "stand_ins")
    job = Job(cluster, project, environment("workflow"), "wide", NODES, "--preflight", json.dumps(PREFLIGHT))
    done = job.run()
    # Stopped and saved, as the stand-in says. An allocation of salloc cannot be requeued; that must not hide the code.
    assert done.returncode == 4, done.stderr + job.log

    hosts = {f"node{number + 1}" for number in range(NODES)}
    figures = json.loads((job.results / "receipts" / "train_preflight.json").read_text())["figures"]
    assert set(figures["table"]) == hosts
    for check in ("host_memory", "gpus", "model", "code", "software", "ports", "clock", "shared_files", "all_reduce"):
        assert figures["checks"][check]["passed"] is True, check

    (folder,) = (job.results / "train" / "runs").iterdir()
    lines = [line for file in (folder / "ranks").glob("*.txt") for line in file.read_text().splitlines()]
    reports = [(line.split()[0], dict(word.split("=") for word in line.split()[1:])) for line in lines]
    assert sorted(int(report["RANK"]) for _, report in reports) == list(range(NODES * RANKS))
    assert {host for host, _ in reports} == hosts
    places = {(report["WORLD_SIZE"], report["LOCAL_WORLD_SIZE"], report["MASTER_ADDR"]) for _, report in reports}
    assert places == {("256", "8", "node1")}
    assert len({report["MASTER_PORT"] for _, report in reports}) == 1
    of_node = {host: sorted(int(r["LOCAL_RANK"]) for h, r in reports if h == host) for host in hosts}
    assert set(map(tuple, of_node.values())) == {tuple(range(RANKS))}
    assert sorted(int(r["RANK"]) for host, r in reports if host == "node1") == list(range(RANKS))


def test_node_that_is_still_starting_does_not_hide_how_the_others_ended(
    cluster: Cluster, project: Path, environment: Callable[[str], Path]
) -> None:
    late = cluster.folder / "late_python"
    job = Job(cluster, project, late, "late", 4)
    late.write_text(LATE.format(python=environment("workflow"), stop=job.results / "train" / "stop"))
    late.chmod(0o755)
    done = job.run()
    assert done.returncode == 4, done.stderr + job.log
    assert "the stop file" in job.log
    assert "node3: task 2: Terminated" in job.log or "node3: task 2: Exited with exit code 143" in job.log, job.log
