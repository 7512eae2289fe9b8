"""The published shape, 32 nodes of 8 ranks, on the emulated cluster: preflight and the launch part of train.sbatch.

What is started is all real up to torchrun: Slurm's 32 nodes, train.sbatch as it is rendered, preflight.py, train.py. In
place of torchrun and 256 ranks stands tests/stand_ins; GPUs are Slurm's only, and nvidia-smi is a stand-in too.
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
PLAN = {"host_memory_bytes": 1e9, "disk_bytes": 2e8, "checkpoint_bytes": 5e7, "rank_memory_bytes": 7e10}
PREFLIGHT = {
    "local_disk_gb": 0.01,
    "shared_memory_gb": 0.01,
    "all_reduce_backend": "sockets",
    "all_reduce_mb": 4,
    "skip": ["locked_memory"],
}


def prepare(folder: Path, project: Path, python: Path) -> Path:
    """Receipts of everything before training, and train.sbatch as rule train renders it."""
    results = folder / "results" / "wide"
    (folder / "made").mkdir()
    make_inputs(folder / "made", rows=600)
    receipts = results / "receipts"
    receipts.mkdir(parents=True)
    for name in ("prepare_model", "tokenize_data"):
        (folder / "made" / f"{name}.json").rename(receipts / f"{name}.json")
    plan = {"schema": 1, "rule": "refine_plan", "result": {}, "figures": PLAN}
    (receipts / "refine_plan.json").write_text(json.dumps(plan))
    words = ["--results", str(results), "--logs", str(folder / "logs"), "--accelerator", "cuda"]
    words += ["--python", str(python), "--output", str(results / "train"), "--settings", json.dumps(SETTINGS)]
    words += ["--preflight", json.dumps(PREFLIGHT), "--nodes", str(NODES), "--mem-mb", "2000"]
    words += ["--gres", f"gpu:{RANKS}", "--cpus-per-task", "8"]
    render = [str(project / ".envs/workflow/bin/python"), "workflow/scripts/render_sbatch.py", "train"]
    subprocess.run([*render, *words], cwd=project, check=True)
    return results


def test_32_nodes_are_checked_and_every_one_of_256_ranks_starts_once(
    cluster: Cluster, project: Path, environment: Callable[[str], Path]
) -> None:
    results = prepare(cluster.folder, project, environment("workflow"))
    programs = cluster.folder / "bin"
    programs.mkdir()
    (programs / "nvidia-smi").write_text(NVIDIA_SMI)
    (programs / "nvidia-smi").chmod(0o755)
    cluster.environment["PATH"] = f"{programs}:{os.environ['PATH']}"
    cluster.environment["PYTHONPATH"] = str(project / "tests" / "stand_ins")
    allocation = ["salloc", "--quiet", f"--nodes={NODES}", f"--gres=gpu:{RANKS}", "--mem=2000", "--cpus-per-task=8"]
    done = cluster.exec(*allocation, "bash", str(results / "train" / "train.sbatch"), check=False, timeout=500)
    # 4: stopped and saved, as the stand-in says; 143 where srun ends the last nodes because the first has left already.
    assert done.returncode in (4, 143), done.stdout[-3000:] + done.stderr[-3000:]

    hosts = {f"node{number + 1}" for number in range(NODES)}
    figures = json.loads((results / "receipts" / "train_preflight.json").read_text())["figures"]
    assert set(figures["table"]) == hosts
    for check in ("host_memory", "gpus", "model", "code", "software", "ports", "clock", "shared_files", "all_reduce"):
        assert figures["checks"][check]["passed"] is True, check

    (folder,) = (results / "train" / "runs").iterdir()
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
