"""What the check at start refuses is what Slurm would never start, and the other way round, on each kind of site.

Each table is judged twice: by the check, and by Slurm itself, to which the same job is submitted.
"""

import getpass
import json
import os
import shlex
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cluster_fixture import Cluster
from project_copy import copy_of

pytestmark = pytest.mark.cluster

# Slurm has not looked at them yet, or they wait for others of the table.
UNDECIDED = [("PENDING", reason) for reason in ("None", "Priority", "Resources", "BeginTime")]
PROBE = Path(__file__).with_name("site_probe.py")

# what is asked for → the key by which it is refused; None where it can start
EVERYWHERE = [
    ({}, None),
    ({"nodes": 3, "gres": "gpu:h100:8", "cpus_per_task": 16, "mem_mb": 200000}, None),
    ({"constraint": "h100", "extra": "--exclude=node1", "nodes": 2}, None),
    ({"partition": "short", "runtime": 10, "nodes": 2, "mem_mb": 64000, "cpus_per_task": 8}, None),
    ({"nodes": 4}, "nodes"),
    ({"cpus_per_task": 17}, "cpus_per_task"),
    ({"mem_mb": 200001}, "mem_mb"),
    ({"gres": "gpu:9"}, "gres"),
    ({"gres": "gpu:a100:1"}, "gres"),
    ({"constraint": "a100"}, "constraint"),
    ({"extra": "--exclude=node1", "nodes": 3}, "exclude"),
    ({"extra": "--exclude=node77"}, "exclude"),
    ({"extra": "--reservation=tomorrow"}, "reservation"),
    ({"extra": "--reservation=week", "nodes": 2}, None),
    ({"partition": "gone"}, "slurm_partition"),
    ({"partition": "closed"}, "slurm_partition"),
    ({"partition": "short", "runtime": 11}, "runtime"),
    ({"partition": "short", "nodes": 3}, "nodes"),
    ({"partition": "short", "mem_mb": 64001}, "mem_mb"),
    ({"partition": "short", "cpus_per_task": 9}, "cpus_per_task"),
    ({"partition": "wide", "nodes": 1}, "nodes"),
    ({"partition": "cpu", "runtime": 7 * 1440 + 1}, "runtime"),
]
STOCK = [({"partition": "short,train", "runtime": 11}, None)]  # one of them is enough
ACCOUNTING = [
    ({"partition": "short,train", "runtime": 11}, "runtime"),  # EnforcePartLimits=ALL
    ({"account": "narrow", "nodes": 2}, None),
    ({"qos": "short", "runtime": 10, "nodes": 2}, None),
    ({"account": "funded"}, "slurm_account"),
    ({"account": "nobody"}, "slurm_account"),
    ({"qos": "urgent"}, "qos"),
    ({"qos": "gone"}, "qos"),
    ({"partition": "funded"}, "slurm_account"),
    ({"partition": "urgent"}, "qos"),
    ({"qos": "short", "runtime": 11}, "runtime"),
    ({"qos": "short", "nodes": 3}, "nodes"),
    ({"account": "narrow", "nodes": 3}, "nodes"),
    ({"account": "project", "runtime": 1441}, "runtime"),
]
KINDS = {"--stock": STOCK, "--accounting": ACCOUNTING}


@pytest.fixture(scope="module", params=KINDS)
def site(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Cluster, str]]:
    if request.param == "--accounting" and not shutil.which("slurmdbd", path=f"{os.environ['PATH']}:/usr/sbin"):
        pytest.skip("slurmdbd is not installed: cluster/install --accounting")
    cluster = Cluster(tmp_path_factory.mktemp("site"), 3)
    cluster.up(request.param, timeout=300)
    try:
        # It begins later: a reservation that has begun keeps its nodes from all other jobs.
        reserve = "scontrol create reservation ReservationName=week StartTime=now+6days Duration=1-0 Nodes=node[1-2]"
        cluster.exec(*reserve.split(), f"Users={getpass.getuser()}")
        yield cluster, request.param
    finally:
        cluster.down()


def options(values: dict) -> list[str]:
    """The same request as words of sbatch."""
    named = {"nodes": "nodes", "cpus_per_task": "cpus-per-task", "mem_mb": "mem", "runtime": "time"}
    named |= {name: name for name in ("partition", "gres", "account", "qos", "constraint")}
    words = [f"--{option}={values[name]}" for name, option in named.items() if name in values]
    return [*words, "--ntasks-per-node=1", *values.get("extra", "").split()]


def outcomes(cluster: Cluster, rows: list[dict]) -> list[str]:
    """What Slurm makes of each row: it ``starts`` one day, or ``never``: sbatch refuses it, or it waits for good."""
    calls = "".join(
        f"sbatch --parsable --output=/dev/null {shlex.join(options(values))} --wrap true || echo refused\n"
        for values in rows
    )
    jobs = cluster.exec("bash", input=calls, timeout=300).stdout.split()
    assert len(jobs) == len(rows)
    deadline = time.monotonic() + 300
    while True:
        lines = cluster.exec("squeue", "--noheader", "--states=all", "--format=%i|%T|%r").stdout.split("\n")[:-1]
        states = {job: (state, reason) for job, state, reason in (line.strip().split("|") for line in lines)}
        open_ = [job for job in jobs if states.get(job, ("", "")) in UNDECIDED]
        if not open_:
            break
        assert time.monotonic() < deadline, {job: states[job] for job in open_}
        time.sleep(0.5)
    waiting = {job for job, (state, reason) in states.items() if state == "PENDING" and reason != "Reservation"}
    return ["never" if job == "refused" or job in waiting else "starts" for job in jobs]


def test_refused_at_start_is_exactly_what_slurm_never_starts(
    site: tuple[Cluster, str], project: Path, environment: Callable[[str], Path]
) -> None:
    cluster, kind = site
    table = EVERYWHERE + KINDS[kind]
    rows = [{"runtime": 5, "mem_mb": 1000} | values for values, _ in table]
    said = cluster.exec(
        *("env", f"PYTHONPATH={project}/workflow", str(environment("workflow")), str(PROBE)),
        input=json.dumps(rows),
        timeout=300,
    ).stdout
    refused = json.loads(said)
    assert dict(zip(map(str, rows), refused, strict=True)) == {
        str(row): [key] if key else [] for row, (_, key) in zip(rows, table, strict=True)
    }
    seen = outcomes(cluster, rows)
    wrong = {
        str(row): outcome
        for row, keys, outcome in zip(rows, refused, seen, strict=True)
        if outcome != ("never" if keys else "starts")
    }
    assert wrong == {}


def test_start_that_could_never_end_submits_nothing_and_names_each_key(
    site: tuple[Cluster, str], project: Path, environment: Callable[[str], Path], tmp_path: Path
) -> None:
    cluster, _ = site
    clone = copy_of(project, tmp_path)
    wrong = ["prepare_data:runtime=1-00:00:00", "prepare_data:slurm_partition=short", "prepare_model:constraint=a100"]
    words = ["--profile", "profiles/demo", "--configfile", "config/experiments/demo.yaml", "--set-resources", *wrong]
    snakemake = str(environment("workflow").parent / "snakemake")
    count = ["squeue", "--noheader", "--states=all", "--format=%i"]
    before = cluster.exec(*count).stdout
    done = cluster.exec(snakemake, *words, "--", "data", cwd=clone, check=False, timeout=300)
    assert done.returncode == 1
    assert "nothing was submitted" in done.stderr
    assert "profile, set-resources: prepare_data: runtime: 1 day, but partition short allows 10 minutes" in done.stderr
    assert "profile, set-resources: prepare_model: constraint: no node of partition cpu has the feature" in done.stderr
    assert cluster.exec(*count).stdout == before


def test_nodes_whose_names_only_slurm_knows_reach_each_other(
    tmp_path: Path, project: Path, environment: Callable[[str], Path]
) -> None:
    cluster = Cluster(tmp_path, 2)
    cluster.up("--host-names")
    try:
        assert cluster.exec("srun", "--nodelist=node2", "hostname").stdout == "host-node2\n"
        assert cluster.node("node1", "getent", "hosts", "node2", check=False).stdout == ""
        settings = {"all_reduce_backend": "sockets", "local_disk_gb": 0.1, "shared_memory_gb": 0.1}
        (tmp_path / "settings.json").write_text(json.dumps(settings))
        words = ["--settings", "settings.json", "--results", "r", "--receipt", "r/receipt.json", "--accelerator", "cpu"]
        program = [str(environment("workflow")), str(project / "workflow/scripts/preflight.py")]
        cluster.exec("srun", "--nodes=2", "--mem=2000", *program, *words, "--ranks-per-node", "1", timeout=300)
        assert json.loads((tmp_path / "r" / "receipt.json").read_text())["hosts"] == ["node1", "node2"]
    finally:
        cluster.down()
