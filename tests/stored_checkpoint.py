"""The inputs and settings of the stored checkpoint, and ways to damage a checkpoint as disks and people do."""

import io
import json
import shutil
import struct
import zipfile
from pathlib import Path
from typing import Any

from training_inputs import make_inputs

from deepseek_sft.convert import tiny_model

STORED = Path(__file__).resolve().parent / "fixtures" / "checkpoint_format_1"
EXPECTED = json.loads((STORED / "expected.json").read_text())
STEP, RANKS, ROWS, VOCABULARY = 3, 2, 24, 128
SETTINGS: dict[str, Any] = {
    "dtype": "bfloat16",
    "max_steps": 6,
    "weight_decay": 0.1,
    "balance_bias_speed": 0.01,
    "save_every_steps": 3,
    "experts_per_shard": 2,
    "learning_rate": 1e-2,
}
SHAPE = tiny_model.TinyShape(
    hidden_size=32,
    layers=2,
    heads=2,
    routed_experts=4,
    groups=2,
    groups_used=1,
    experts_per_token=1,
    moe_intermediate_size=16,
    intermediate_size=32,
    q_lora_rank=16,
    kv_lora_rank=32,
    qk_rope_head_dim=16,
    qk_nope_head_dim=16,
    v_head_dim=16,
    vocab_size=VOCABULARY,
)


def write_inputs(folder: Path) -> Path:
    """Base, tokens and their receipts, as the stored run had them."""
    return make_inputs(folder, ROWS, SHAPE, longest=24)


def place(work: Path) -> Path:
    """Copy the stored checkpoint into the run folder in which ``work``'s trainer looks for it; returns that."""
    run = work / "train" / "runs" / EXPECTED["run_id"]
    shutil.copytree(STORED / f"step_{STEP}", run / f"step_{STEP}")
    return run


def optimizer(folder: Path, rank: int) -> Path:
    """A rank's optimizer file."""
    return next(folder.glob(f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"))


def model(folder: Path, rank: int) -> Path:
    """A rank's model file."""
    return folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt"


def _places(file: Path) -> list[tuple[int, int]]:
    """(first byte, bytes) of the records that hold tensors, largest last."""
    content, found = file.read_bytes(), []
    with zipfile.ZipFile(file) as archive:
        for entry in archive.infolist():
            if "/data/" in entry.filename and entry.file_size:
                name, extra = struct.unpack("<HH", content[entry.header_offset + 26 : entry.header_offset + 30])
                found.append((entry.header_offset + 30 + name + extra, entry.file_size))
    return sorted(found, key=lambda part: part[1])


def flip(file: Path, record: int = -1, where: float = 0.5) -> None:
    """Turn one bit of a tensor, ``record`` counted from the smallest."""
    start, size = _places(file)[record]
    content = bytearray(file.read_bytes())
    content[start + int((size - 1) * where)] ^= 0x04
    file.write_bytes(content)


def lose_page(file: Path) -> None:
    """A page of zeros inside the largest tensor."""
    start, size = _places(file)[-1]
    content = bytearray(file.read_bytes())
    content[start + size // 4 : start + size // 4 + 4096] = bytes(4096)
    file.write_bytes(content)


def exchange(first: Path, second: Path) -> None:
    """Two files take each other's names."""
    aside = first.with_name("aside")
    first.rename(aside)
    second.rename(first)
    aside.rename(second)


def plant_gadget(file: Path, canary: Path) -> None:
    """Have the file's pickle run a command that makes ``canary``; the marker learns the new size."""
    made = io.BytesIO()
    with zipfile.ZipFile(file) as source, zipfile.ZipFile(made, "w") as target:
        for entry in source.infolist():
            content = source.read(entry)
            if entry.filename.endswith("data.pkl"):
                command = f"touch {canary}".encode()
                call = b"cos\nsystem\nX" + struct.pack("<I", len(command)) + command + b"\x85R0"
                content = content[:2] + call + content[2:]
            target.writestr(entry.filename, content)
    file.write_bytes(made.getvalue())
    change_marker(file.parent, lambda marker: marker["files"].update({file.name: file.stat().st_size}))


def change_marker(folder: Path, change: Any) -> None:
    """Apply ``change`` to the content of ``committed.json``."""
    path = folder / "committed.json"
    marker = json.loads(path.read_text())
    changed = change(marker)
    path.write_text(json.dumps(marker if changed is None else changed))
