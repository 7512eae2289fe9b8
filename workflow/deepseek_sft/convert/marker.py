"""``committed.json``: what training writes into a checkpoint folder once every rank's files are complete.

Format: ``{"format": 1, "run_id", "step", "world_size", "zero_stage": 3, "parameter_prefix": "llm.",
"experts": {"layout": "w1w3_w2" | "release", "experts_per_shard": N}, "files": {name: bytes}, "dtype"}``; a run's last
one also has ``trained_losses`` (``data/loss_rows.py``), which the smoke test compares the served model with.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import json_files
from ..data import loss_rows
from ..engines import MARKER, MARKER_FORMAT
from ..errors import BadInputError

EXPERT_LAYOUTS = ("w1w3_w2", "release")  # fused shards of several experts, or one module per expert as released


@dataclass(frozen=True)
class Marker:
    """The fields of the file that reading needs."""

    run_id: str
    step: int
    world_size: int
    parameter_prefix: str
    expert_layout: str
    experts_per_shard: int
    files: dict[str, int]
    trained_losses: dict[str, Any] | None = None

    def check(self, folder: Path, world_size: int) -> None:
        """Compare with what lies in the folder.

        Raises:
            BadInputError: naming the file that is missing or has another size.
        """
        if self.world_size != world_size:
            raise BadInputError(
                f"{folder / MARKER} speaks of {self.world_size} ranks, the files of {world_size}",
                "use an older checkpoint",
            )
        for name, size in self.files.items():
            path = folder / name
            found = path.stat().st_size if path.is_file() else None
            if found != size:
                state = "is missing" if found is None else f"has {found} bytes"
                raise BadInputError(
                    f"{path} {state}; it had {size} bytes when the checkpoint was committed",
                    "restore this file, or use an older checkpoint",
                )


def read_marker(folder: Path) -> Marker | None:
    """The marker of a checkpoint folder, or None where training left none (stock xtuner).

    Raises:
        BadInputError: it cannot be read, or is of another format.
    """
    path = folder / MARKER
    try:
        content: Any = json_files.load(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise BadInputError(f"{path} cannot be read: {error}", "use an older checkpoint") from None
    try:
        if content["format"] != MARKER_FORMAT:
            raise BadInputError(f"{path} has format {content['format']!r}, this version reads {MARKER_FORMAT}")
        experts = content["experts"]
        marker = Marker(
            run_id=str(content["run_id"]),
            step=int(content["step"]),
            world_size=int(content["world_size"]),
            parameter_prefix=str(content["parameter_prefix"]),
            expert_layout=str(experts["layout"]),
            experts_per_shard=int(experts["experts_per_shard"]),
            files={str(name): int(size) for name, size in content["files"].items()},
            trained_losses=content.get(loss_rows.KEY),
        )
        if content["zero_stage"] != 3 or marker.expert_layout not in EXPERT_LAYOUTS:
            raise BadInputError(f"{path}: ZeRO stage {content['zero_stage']}, experts {marker.expert_layout!r}")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadInputError(f"{path} is malformed: {error!r}", "use an older checkpoint") from None
    return marker
