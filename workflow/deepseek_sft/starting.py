"""What a start is refused for before any job is submitted: a name that was not given, Slurm that does not answer, files
that the nodes do not see.
"""

import os
import shutil
import socket
import subprocess
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from .command_line import read_yaml
from .errors import NODE_LOCAL, BadInputError

ANSWER_S = 30  # seconds that Slurm's controller may take


def unnamed(config: dict[str, Any], configfiles: Sequence[str], given: Sequence[str] | None) -> BadInputError | None:
    """An error where the last configuration file names no experiment, and so would go on in another one's results.

    Args:
        config: the merged configuration.
        configfiles: configuration files in their order, the project's own first.
        given: what --config says, ``key=value``.
    """
    here = Path.cwd()
    files = [str(Path(path).relative_to(here) if Path(path).is_relative_to(here) else path) for path in configfiles]
    if len(files) < 2 or any(word.startswith("experiment=") for word in given or ()):
        return None
    if "experiment" in read_yaml(files[-1]):
        return None
    name = config.get("experiment")
    owner = next((path for path in reversed(files[:-1]) if "experiment" in read_yaml(path)), files[0])
    return BadInputError(
        f"{files[-1]} names no experiment: it would go on as `{name}`, in the results of {owner}",
        f"write `experiment: {Path(files[-1]).stem}` into it; or, if it is meant to change `{name}`, give "
        f"`experiment: {name}`",
    )


def check_slurm_answers(rules: Collection[str]) -> None:
    """Ask Slurm once, where jobs would be submitted.

    Raises:
        BadInputError: its programs are not here, or its controller does not answer.
    """
    where = (
        "start snakemake where `sinfo` lists your partitions (a login node); on the emulated cluster: "
        "cluster/run --nodes 4 -- snakemake …; without Slurm: --profile profiles/local"
    )
    stages = f"the profile submits {', '.join(sorted(rules))} to Slurm, but"
    host = socket.gethostname()
    for program in ("sbatch", "sinfo"):
        if shutil.which(program) is None:
            raise BadInputError(f"{stages} {host} has no {program}", where)
    try:
        answer = subprocess.run(
            ["sinfo", "--noheader", "--format=%P"], capture_output=True, text=True, timeout=ANSWER_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise BadInputError(f"{stages} its controller did not answer {host} within {ANSWER_S} s", where) from None
    except OSError as error:
        raise BadInputError(f"{stages} sinfo cannot be started on {host}: {error}", where) from None
    if answer.returncode:
        said = (answer.stderr.strip().splitlines() or [f"sinfo ended with {answer.returncode}"])[-1]
        raise BadInputError(f"{stages} it does not answer on {host}: {said}", where)


def check_shared(paths: Sequence[tuple[str, str]]) -> None:
    """Refuse paths in folders that every machine has its own of.

    Args:
        paths: configuration key and path, of what nodes read or write.

    Raises:
        BadInputError: naming each key.
    """
    here = Path.cwd().resolve()
    found = [(key, path, folder) for key, path in paths if (folder := node_local(Path(path), here))]
    if found:
        lines = "".join(f"\n  - {key}: {path} lies in {folder}" for key, path, folder in found)
        raise BadInputError(
            f"nodes would not see what is here on {socket.gethostname()}: each machine has its own{lines}",
            f"put it on storage that every node sees, such as {here}",
        )


def node_local(path: Path, project: Path) -> str | None:
    """The folder of the machine's own that a path lies in; None where every node may see it.

    The project itself is on shared storage by definition; a file system that is mounted below such a folder may be
    shared, and the emulated cluster shares what it was told to.
    """
    place = Path(os.path.realpath(path))
    if place.is_relative_to(project) or any(place.is_relative_to(folder) for folder in _emulated_shares(project)):
        return None
    root = next((root for root in NODE_LOCAL if place.is_relative_to(root) and place != Path(root)), None)
    if root is None:
        return None
    between = [place, *place.parents][: len(place.parts) - len(Path(root).parts)]
    return None if any(folder.is_mount() for folder in between) else root


def _emulated_shares(project: Path) -> list[Path]:
    """What the nodes of the emulated cluster see besides the project; none where there is no such cluster."""
    state = Path(os.environ.get("VCLUSTER_DIR") or project / ".cluster", "state")
    try:
        if (state / "shape").read_text().startswith("flat"):  # nodes that share this very host
            return [Path("/")]
        return [Path(line) for line in (state / "shares").read_text().splitlines() if line]
    except OSError:
        return []
