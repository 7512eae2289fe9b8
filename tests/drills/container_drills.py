"""The demo's training in a container, by a stand-in for Pyxis and by podman: `make containers`, as root, 15 minutes.

The image (.cache/images/train, made by cluster/image) holds Debian's Python and the environment `train` alone, built
from its lock and a folder of wheels: nothing of Slurm. Each training is killed once after it has saved, so that its
lock is a dead start's; its losses must be those of the same training on the nodes themselves, to the last bit.
"""

import json
import resource
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from cluster_copy import ClusterCopy
from cluster_fixture import Cluster

FIGURES = Path("containers.jsonl")
DEADLINE_S = 900  # only a hang reaches it
STEPS, SAVED = 20, 5
# podman as root gives limits that this machine's root may not raise; crun refuses two versions of cgroups at once; each
# node keeps podman's files on its own /tmp, as nodes do.
STORAGE = '[storage]\ndriver = "overlay"\ngraphroot = "/tmp/podman"\nrunroot = "/tmp/podman-run"\n'
AS_REAL_NODES = (
    "mkdir -p /dev/mqueue && mount -t mqueue mqueue /dev/mqueue; ! mountpoint -q /sys/fs/cgroup/unified || umount "
    "/sys/fs/cgroup/unified"
)


class Site(ClusterCopy):
    """The demo, whose training runs where ``envs.train`` says."""

    def train(self, name: str, own: dict | None, kill: bool) -> dict[int, float]:
        """Train, killed once after a save if asked; returns the loss of each step."""
        self.results = self.clone / name / "demo"
        values = {"experiment": "demo", "results": name, "train": {"max_steps": STEPS, "save_every_steps": SAVED}}
        (self.clone / "overlay.yaml").write_text(yaml.safe_dump(values | ({"envs": {"train": own}} if own else {})))
        log = self.clone / f"{name}.log"
        target = f"{name}/demo/receipts/train.json"
        begin = time.monotonic()
        process = self.background(self.on_login(*self.words("profiles/demo"), "--", target), log)
        if kill:
            while not list(self.results.glob("train/runs/*/step_*/committed.json")):
                assert process.poll() is None and time.monotonic() - begin < DEADLINE_S, log.read_text()[-4000:]
                time.sleep(0.5)
            for node in ("node1", "node2"):
                self.cluster.node(node, "pkill", "-KILL", "-f", "scripts/train.py", check=False)
            assert list(self.results.glob("train/runs/*/lock.json"))  # nobody was left to remove it
        code = process.wait(DEADLINE_S)
        text = log.read_text() + "".join(path.read_text() for path in (self.clone / "logs/demo/train").glob("*.log"))
        assert code == 0, text[-8000:]
        (metrics,) = self.results.glob("train/runs/*/metrics.jsonl")
        rows = [json.loads(line) for line in metrics.read_text().splitlines()]
        with open(FIGURES, "a", encoding="utf-8") as stream:
            stream.write(json.dumps({"training": name, "seconds": round(time.monotonic() - begin)}) + "\n")
        return {row["step"]: row["loss"] for row in rows if "loss" in row}


@pytest.fixture(scope="module")
def site(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("containers")
    with Cluster(folder, 2) as cluster:
        yield Site(project, folder, cluster)


@pytest.fixture(scope="module")
def image(project: Path) -> Path:
    made = subprocess.run([project / "cluster/image", "train"], check=False)
    assert made.returncode == 0, "cluster/image train failed; what it printed is above"
    return project / ".cache/images/train"


@pytest.fixture(scope="module")
def losses(site: Site) -> dict[int, float]:
    """Of the training on the nodes themselves."""
    return site.train("plain", None, kill=False)


def test_pyxis(site: Site, image: Path, losses: dict[int, float]) -> None:
    own = {
        "python": "/opt/env/bin/python",
        "srun": [f"--container-image={image}", f"--container-mounts={site.clone}"],
        "activate": f"export PATH={site.clone}/cluster/pyxis:$PATH",
    }
    assert site.train("pyxis", own, kill=True) == losses
    assert sorted(losses) == list(range(1, STEPS + 1))


def test_podman(site: Site, image: Path, losses: dict[int, float]) -> None:
    (site.clone / "storage.conf").write_text(STORAGE)
    for node in ("node1", "node2"):
        site.cluster.node(node, "bash", "-c", AS_REAL_NODES)
    limits = {name: resource.getrlimit(getattr(resource, f"RLIMIT_{name.upper()}"))[1] for name in ("nofile", "nproc")}
    own = {
        "python": "/opt/env/bin/python",
        "container": {
            "runtime": "podman",
            "image": str(image),
            "mounts": [str(site.clone)],
            "options": [f"--ulimit={name}={limit}:{limit}" for name, limit in limits.items()],
        },
        "activate": f"export CONTAINERS_STORAGE_CONF={site.clone}/storage.conf",
    }
    assert site.train("podman", own, kill=True) == losses
