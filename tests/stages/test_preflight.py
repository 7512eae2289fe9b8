"""Preflight on the emulated cluster: a bad node is named, whatever is wrong with it.

Faults are made in the node's own namespaces (mounts, routing, traffic control), so that the real checks see them.
"""

import contextlib
import json
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import cluster_fixture
import pytest
from cluster_fixture import Cluster

from deepseek_sft.slurm import nodes

cluster = cluster_fixture.cluster
CLUSTER_NODES = 5
pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can break a node of the emulated cluster"),
]

PLAN = {"host_memory_bytes": 2e9, "disk_bytes": 2e8, "checkpoint_bytes": 5e7, "rank_memory_bytes": 1e9}


class Job:
    """Preflight of an experiment, as its rule renders and runs it, on nodes of the cluster."""

    def __init__(self, cluster: Cluster, project: Path, python: Path, folder: Path):
        self.cluster, self.project, self.python, self.folder = cluster, project, python, folder
        self.results = folder / "results" / "broken"
        (self.results / "receipts").mkdir(parents=True)
        self.plan()

    def plan(self, **changes: float) -> None:
        """What the plan of this experiment needs."""
        content = {"schema": 1, "rule": "plan", "result": {}, "figures": PLAN | changes}
        (self.results / "receipts" / "plan.json").write_text(json.dumps(content))

    def run(self, *nodes: str, ranks: int = 1, **settings) -> subprocess.CompletedProcess:
        chosen = {"local_disk_gb": 0.1, "shared_memory_gb": 0.1, "all_reduce_backend": "sockets"} | settings
        words = ["--results", str(self.results), "--logs", str(self.folder / "logs"), "--accelerator", "cpu"]
        words += ["--python", str(self.python), "--output", str(self.results / "preflight")]
        words += ["--settings", json.dumps(chosen), "--operational", json.dumps({"ranks_per_node": ranks})]
        words += ["--nodes", str(len(nodes)), "--mem-mb", "4000"]
        render = [str(self.project / ".envs/workflow/bin/python"), "workflow/scripts/render_sbatch.py", "preflight"]
        subprocess.run([*render, *words], cwd=self.project, check=True)
        allocation = ["salloc", "--quiet", f"--nodelist={','.join(nodes)}", f"--nodes={len(nodes)}", "--mem=4000"]
        script = self.results / "preflight" / "preflight.sbatch"
        return self.cluster.exec(*allocation, "bash", str(script), check=False, timeout=300)

    @property
    def table(self) -> list[str]:
        return (self.results / "preflight" / "table.txt").read_text().splitlines()

    @property
    def receipt(self) -> Path:
        return self.results / "receipts" / "preflight.json"


@pytest.fixture
def job(cluster: Cluster, project: Path, environment: Callable[[str], Path]) -> Iterator[Job]:
    yield Job(cluster, project, environment("train"), cluster.folder / f"job{len(list(cluster.folder.iterdir()))}")


@contextlib.contextmanager
def broken(cluster: Cluster, node: str, command: str, repair: str) -> Iterator[None]:
    """A node with a fault that is taken away again."""
    cluster.node(node, "bash", "-c", command)
    try:
        yield
    finally:
        cluster.node(node, "bash", "-c", repair)


def test_healthy_nodes_pass_and_their_figures_are_in_receipt_and_table(job: Job) -> None:
    done = job.run("node1", "node2", "node3", "node4", all_reduce_backend="gloo", all_reduce_mb=4)
    assert done.returncode == 0, done.stderr
    figures = json.loads(job.receipt.read_text())["figures"]
    assert set(figures["table"]) == {"node1", "node2", "node3", "node4"}
    assert figures["all_reduce_gb_per_second"] > 0
    for check in (
        "host_memory",
        "disk",
        "software",
        "ports",
        "clock",
        "cpus",
        "gemm",
        "memory_bandwidth",
        "all_reduce",
    ):
        assert figures["checks"][check]["passed"] is True
    assert [line.split()[0] for line in job.table] == ["node", "node1", "node2", "node3", "node4"]


def test_four_faults_on_four_nodes_are_each_named_with_the_nodes_to_exclude(job: Job, project: Path) -> None:
    cluster, scratch = job.cluster, job.cluster.folder
    meminfo = scratch / "meminfo"
    meminfo.write_text("MemTotal: 1000000 kB\nMemAvailable: 300000 kB\nSwapFree: 0 kB\n")
    (metadata,) = (project / ".envs/train").resolve().glob("lib/python3*/site-packages/deepspeed-*.dist-info/METADATA")
    version = next(line.split()[1] for line in metadata.read_text().splitlines() if line.startswith("Version:"))
    other = scratch / "METADATA"
    other.write_text(metadata.read_text().replace(f"Version: {version}", "Version: 0.0.7", 1))
    next_job = int(cluster.submit("--hold", wrap="true")) + 1
    cluster.exec("scancel", str(next_job - 1))
    port = nodes.FIRST_PORT + next_job % nodes.PORTS
    rule = f"sport {port} ipproto tcp blackhole"  # answers from this port go nowhere, as behind a firewall
    with (
        broken(cluster, "node1", f"mount --bind {meminfo} /proc/meminfo", "umount /proc/meminfo"),
        broken(cluster, "node2", "mount -o remount,size=2m /tmp", "mount -o remount,size=50% /tmp"),
        broken(cluster, "node3", f"ip rule add {rule}", f"ip rule del {rule}"),
        broken(cluster, "node4", f"mount --bind {other} {metadata}", f"umount {metadata}"),
    ):
        done = job.run("node1", "node2", "node3", "node4", "node5")
    assert done.returncode == 3, done.stderr
    said = [line.split("  - ")[1] for line in done.stderr.splitlines() if "  - " in line]
    assert sorted(line.split(": ")[:2] for line in said) == [
        ["node1", "host_memory"],
        ["node2", "local_disk"],
        ["node3", "ports"],
        ["node4", "software"],
    ]
    assert f"deepspeed 0.0.7, {version} on the others" in done.stderr
    assert "--exclude=" in done.stderr
    excluded = done.stderr.split("--exclude=")[1].split()[0]
    assert sorted(excluded.split(",")) == ["node1", "node2", "node3", "node4"]
    assert not job.receipt.exists()


def test_node_whose_program_does_not_start_is_named_as_silent(job: Job) -> None:
    python = job.python.resolve()
    with broken(job.cluster, "node2", f"mount --bind /bin/false {python}", f"umount {python}"):
        done = job.run("node1", "node2", "node3", timeout_s=5)
    assert done.returncode == 3, done.stderr
    assert "  - node2: report: no word" in done.stderr
    assert "--exclude=node2 " in done.stderr


def test_slow_node_is_named_by_the_bandwidth_floor(job: Job) -> None:
    limit = "tc qdisc add dev eth0 root tbf rate 80mbit burst 64kb latency 400ms"
    with broken(job.cluster, "node2", limit, "tc qdisc del dev eth0 root"):
        done = job.run("node1", "node2", "node3", "node4", all_reduce_mb=4, all_reduce_min_gb_per_second=0.015)
    assert done.returncode == 3, done.stderr
    assert "node2" in done.stderr.split("--exclude=")[1].split()[0]
    assert "wanted are 0.015 GB/s" in done.stderr


def test_check_that_is_switched_off_by_name_finds_nothing(job: Job) -> None:
    with broken(job.cluster, "node2", "mount -o remount,size=2m /tmp", "mount -o remount,size=50% /tmp"):
        done = job.run("node1", "node2", skip=["local_disk", "all_reduce"])
    assert done.returncode == 0, done.stderr
    assert json.loads(job.receipt.read_text())["figures"]["skipped"]["local_disk"] == "switched off"


def test_disk_that_is_too_small_for_the_plan_is_nobody_s_fault(job: Job) -> None:
    job.plan(disk_bytes=1e18)
    done = job.run("node1", "node2")
    assert done.returncode == 3, done.stderr
    assert "  - all nodes: disk:" in done.stderr
    assert "--exclude" not in done.stderr


def test_slow_device_is_named_against_the_median_with_figures(job: Job, project: Path) -> None:
    source = project / "workflow/deepseek_sft/preflight/device_speed.py"
    slow = job.cluster.folder / "device_speed.py"
    product = "    torch.mm(left, right, out=out)\n"
    assert product in source.read_text()
    slow.write_text(source.read_text().replace(product, f"{product}    time.sleep(0.05)\n"))
    with broken(job.cluster, "node2", f"mount --bind {slow} {source}", f"umount {source}"):
        done = job.run(
            "node1", "node2", ranks=2, all_reduce_backend="gloo", all_reduce_mb=1, slow_percent=45, skip=["code"]
        )
    assert done.returncode == 3, done.stderr
    lines = [line for line in done.stderr.splitlines() if "  - node2: gemm" in line]
    for device, line in enumerate(lines):
        assert re.search(rf"device {device}: \S+ TFLOP/s, 9\d % below the median \S+ of 4", line)
    assert len(lines) == 2
    assert "in node" in job.table[0], "the sum inside a node, over NVLink on GPUs"


def test_the_best_of_more_nodes_train_and_the_others_are_given_back(job: Job, project: Path) -> None:
    """Up to the start of train.py, which refuses this base; what it would train on is what the job has then."""
    folders = {name: job.folder / name for name in ("base", "tokens")}
    for rule, name in (("prepare_model", "base"), ("tokenize_data", "tokens")):
        folders[name].mkdir()
        content = {"schema": 1, "rule": rule, "inputs": {}, "settings": {}, "figures": {}}
        content["result"] = {name: str(folders[name])}
        (job.results / "receipts" / f"{rule}.json").write_text(json.dumps(content))
    plan = {"schema": 1, "rule": "refine_plan", "result": {}, "figures": PLAN}
    (job.results / "receipts" / "refine_plan.json").write_text(json.dumps(plan))
    (job.results / "train").mkdir()
    slow = {"node4": {"text": "rank 3 was slow"}}
    (job.results / "train" / "slow_nodes.json").write_text(json.dumps(slow))
    words = ["--results", str(job.results), "--logs", str(job.folder / "logs"), "--accelerator", "cpu"]
    words += ["--python", str(job.python), "--output", str(job.results / "train"), "--nodes", "5", "--mem-mb", "4000"]
    words += ["--settings", "{}", "--operational", json.dumps({"ranks_per_node": 1, "spare_nodes": 2})]
    chosen = {"local_disk_gb": 0.1, "shared_memory_gb": 0.1, "all_reduce_backend": "sockets", "all_reduce_mb": 1}
    words += ["--preflight", json.dumps(chosen)]
    render = [str(project / ".envs/workflow/bin/python"), "workflow/scripts/render_sbatch.py", "train"]
    subprocess.run([*render, *words], cwd=project, check=True)
    script, small = job.results / "train" / "train.sbatch", "mount -o remount,size=2m /tmp"
    with broken(job.cluster, "node2", small, "mount -o remount,size=50% /tmp"):
        done = job.cluster.exec(
            "sbatch", "--wait", "--parsable", "--partition=cpu", str(script), check=False, timeout=200
        )
    number = done.stdout.split()[0]
    log = (job.folder / "logs" / "train" / f"{number}-1.log").read_text()
    assert "node2 does not train: local_disk: " in log
    assert "node4 does not train: rank 3 was slow" in log
    assert "training on node1,node3,node5; the other nodes are given back" in log
    assert "NodeList=node[1,3,5]" in job.cluster.exec("scontrol", "show", "job", number).stdout
    assert done.returncode == 2, log
