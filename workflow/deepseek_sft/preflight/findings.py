"""What one check found on one node."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Finding:
    """One check on one node.

    Attributes:
        check: a key of ``settings.preflight.CHECKS``.
        passed: None where the check did not apply.
        detail: what was found, one sentence without the node's name.
        value: the same in a few characters, for the table.
    """

    check: str
    passed: bool | None
    detail: str
    value: str = ""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)
