"""Experts spread over ranks in every pair of settings: first loss and every gradient beside a plain loop's.

    .envs/dev/bin/python tests/expert_spreads.py [--folder DIR]

At most 20 runs (``covering``), and some of them for 20 steps. Prints one line a run; exit code 1 where one is off.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(PROJECT / "workflow"), str(PROJECT / "tests"), str(PROJECT / "tests/stages")]

from covering import Combination, covering  # noqa: E402
from test_training_numbers import GLOBAL_BATCH, make_inputs  # noqa: E402
from training_inputs import probe_variables  # noqa: E402

EXPERTS = 8
OFFLOADS: dict[str, dict[str, str]] = {
    "nothing": {"strategy": "zero3"},
    **{what: {"strategy": "zero3_offload", "offload": what} for what in ("both", "optimizer", "parameters")},
}
FACTORS = {
    "world": (1, 2, 4, 8),
    "experts_over": (1, 2, 4, 8),
    "sequence": (1, 2, 4, 8),
    "accumulation": (1, 4),
    "packed": (True, False),
    "offload": tuple(OFFLOADS),
    "chunks": (False, True),
    "stages": (1, 2),
}
LOSS = GRADIENT = 1e-5
STEPS, LATER = 20, 1e-4


def allowed(one: Combination) -> bool:
    """Whether these can stand together; rows in chunks and two stages are of experts that are spread.

    One rank sends nothing to others: of its offloads two are enough.
    """
    spread = one["experts_over"] > 1
    return (
        one["world"] % one["experts_over"] == 0
        and one["world"] % one["sequence"] == 0
        and GLOBAL_BATCH * one["sequence"] % (one["world"] * one["accumulation"]) == 0
        and (spread or not one["chunks"])
        and (spread or one["stages"] == 1)
        and (one["world"] > 1 or one["offload"] in ("nothing", "both"))
    )


def settings(one: Combination) -> dict[str, Any]:
    """As ``training_engine.engine`` takes them."""
    size = one["experts_over"]
    found: dict[str, Any] = {
        "expert_parallel_size": size,
        "experts_per_shard": min(EXPERTS // size, EXPERTS if one["stages"] == 2 else 4),
        "sequence_parallel_size": one["sequence"],
        "gradient_accumulation_steps": one["accumulation"],
        "micro_batch_size": GLOBAL_BATCH * one["sequence"] // one["world"] // one["accumulation"],
        "max_grad_norm": 1e6,
    }
    if one["chunks"]:
        found["exchange_rows"] = 23
    if one["stages"] == 2:  # a group of experts lies over two nodes
        found["nodes"] = one["world"] // (size // 2)
    return found | OFFLOADS[one["offload"]]


def name_of(one: Combination) -> str:
    return " ".join(f"{key} {value}" for key, value in one.items())


def run(folder: Path, packed: bool, chosen: dict[str, Combination]) -> bool:
    """Train the combinations of packed rows, or of others; whether all are right."""
    folder.mkdir(parents=True)
    make_inputs(folder, packed)
    cases: dict[int, dict[str, Any]] = {}
    for number, (name, one) in enumerate(chosen.items()):
        case = {"settings": settings(one), "steps": STEPS if number % 7 == 0 else 1, "moments": True}
        cases.setdefault(one["world"], {})[name] = case
    (folder / "cases.json").write_text(json.dumps(cases))
    python = PROJECT / ".envs/train/bin/python"
    probe = [python, PROJECT / "tests/stages/training_spread_probe.py", folder, folder / "cases.json", folder]
    done = subprocess.run(
        list(map(str, probe)),
        env=probe_variables(PROJECT, python),
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(done.stderr[-6000:])
    wanted, right = json.loads((folder / "reference-float32.json").read_text())["losses"], True
    for name, one in chosen.items():
        found = json.loads((folder / f"{name}.json").read_text())
        off = [abs(loss / other - 1) for loss, other in zip(found["losses"], wanted, strict=False)]
        gradient = max(found["moments"].values())
        fine = off[0] <= LOSS and gradient < GRADIENT and max(off) <= LATER
        right = right and fine
        steps = f", {len(off)} steps {max(off):.1e}" if len(off) > 1 else ""
        print(
            f"{'' if fine else 'OFF  '}{name_of(one)}: loss {off[0]:.1e}, gradients {gradient:.1e}{steps}", flush=True
        )
    return right


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where inputs and results go; removed at the end")
    options = parser.parse_args()
    found = {f"run-{number}": one for number, one in enumerate(covering(FACTORS, allowed))}
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        right = [
            run(Path(scratch) / f"packed-{packed}", packed, {n: o for n, o in found.items() if o["packed"] == packed})
            for packed in (True, False)
        ]
    print(f"{len(found)} runs, {'all right' if all(right) else 'some are off'}")
    return 0 if all(right) else 1


if __name__ == "__main__":
    sys.exit(main())
