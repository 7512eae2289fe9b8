"""The key that clients of a lasting deployment must send.

It lies in a file that only its owner can read. It never stands on a command line (every user of a node sees those), in
the configuration (which is copied into the results), in a log or in a receipt.
"""

import contextlib
import os
import secrets
from pathlib import Path

from .. import files
from ..errors import BadInputError

KEY_FILE = "api_key"  # in results/<experiment>/serve


def fresh() -> str:
    """A new random key."""
    return secrets.token_urlsafe(32)


def read_or_make(configured: str | None, default: Path) -> tuple[str, Path]:
    """The key and its file.

    Args:
        configured: ``serve.api_key_file``; must exist.
        default: used without a configured file; made where it does not exist, and kept, so that clients go on working
            after a restart.

    Raises:
        BadInputError: missing, readable by others, or not one line of printable characters.
    """
    path = Path(configured) if configured else default
    if not configured:
        with contextlib.suppress(FileExistsError):
            make(path)
    try:
        mode = path.stat().st_mode
        key = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInputError(
            f"the API key {path} cannot be read: {error}",
            "write one: (umask 077; openssl rand -hex 32 > FILE), and set serve.api_key_file",
        ) from None
    if mode & 0o077:
        raise BadInputError(f"the API key {path} can be read by other users", f"chmod 600 {path}, and change the key")
    if not key or not key.isprintable() or " " in key:
        raise BadInputError(f"the API key {path} is not one word of printable characters")
    return key, path


def make(path: Path) -> None:
    """Write a new key that only its owner can read; raises FileExistsError where there is one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        raise FileExistsError(path)
    with files.atomic_open(path, opener=lambda name, flags: os.open(name, flags, 0o600)) as stream:
        stream.write(fresh() + "\n")
