"""What a checkpoint costs that is written beside the next step, against one for which training stops.

    .envs/dev/bin/python benchmarks/async_save.py [--saves 5] [--ranks 2] [--folder DIR]

A model of 85 M parameters (1 GB of FP32 weights and moments) trains on two ranks with `async_save: off`, then with
`auto`; figures are those of the runs' own metrics. A CPU that computes is no GPU that computes beside an idle CPU: each
backward pass therefore also waits for as long as a GPU would compute, 1.3 times as long as a checkpoint takes, as the
published run's step does by its plan (529 s to 403 s). As many ranks as cores leave the writers none; `--ranks 1`
leaves one of two free, as nodes have many. Exit code 1 where wait and slowdown together, by the median, are
more than a tenth of the stop.
"""

import argparse
import os
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(PROJECT / "workflow"), str(PROJECT / "tests")]

from resume import RANKS, SHAPE  # noqa: E402
from training_inputs import Trainer, make_inputs  # noqa: E402

BAR = 0.10
STEP_TO_SAVE = 1.3
EVERY = 3  # steps: of three one is slowed, two are what it is compared with
SECONDS = "ASYNC_SAVE_DEVICE_SECONDS"
# A module that Python imports at start, in a folder in front of the others.
DEVICE = f"""
import os, sys
if any("xtuner_engine.worker" in word for word in sys.orig_argv):
    import time
    from deepseek_sft.training.xtuner_engine import phases
    mark = phases.PhaseClock.mark
    def computing(self, phase):
        mark(self, phase)
        if phase == "backward":
            time.sleep(float(os.environ["{SECONDS}"]))
    phases.PhaseClock.mark = computing
"""


def train(folder: Path, mode: str, saves: int, ranks: int, device_seconds: float) -> list[dict[str, Any]]:
    """Metrics of a run that saves so many times before its last step."""
    trainer = Trainer(PROJECT / ".envs/train/bin/python", folder / "inputs", folder / mode)
    variables = {"PYTHONPATH": str(folder / "device"), SECONDS: str(device_seconds), "OMP_NUM_THREADS": "1"}
    settings = {"max_steps": EVERY * (saves + 1) + 1, "save_every_steps": EVERY, "keep_checkpoints": 1}
    process = trainer.start(ranks, environment=variables, **settings, micro_batch_size=1, async_save=mode)
    if process.wait() != 0:
        raise RuntimeError(trainer.log.read_text())
    for line in trainer.log.read_text().splitlines():
        if " committed: " in line:
            print(line, flush=True)
    metrics = trainer.metrics()
    shutil.rmtree(trainer.run_folder)
    # The first round warms up; the last step's checkpoint is written at once in both.
    return [line for line in metrics if line["step"] > EVERY + 1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--saves", type=int, default=5)
    parser.add_argument("--ranks", type=int, default=RANKS)
    parser.add_argument("--folder", type=Path, help="on the disk to be measured; removed at the end")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="async-save-", dir=options.folder))
    try:
        make_inputs(folder / "inputs", 8, SHAPE, longest=16)
        (folder / "device").mkdir()
        (folder / "device" / "sitecustomize.py").write_text(DEVICE)
        alone = train(folder, "off", options.saves, options.ranks, 0.0)
        stops = [line["seconds_save"] for line in alone if line["seconds_save"]]
        stop = statistics.median(stops)
        saving = train(folder, "auto", options.saves, options.ranks, STEP_TO_SAVE * stop)
        beside = [line for line in saving if line["seconds_save"] > 0]
    finally:
        shutil.rmtree(folder)
    waits, slowed = ([line[key] for line in beside] for key in ("seconds_save", "seconds_slowed"))
    costs = [wait + slow for wait, slow in zip(waits, slowed, strict=True)]
    print(f"{os.cpu_count()} cores, {os.getloadavg()[0]:.1f} processes wanted one of late")
    print(f"training stopped for {stop:.2f} s a checkpoint ({min(stops):.2f} to {max(stops):.2f})")
    print(
        f"beside a step: {statistics.median(waits):.2f} s stopped, the step {statistics.median(slowed):.2f} s slower, "
        f"together {min(costs):.2f} to {max(costs):.2f}"
    )
    ratio = statistics.median(costs) / stop
    print(f"ratio {ratio:.3f} (bar {BAR})")
    return 0 if ratio <= BAR else 1


if __name__ == "__main__":
    sys.exit(main())
