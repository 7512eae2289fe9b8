"""Where a node keeps what serving compiles, from one start to the next: on its own disk, for its user alone."""

import os
import stat
from pathlib import Path

from ..cli import say
from .node_addresses import node_name

ROOT = Path("/tmp")  # where training's copies lie as well (envs.local.folder)


def folder(otherwise: Path, root: Path = ROOT) -> Path:
    """This user's folder of caches, made where it is not there.

    Compiled code is run as it is found, so a folder that others own or may write to is not used: everybody may make one
    of that name in ``/tmp``.

    Args:
        otherwise: folder of this start alone, which is used then.
    """
    above = root / f"deepseek-sft-{os.getuid()}"
    try:
        for each in (above, above / "serve"):
            each.mkdir(mode=0o700, exist_ok=True)
            found = each.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
                say(f"{node_name()}: {each} is not ours alone to write: nothing that is compiled is kept")
                return otherwise
    except OSError as error:
        say(f"{node_name()}: {error.filename}: {error.strerror}: nothing that is compiled is kept")
        return otherwise
    return above / "serve"
