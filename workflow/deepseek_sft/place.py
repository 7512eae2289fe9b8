"""Whether a run can work where it is: paths that the shell takes as they are, folders that this user may write."""

import getpass
import os
import re
from pathlib import Path

from .errors import BadInputError

# Rules put these paths into shell commands, sbatch scripts and Snakemake's patterns as they are.
PLAIN = re.compile(r"[\w./@%+=,:-]+")
WRITTEN = (".snakemake", ".snakemake/log", ".snakemake/metadata", ".snakemake/incomplete", ".snakemake/locks")


def check_results(results: str) -> None:
    """Raises BadInputError where the results' path holds a space or another character with a meaning of its own."""
    if PLAIN.fullmatch(results) and not results.startswith(("-", "~")):
        return
    odd = sorted({letter for letter in results if not PLAIN.fullmatch(letter)}) or [results[:1]]
    raise BadInputError(
        f"results: {results!r} holds {', '.join(map(repr, odd))}, which shells and Slurm take for something else",
        "use letters, digits and . _ - / in the path; a symbolic link with such a name will do",
    )


def check_folder(project: Path) -> None:
    """Raises BadInputError where Snakemake does not work in the project's folder, at which relative paths begin."""
    here = Path.cwd().resolve()
    if here != project.resolve():
        raise BadInputError(
            f"snakemake works in {here}, but the project lies in {project}",
            f"cd {project}, and leave --directory and --snakefile out; where nobody can write there, work in a clone",
        )


def check_writable(*folders: str) -> None:
    """Raises BadInputError for the first of Snakemake's folders and ``folders`` that this user may not write.

    Of a folder that does not exist yet, the nearest one above it counts.
    """
    for name in (*WRITTEN, *folders):
        path = Path(name)
        while not _there(path) and path != path.parent:
            path = path.parent
        if os.access(path, os.W_OK | os.X_OK):
            continue
        if os.statvfs(path).f_flag & os.ST_RDONLY:
            raise BadInputError(
                f"{path.resolve()} lies on a file system that is read-only here",
                "Snakemake's own state, logs and environments are written beside the code: work in a clone of your own "
                "(git clone FOLDER) on storage that every node may write; `results` and ENVS_CACHE may lie elsewhere",
            )
        raise BadInputError(
            f"{path.resolve()} belongs to {_owner(path)}, and {getpass.getuser()} may not write there",
            "work in a clone of your own; or share this one: a common group, everyone with `umask 002`, and once "
            "`chgrp -R GROUP . && chmod -R g+rwX . && find . -type d -exec chmod g+s {} +`",
        )


def _there(path: Path) -> bool:
    try:
        return path.exists()
    except PermissionError:
        return False  # what is above it says why


def _owner(path: Path) -> str:
    try:
        return path.owner()
    except (KeyError, OSError):
        return "another user"
