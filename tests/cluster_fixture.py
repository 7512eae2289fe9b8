"""The emulated cluster for tests: ``Cluster`` drives ``cluster/vcluster``, fixture ``cluster`` starts one per module.

A test module takes the fixture with ``cluster = cluster_fixture.cluster`` and may set ``CLUSTER_NODES`` (default 3).
"""

import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

VCLUSTER = Path(__file__).resolve().parents[1] / "cluster" / "vcluster"


class Cluster:
    """One emulated cluster.

    Args:
        folder: an existing folder that all nodes see; the cluster's state lies in ``folder/cluster``.
        nodes: number of compute nodes, node1 …
        environment: added to the environment of every command.
        prefix: put before every command line, such as one that changes the user.
    """

    def __init__(
        self, folder: Path, nodes: int, environment: Mapping[str, str] | None = None, prefix: Sequence[str] = ()
    ):
        self.folder = folder
        self.nodes = nodes
        self.state = folder / "cluster"
        self.environment = {**os.environ, "VCLUSTER_DIR": str(self.state), **(environment or {})}
        self.prefix = list(prefix)

    def command(self, *arguments: str) -> list[str]:
        """The command line, for tests that start it themselves (with ``environment``)."""
        return [*self.prefix, str(VCLUSTER), *arguments]

    def run(self, *arguments: str, check: bool = True, timeout: float = 120, **options) -> subprocess.CompletedProcess:
        """Run one vcluster command in ``folder``; with ``check``, another exit code than 0 fails the test."""
        options = {"cwd": self.folder, "stdin": subprocess.DEVNULL, **options}
        if "input" in options:
            del options["stdin"]
        done = subprocess.run(
            self.command(*arguments), env=self.environment, capture_output=True, text=True, timeout=timeout, **options
        )
        if check and done.returncode != 0:
            pytest.fail(f"vcluster {' '.join(arguments)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
        return done

    def up(self, *options: str, **how) -> subprocess.CompletedProcess:
        return self.run("up", "--nodes", str(self.nodes), "--share", str(self.folder), *options, **how)

    def down(self, **how) -> subprocess.CompletedProcess:
        return self.run("down", **how)

    def exec(self, *command: str, **how) -> subprocess.CompletedProcess:
        """Run a command on the login node."""
        return self.run("exec", *command, **how)

    def node(self, node: str, *command: str, **how) -> subprocess.CompletedProcess:
        """Run a command on a compute node, outside of Slurm."""
        return self.run("node", node, *command, **how)

    def kill_node(self, node: str) -> None:
        self.run("kill-node", node)

    def start_node(self, node: str) -> None:
        self.run("start-node", node)

    def submit(self, *options: str, wrap: str = "sleep 1000") -> str:
        """Submit a job whose output is thrown away; returns its id."""
        return self.exec("sbatch", "--parsable", "--output=/dev/null", *options, "--wrap", wrap).stdout.strip()

    def job_state(self, job: str) -> str:
        return self.exec("squeue", "--noheader", "--states=all", "--jobs", job, "--format=%T").stdout.strip()

    def node_state(self, node: str) -> str:
        # Of all nodes: asked for a single one (sinfo -n), slurmctld may answer with its state of some time ago.
        lines = self.exec("sinfo", "--noheader", "--Node", "--partition=cpu", "--format=%N %T").stdout.splitlines()
        return dict(line.split() for line in lines)[node]

    def __enter__(self) -> "Cluster":
        self.up()
        return self

    def __exit__(self, *_: object) -> None:
        self.down()


@pytest.fixture(scope="module")
def cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A running cluster, the same one for all tests of a module."""
    with Cluster(tmp_path_factory.mktemp("cluster"), getattr(request.module, "CLUSTER_NODES", 3)) as running:
        yield running
