"""What checking a checkpoint adds to a resume: seconds with it, and with its checksums taken out, in turns.

    python benchmarks/resume.py [--repeats 5] [--folder DIR]

A model of 85 M parameters (1 GB of FP32 weights and moments) is trained for a step on two ranks and saved; then it is
resumed again and again, each time until its states are in the engine. Exit code 1 where the bar is not met.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(PROJECT / "workflow"), str(PROJECT / "tests")]

from training_inputs import VOCABULARY, Trainer, make_inputs  # noqa: E402

from deepseek_sft.convert import tiny_model  # noqa: E402

BAR = 0.20
RANKS = 2
SHAPE = tiny_model.TinyShape(
    vocab_size=VOCABULARY,
    hidden_size=512,
    layers=8,
    dense_layers=1,
    routed_experts=16,
    moe_intermediate_size=512,
    intermediate_size=512,
)
SETTINGS = {"max_steps": 2, "save_every_steps": 1, "keep_checkpoints": 2, "micro_batch_size": 1}
# A module that Python imports at start, in a folder in front of the others.
WITHOUT = """
import sys
if any("xtuner_engine.worker" in word for word in sys.orig_argv):
    from deepseek_sft.convert import rank_state
    from deepseek_sft.tensors.byte_ranges import OpenFiles
    def read_into(self, path, offset, target):
        OpenFiles.read_into(self, path, offset, target)
        self.bytes_read += target.nbytes
    rank_state.RecordingFiles.read_into = read_into
    rank_state.check_ranges = lambda *_: (0, 0, [])
"""
RESUMED = re.compile(r"resumed from step_1: ([\d.]+) GiB in ([\d.]+) s, checksums of (\d+)")


def resume(trainer: Trainer, checked: bool, without: Path) -> dict[str, float]:
    """Start, wait until the states are in the engine, end."""
    environment = {} if checked else {"PYTHONPATH": f"{without}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    begun = time.monotonic()
    process = trainer.start(RANKS, environment=environment, **SETTINGS)
    trainer.wait_for(process, lambda: RESUMED.search(trainer.log.read_text()) is not None)
    seconds = time.monotonic() - begun
    found = RESUMED.search(trainer.log.read_text())
    process.terminate()
    process.wait()
    if (int(found[3]) > 0) is not checked:
        raise RuntimeError(f"checking was meant to be {'on' if checked else 'off'}: {found[0]}")
    return {"gib": float(found[1]), "filling": float(found[2]), "start": seconds}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="on the disk to be measured; removed at the end")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="resume-", dir=options.folder))
    try:
        return measure(folder, options.repeats)
    finally:
        shutil.rmtree(folder)


def measure(folder: Path, repeats: int) -> int:
    inputs, without = folder / "inputs", folder / "without"
    without.mkdir()
    (without / "sitecustomize.py").write_text(WITHOUT)
    make_inputs(inputs, 8, SHAPE, longest=16)
    trainer = Trainer(PROJECT / ".envs/train/bin/python", inputs, folder / "run")
    process = trainer.start(RANKS, **SETTINGS)
    trainer.wait_for(process, lambda: any(trainer.work.glob("train/runs/*/step_1/committed.json")))
    process.terminate()
    process.wait()
    shutil.rmtree(trainer.run_folder / "step_2", ignore_errors=True)
    times: dict[bool, list[dict[str, float]]] = {True: [], False: []}
    for number in range(2 * repeats + 1):
        checked = number % 2 == 0
        found = resume(trainer, checked, without)
        if number:  # the first one warms caches
            times[checked].append(found)
            print(json.dumps({"checked": checked} | found), flush=True)
    on, off = (statistics.median(one["filling"] for one in times[checked]) for checked in (True, False))
    start = statistics.median(one["start"] for one in times[False])
    print(f"reading the states: {off:.1f} s without, {on:.1f} s with checking: {on / off - 1:+.0%}")
    # Starting Python, libraries and engine takes most of a resume, and differs more from start to start than this.
    share = (on - off) / start
    print(f"of a resume of {start:.1f} s, from the command until training goes on: {share:+.1%} (bar {BAR:.0%})")
    return 0 if share <= BAR else 1


if __name__ == "__main__":
    sys.exit(main())
