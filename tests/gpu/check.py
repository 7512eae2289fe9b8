"""What one NVIDIA GPU can prove of this project, as one table and one JSON file.

    python tests/gpu/check.py                            on a machine with a GPU and torch 2.11 or newer
    python tests/gpu/check.py --device cpu --small       the same code on a CPU, small: tests the harness alone

Each check runs in a process of its own with a limit; one that fails or hangs does not end the others. Needs beside
torch the small packages of tests/gpu/requirements.txt. Exit code 1 where a check failed.
"""

import argparse
import dataclasses
import importlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1] / "workflow"), str(HERE.parent), str(HERE)]

# name → module, seconds that it may take, what it shows
CHECKS = {
    "products": ("products", 90, "grouped products against the loop"),
    "attention": ("kernels", 90, "attention by kernel, error and milliseconds"),
    "layer": ("layer", 90, "one MoE layer of full size against the plan's memory"),
    "loss": ("output_layer", 60, "the output layer and its loss against the plan's memory"),
    "engine": ("engine", 240, "a DeepSpeed run of one rank: pinned offload, save, resume, repeatability"),
    "ranks": ("fake_ranks", 240, "256 faked ranks with real launches: host time, gathers, waits"),
    "tools": ("tools", 60, "nvidia-smi, NVML, the flight recorder"),
}


@dataclasses.dataclass(frozen=True)
class Place:
    """Where checks run.

    Attributes:
        device: ``cuda`` or ``cpu``.
        small: sizes that a CPU does in seconds.
        work: folder for what a check writes.
    """

    device: str
    small: bool
    work: Path

    def sizes(self, full: Any, small: Any) -> Any:
        return small if self.small else full


@dataclasses.dataclass(frozen=True)
class Row:
    """One result.

    Attributes:
        passed: None where nothing was judged.
        figures: numbers and words, JSON-serialisable.
    """

    name: str
    passed: bool | None
    figures: dict[str, Any]

    def line(self) -> str:
        mark = {True: "passed", False: "FAILED", None: "-"}[self.passed]
        return f"{mark:7} {self.name:44} " + "  ".join(f"{key} {shown(value)}" for key, value in self.figures.items())


def shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1e-2 else f"{value:,.2f}"
    return str(value)


def run_one(name: str, place: Place) -> list[Row]:
    """Rows of a check, in this process."""
    return importlib.import_module(CHECKS[name][0]).rows(place)


def run_apart(name: str, place: Place) -> list[Row]:
    """Rows of a check in a process of its own; its failure is a row."""
    answer = place.work / f"{name}.json"
    command = [sys.executable, str(HERE / "check.py"), "--one", name, "--answer", str(answer)]
    command += ["--device", place.device, *(["--small"] if place.small else [])]
    started = time.monotonic()
    log = place.work / f"{name}.log"
    with open(log, "w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream, start_new_session=True)
        try:
            code: Any = process.wait(CHECKS[name][1] * (4 if place.device == "cpu" else 1))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()
            code = "no end"
    seconds = round(time.monotonic() - started, 1)
    if code == 0:
        return [Row(**row) for row in json.loads(answer.read_text())] + [
            Row(f"{name}: whole check", True, {"s": seconds})
        ]
    last = (log.read_text(errors="replace").strip().splitlines() or ["no output"])[-1]
    return [Row(name, False, {"exit": code, "s": seconds, "said": last[:300]})]


def machine(device: str) -> dict[str, Any]:
    """What the figures are figures of."""
    import torch

    found = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    if device == "cuda":
        index = torch.cuda.current_device()
        found |= {
            "gpu": torch.cuda.get_device_name(index),
            "capability": list(torch.cuda.get_device_capability(index)),
            "cudnn": torch.backends.cudnn.version(),
        }
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--device", choices=("auto", "cuda", "cpu"), default="auto", help="auto: a GPU, which must be there"
    )
    parser.add_argument("--small", action="store_true", help="sizes for a CPU")
    parser.add_argument("--only", nargs="+", choices=CHECKS, default=list(CHECKS), help="some of the checks")
    parser.add_argument("--output", type=Path, default=Path("results/gpu-check.json"), help="JSON file to write")
    parser.add_argument("--one", choices=CHECKS, help=argparse.SUPPRESS)
    parser.add_argument("--answer", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        place = Place(options.device, options.small, options.answer.parent)
        rows = [dataclasses.asdict(row) for row in run_one(options.one, place)]
        options.answer.write_text(json.dumps(rows, allow_nan=False))
        return 0
    import torch

    device = "cuda" if options.device == "auto" else options.device
    if device == "cuda" and not torch.cuda.is_available():
        print("error: torch sees no GPU\n  fix: run it where there is one, or --device cpu --small", file=sys.stderr)
        return 2
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        place = Place(device, options.small, Path(folder))
        rows = []
        for name in options.only:
            print(f"---- {name}: {CHECKS[name][2]}", flush=True)
            made = run_apart(name, place)
            rows += made
            print("\n".join(row.line() for row in made), flush=True)
    failed = [row.name for row in rows if row.passed is False]
    seconds = round(time.monotonic() - started, 1)
    result = {"machine": machine(device), "device": device, "small": options.small, "seconds": seconds}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result | {"rows": [dataclasses.asdict(row) for row in rows]}, indent=1) + "\n")
    print(f"{len(rows)} rows in {seconds:.0f} s, {len(failed)} failed: {options.output}", *failed, sep="\n  ")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
