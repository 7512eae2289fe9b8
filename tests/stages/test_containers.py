"""Training's script starts its programs in a container, which sees the mounts alone and has nothing of Slurm.

On the emulated cluster with cluster/pyxis, a stand-in for Pyxis' options that isolates the file system. 10 s.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster_fixture import Cluster

from deepseek_sft import containers
from deepseek_sft.slurm import sbatch

SLURM = ("squeue", "scontrol", "srun", "munge")


def bare_image(folder: Path) -> None:
    """A root without files: what it runs comes with mounts."""
    for name in ("usr", "etc"):
        (folder / name).mkdir(parents=True)
    for name in ("bin", "sbin", "lib", "lib64"):
        (folder / name).symlink_to(f"usr/{name}")
    (folder / "etc/environment").write_text("SETTING=of the image\nPYTHONPATH=/of/the/image\n")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes whose host names are not Slurm's names for them, which resolve nowhere."""
    running = Cluster(tmp_path_factory.mktemp("cluster"), 2)
    running.up("--host-names")
    try:
        yield running
    finally:
        running.down()


@pytest.fixture(scope="module")
def seen(project: Path, cluster) -> list[dict]:
    """What both nodes' programs have found, by rank."""
    folder = cluster.folder
    image, results, hidden = folder / "image", folder / "results", folder / "hidden"
    bare_image(image)
    hidden.mkdir()
    runs = results / "train/runs/dead"
    runs.mkdir(parents=True)
    ended = cluster.submit("--wait", wrap="true")
    holder = {"job_id": ended, "host": "node9", "pid": 1, "restarts": "0"}
    (runs / "lock.json").write_text(json.dumps(holder, indent=2))
    python = Path(sys.executable)
    shown = [*{str(project), str(results), sys.base_prefix, str(python.parent.parent.resolve())}]
    absent = [f"/dev/null:/usr/bin/{name}" for name in SLURM]
    probe = results / "python"
    probe.write_text(f"#!/bin/sh\nexec {python} {project}/tests/stages/container_probe.py\n")
    probe.chmod(0o755)
    step = {"srun": [f"--container-image={image}", f"--container-mounts={','.join(['/usr:/usr', *shown, *absent])}"]}
    variables = {"PROBE": str(results / "train"), "SETTING": "of the job", "HIDDEN": f"{hidden}:/etc/hosts:/run/munge"}
    context = {
        "project": str(project),
        "experiment": "contained",
        "results": str(results),
        "logs": str(folder / "logs"),
        "python": str(probe),
        "activate": f"export PATH={project}/cluster/pyxis:$PATH",
        "accelerator": "cpu",
        "environment": variables,
        "ranks_per_node": 2,
        "preflight": False,
        "srun": containers.srun_options(step, str(project), variables),
        "host_python": sys.executable,
        "contained": True,
    }
    job = sbatch.Allocation(nodes=2, mem_mb=500, runtime=5, partition="train")
    (folder / "train.sbatch").write_text(sbatch.render("train", job, context))
    (folder / "logs/train").mkdir(parents=True)
    done = cluster.exec("sbatch", "--wait", "--no-requeue", str(folder / "train.sbatch"), check=False)
    log = "\n".join(path.read_text() for path in (folder / "logs/train").iterdir())
    assert done.returncode == 0, done.stdout + done.stderr + log
    return [json.loads((results / f"train/{rank}.json").read_text()) for rank in (0, 1)]


def test_the_container_sees_what_is_mounted_and_nothing_else(seen, project, cluster):
    assert [one["hidden"] for one in seen] == [[], []]
    assert {one["directory"] for one in seen} == {str(project)}
    assert not (cluster.folder / "image/written-to-the-image").exists()


def test_nodes_find_each_other_though_neither_slurm_nor_their_names_are_known_inside(seen):
    assert [one["programs"] for one in seen] == [[], []]
    assert {tuple(one["hosts"]) for one in seen} == {("node1", "node2")}
    assert {one["main_host"] for one in seen} == {"10.77.0.101"}
    assert seen[0]["heard"] == "node2"


def test_the_lock_that_a_dead_job_left_is_taken_over_without_squeue(seen, cluster):
    assert "heard" in seen[0]  # within the lock
    assert not (cluster.folder / "results/train/runs/dead/lock.json").exists()


def test_a_variable_of_the_job_wins_over_the_images(seen):
    assert {one["setting"] for one in seen} == {"of the job"}
