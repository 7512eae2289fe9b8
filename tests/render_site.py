"""A clone of the project on a login node whose Slurm programs are stand-ins: what is rendered and submitted there."""

import os
import re
import subprocess
from pathlib import Path

from project_copy import copy_of

FAKE_SBATCH = """#!/bin/bash
for word in "$@"; do printf '%s\\0' "$word"; done > {calls}
exit 1
"""


class Site:
    """A clone on a machine whose sbatch only notes how it is called; sinfo knows nothing, other programs fail."""

    def __init__(self, project: Path, folder: Path):
        self.clone, self.environment = copy_of(project, folder), (project / ".envs/workflow").resolve()
        programs = folder / "programs"
        programs.mkdir()
        self.calls = folder / "calls"
        (programs / "sbatch").write_text(FAKE_SBATCH.format(calls=self.calls))
        (programs / "sbatch").chmod(0o755)
        for name in ("sinfo", "sacctmgr", "sacct", "squeue", "scontrol", "sshare", "scancel"):
            answer = {"sacctmgr": "echo project-7", "sinfo": "exit 0"}.get(name, "exit 1")
            (programs / name).write_text(f"#!/bin/sh\n{answer}\n")
            (programs / name).chmod(0o755)
        self.variables = os.environ | {"PATH": f"{programs}:{os.environ['PATH']}", "PYTHONHASHSEED": "0"}

    def snakemake(
        self, *arguments: str, profile: str = "slurm", configfile: str = "overlay.yaml"
    ) -> subprocess.CompletedProcess:
        command = [str(self.environment / "bin/snakemake"), "--configfile", configfile]
        command += ["--profile", f"profiles/{profile}", *arguments]
        return subprocess.run(
            command, cwd=self.clone, env=self.variables, capture_output=True, text=True, check=False, timeout=300
        )

    def plain(self, text: str) -> str:
        """Text without what differs from machine to machine and from start to start."""
        text = text.replace(str(self.clone), "PROJECT").replace(str(self.environment), "ENVIRONMENT")
        text = re.sub(r"'[^']*snakemake-runtime-cache/[^']*'", "SOURCE-CACHE", text)
        return text.replace("'PROJECT'", "PROJECT")
