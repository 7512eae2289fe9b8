"""A copy of the project for tests that run the workflow as its users do, so that nothing run here before can help."""

import shutil
import subprocess
from pathlib import Path


def copy_of(project: Path, folder: Path) -> Path:
    """A copy of the files git knows or would add: what a clone of the next commit holds."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=project,
        capture_output=True,
        text=True,
        check=True,
    )
    clone = folder / "clone"
    for name in filter(None, listed.stdout.split("\0")):
        source, target = project / name, clone / name
        if source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)
    return clone
