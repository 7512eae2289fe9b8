"""What the check at start refuses is what Slurm would never start, and the other way round, on each kind of site.

Each table is judged twice: by the check, and by Slurm itself, to which the same job is submitted.
"""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cluster_fixture import Cluster

pytestmark = pytest.mark.cluster

WAITING = ("Resources", "Priority", "None", "BeginTime", "Reservation")  # reasons of jobs that start one day
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
    ({"extra": "--reservation=week", "nodes": 3}, "reservation"),
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
    ({"account": "small", "nodes": 2}, None),
    ({"qos": "short", "runtime": 10, "nodes": 2}, None),
    ({"account": "funded"}, "slurm_account"),
    ({"account": "nobody"}, "slurm_account"),
    ({"qos": "urgent"}, "qos"),
    ({"qos": "gone"}, "qos"),
    ({"partition": "funded"}, "slurm_account"),
    ({"partition": "urgent"}, "qos"),
    ({"qos": "short", "runtime": 11}, "runtime"),
    ({"qos": "short", "nodes": 3}, "nodes"),
    ({"account": "small", "nodes": 3}, "nodes"),
    ({"account": "project", "runtime": 1441}, "runtime"),
]
KINDS = {"--stock": STOCK, "--accounting": ACCOUNTING}


@pytest.fixture(scope="module", params=KINDS)
def site(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Cluster, str]]:
    if request.param == "--accounting" and not (shutil.which("slurmdbd") or Path("/usr/sbin/slurmdbd").exists()):
        pytest.skip("slurmdbd is not installed: cluster/install --accounting")
    cluster = Cluster(tmp_path_factory.mktemp("site"), 3)
    cluster.up(request.param, timeout=300)
    try:
        reserve = "scontrol create reservation ReservationName=week StartTime=now Duration=7-0 Nodes=node[1-2] Flags=FLEX"
        cluster.exec(*reserve.split(), "Users=root" if Path("/root").owner() == Path.home().owner() else f"Users={Path.home().owner()}")
        yield cluster, request.param
    finally:
        cluster.down()


def outcomes(cluster: Cluster, rows: list[dict]) -> list[str]:
    """What Slurm makes of each row: ``refused``, ``never`` (pending for another reason than others' jobs), ``starts``."""
    jobs = []
    for values in rows:
        options = [f"--nodes={values.get('nodes', 1)}", f"--ntasks-per-node=1", f"--cpus-per-task={values.get('cpus_per_task', 1)}"]
        options += [f"--mem={values.get('mem_mb', 1000)}", f"--time={values.get('runtime', 5)}"]
        options += [f"--{name}={values[name]}" for name in ("partition", "gres", "account", "qos", "constraint") if name in values]
        options += values.get("extra", "").split()
        done = cluster.exec("sbatch", "--parsable", "--output=/dev/null", *options, "--wrap", "true", check=False)
        jobs.append(done.stdout.strip() if done.returncode == 0 else "")
        if values.get("account") == "small" and jobs[-1]:  # which takes one job at a time
            wait_until_settled(cluster, jobs[-1])
    return [wait_until_settled(cluster, job) if job else "refused" for job in jobs]


def wait_until_settled(cluster: Cluster, job: str) -> str:
    deadline = time.monotonic() + 120
    while True:
        state, reason = cluster.exec(
            "squeue", "--noheader", "--states=all", "--jobs", job, "--format=%T|%r"
        ).stdout.strip().split("|")
        if state != "PENDING":
            return "never" if state == "CANCELLED" else "starts"
        if reason not in WAITING:
            cluster.exec("scancel", job)
            return "never"
        assert time.monotonic() < deadline, f"job {job} waits: {reason}"
        time.sleep(0.2)


def test_refused_at_start_is_exactly_what_slurm_never_starts(
    site: tuple[Cluster, str], project: Path, environment: Callable[[str], Path]
) -> None:
    cluster, kind = site
    table = EVERYWHERE + KINDS[kind]
    rows = [{"runtime": 5, "mem_mb": 1000} | values for values, _ in table]
    python = str(environment("workflow"))
    said = cluster.exec(
        "env", f"PYTHONPATH={project}/workflow", python, str(PROBE), input=json.dumps(rows), timeout=300
    ).stdout
    refused = json.loads(said)["refused"]
    assert dict(zip(map(str, rows), refused, strict=True)) == {
        str(row): [key] if key else [] for row, (_, key) in zip(rows, table, strict=True)
    }
    seen = dict(zip(map(str, rows), outcomes(cluster, rows), strict=True))
    wrong = {row: seen[row] for row, keys in zip(map(str, rows), refused, strict=True) if (seen[row] == "starts") == bool(keys)}
    assert wrong == {}
