"""Whether a failed job is tried again: never where the attempt left word that it cannot help."""

from collections.abc import Callable
from pathlib import Path

from .record import MARKER


class Retries(int):
    """Number of retries of a rule, as Snakemake's scheduler compares it once an attempt has failed.

    It asks ``retries > attempts so far - 1``; the answer is no as soon as the rule's marker is there.
    """

    folder: Path
    say: Callable[[str], None]

    def __new__(cls, number: int, folder: Path, say: Callable[[str], None]) -> "Retries":
        self = super().__new__(cls, number)
        self.folder, self.say = folder, say
        return self

    def __gt__(self, other: int) -> bool:
        if not super().__gt__(other):
            return False
        reason = why_not(self.folder)
        if reason:
            self.say(f"{self.folder.name} is not tried again: {reason}")
        return reason is None


def why_not(folder: Path) -> str | None:
    """What the marker in a rule's folder of logs says; None without one."""
    try:
        list(folder.iterdir())  # a network file system looks anew at a folder that is listed
        return (folder / MARKER).read_text(encoding="utf-8").strip()
    except OSError:
        return None
