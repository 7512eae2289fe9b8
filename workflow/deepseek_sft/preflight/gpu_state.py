"""GPUs and InfiniBand ports of one node, as nvidia-smi and the kernel show them."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

from ..formatting import byte_size
from .findings import Finding
from .settings import Needs

MIB = 1 << 20
FIELDS = (
    "index",
    "uuid",
    "name",
    "driver_version",
    "memory.total",
    "memory.used",
    "ecc.errors.uncorrected.volatile.total",
    "remapped_rows.pending",
    "remapped_rows.failure",
)
MOST_USED = 1024 * MIB  # an idle H100 shows some hundred MiB


def query(*arguments: str) -> list[list[str]]:
    """Rows of an nvidia-smi query.

    Raises:
        OSError: nvidia-smi failed or does not answer; the text says how.
    """
    command = ["nvidia-smi", *arguments, "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except subprocess.TimeoutExpired:
        raise OSError("nvidia-smi does not answer within 60 s: the driver hangs") from None
    if done.returncode:
        text = (done.stdout + done.stderr).strip().splitlines()
        raise OSError(f"nvidia-smi ended with {done.returncode}: {text[-1] if text else 'no output'}")
    return [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines() if line.strip()]


def gpus(accelerator: str, wanted: int, needs: Needs, visible: str | None) -> tuple[Finding, dict[str, Any]]:
    """GPUs of this node, and what must be equal on all nodes.

    Args:
        wanted: ranks of the node.
        visible: value of CUDA_VISIBLE_DEVICES: indexes or UUIDs of the job's own; None for all.
    """
    if accelerator == "cpu":
        return Finding("gpus", None, "training runs on CPU"), {}
    if shutil.which("nvidia-smi") is None:
        return Finding("gpus", False, "nvidia-smi is not installed, so there is no driver", "none"), {}
    try:
        rows = [dict(zip(FIELDS, row, strict=False)) for row in query(f"--query-gpu={','.join(FIELDS)}")]
        foreign = query("--query-compute-apps=gpu_uuid,pid,process_name")
    except OSError as error:
        return Finding("gpus", False, str(error), "unusable"), {}
    rows = _own(rows, visible)
    same = {
        "GPU model": ", ".join(sorted({row["name"] for row in rows})),
        "driver": ", ".join(sorted({row["driver_version"] for row in rows})),
    }
    problems = [] if len(rows) == wanted else [f"{len(rows)} GPUs, {wanted} are wanted"]
    for row in rows:
        problems += [f"GPU {row['index']}: {text}" for text in _troubles(row, needs)]
    ours = {row["uuid"] for row in rows}
    problems += [f"process {pid} ({name}) runs on it already" for uuid, pid, name in foreign if uuid in ours]
    detail = "; ".join(problems) or f"{len(rows)} × {same['GPU model']}, driver {same['driver']}"
    return Finding("gpus", not problems, detail, f"{len(rows)} GPUs"), same


def _own(rows: list[dict[str, str]], visible: str | None) -> list[dict[str, str]]:
    """The job's own GPUs; in a control group nvidia-smi lists only these, numbered from 0, so that indexes may miss."""
    if not visible:
        return rows
    names = visible.split(",")
    chosen = [row for row in rows if row["index"] in names or row["uuid"] in names]
    return chosen if len(chosen) == len(names) else rows


def _troubles(row: dict[str, str], needs: Needs) -> list[str]:
    found = []
    if not _number(row["ecc.errors.uncorrected.volatile.total"]) <= 0:
        found.append(f"{row['ecc.errors.uncorrected.volatile.total']} uncorrected ECC errors since the last reset")
    for field, text in (
        ("remapped_rows.pending", "memory rows wait to be remapped: reset the GPU"),
        ("remapped_rows.failure", "remapping memory rows failed: replace the GPU"),
    ):
        if row[field].lower() in ("yes", "1"):
            found.append(text)
    if not _number(row["memory.used"]) * MIB <= MOST_USED:
        found.append(f"{row['memory.used']} MiB are in use already")
    memory = _number(row["memory.total"]) * MIB
    if needs.rank is not None and not memory >= needs.rank:
        found.append(f"has {byte_size(memory)}, the plan needs {byte_size(needs.rank)}")
    return found


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:  # "[N/A]" where a GPU does not count it
        return 0.0


def infiniband(root: Path = Path("/sys/class/infiniband")) -> tuple[Finding, dict[str, Any]]:
    """Active InfiniBand (or RoCE) ports, and their number to compare with the other nodes'."""
    states = {
        f"{file.parts[-4]}/{file.parts[-2]}": file.read_text().strip() for file in sorted(root.glob("*/ports/*/state"))
    }
    if not states:
        return Finding("infiniband", None, "no InfiniBand devices", "none"), {"active ports": 0}
    active = sorted(name for name, state in states.items() if "ACTIVE" in state)
    down = sorted(states.keys() - active)
    detail = f"{len(active)} of {len(states)} ports active" + (f", not {', '.join(down)}" if down else "")
    return Finding("infiniband", True, detail, f"{len(active)} active"), {"active ports": len(active)}
