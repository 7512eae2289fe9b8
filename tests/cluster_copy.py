"""A copy of the project on an emulated cluster, in which Snakemake runs as its users run it."""

import os
import subprocess
from pathlib import Path

from cluster_fixture import Cluster
from project_copy import copy_of


class ClusterCopy:
    """The copy and its cluster.

    Args:
        project: the checkout under test.
        folder: existing folder that the nodes see.
        cluster: running.
    """

    def __init__(self, project: Path, folder: Path, cluster: Cluster):
        self.project, self.cluster = project, cluster
        self.clone = copy_of(project, folder)
        self.results, self.logs = self.clone / "results/demo", self.clone / "logs/demo"
        self.python = (project / ".envs/workflow").resolve() / "bin/python"

    def variables(self) -> dict[str, str]:
        """Environment of every command: environments are the checkout's, not built anew."""
        store = self.python.parents[2]
        return self.cluster.environment | {"ENVS_CACHE": os.environ.get("ENVS_CACHE", str(store))}

    def words(self, profile: str) -> list[str]:
        """Snakemake with the demo's experiment and the file ``overlay.yaml`` in the copy."""
        start = [str(self.python.parent / "snakemake"), "--configfile", "config/experiments/demo.yaml", "overlay.yaml"]
        return [*start, "--profile", profile]  # last: --configfile would take targets for files

    def on_login(self, *words: str, path: str | None = None) -> list[str]:
        """Command line of a command on the login node; of a Snakemake there, with quick polls."""
        variables = [f"PYTHONPATH={self.clone}/cluster/fastpoll", *([f"PATH={path}"] if path else [])]
        return self.cluster.command("exec", "env", *variables, *words)

    def background(self, command: list[str], log: Path) -> subprocess.Popen:
        """Start a command in the copy; its output goes to a file."""
        with open(log, "wb") as output:
            return subprocess.Popen(
                command,
                cwd=self.clone,
                env=self.variables(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
