"""Share of the GPU hours that a run trains on, on 256 and 1,024 GPUs that fail as often as those of Llama 3.

    .envs/dev/bin/python benchmarks/goodput.py
    .envs/dev/bin/python benchmarks/goodput.py --start 900 --save 240 --requeue 0  measured times, not the plan's
    .envs/dev/bin/python benchmarks/goodput.py --results results/<experiment>      those that its run has measured

DeepSeek-R1 with the published settings, 30 days of steps, twenty simulated runs for each line, with checkpoints that
stop training and with those written beside the next step (`train.async_save`). Step, save and reading are the plan's
unless given. Exit code 1 where the best cadence on 256 GPUs does not reach 95 %.
"""

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT / "workflow"))

from deepseek_sft import formatting  # noqa: E402
from deepseek_sft.planning import goodput  # noqa: E402
from deepseek_sft.planning.checkpoint_cost import cadence as best_cadence  # noqa: E402
from deepseek_sft.report import status  # noqa: E402
from deepseek_sft.training import gpu_hours  # noqa: E402

GOAL, GOAL_GPUS = 0.95, 256
DAY = 86400.0
MINUTES = (15, 30, 60, 120, 240)
BEFORE_READING = 300.0  # preflight, interpreter, libraries, communication of hundreds of ranks: an assumption
REQUEUE = 120.0  # Slurm holds a requeued job back for so long unless it is set otherwise
NOTICED = 30.0  # a rank that dies, an assumption; a hang lasts until the watchdog's limit, see --noticed


def planned(gpus: int) -> dict[str, Any]:
    """Figures of the plan on nodes of 8."""
    resources = json.dumps({"nodes": gpus // 8, "gres": "gpu:h100:8", "mem_mb": 1900000})
    words = ["--model", "deepseek-r1", "--storage-tb", "200", "--resources", resources, "--json"]
    command = [str(PROJECT / ".envs/workflow/bin/python"), str(PROJECT / "workflow/scripts/plan.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=PROJECT)
    return json.loads(done.stdout)


def measured(results: Path) -> dict[str, float]:
    """Start, save and time between starts of a run; what it does not tell is left out."""
    run = status.newest_run(results)
    found = gpu_hours.read(run) if run else None
    return {} if found is None else found.typical()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, help="results/<experiment> whose measured times are taken")
    parser.add_argument("--step", type=float, help="seconds of an optimizer step")
    parser.add_argument("--save", type=float, help="seconds for which a checkpoint keeps the GPUs from steps")
    parser.add_argument("--start", type=float, help="seconds from a job's begin to its first step")
    parser.add_argument("--noticed", type=float, default=NOTICED, help="seconds from a failure to the end of its job")
    parser.add_argument("--requeue", type=float, help="seconds from there until the job begins again")
    parser.add_argument("--limit", type=float, help="time limit of a job, in hours")
    parser.add_argument("--days", type=float, default=30, help="of steps in a run")
    options = parser.parse_args()
    seen = measured(options.results) if options.results else {}
    best_at_goal = 0.0
    for gpus in (256, 1024):
        plan = planned(gpus)
        between = goodput.mean_time_between_failures(gpus)
        print(f"{gpus:,} GPUs: a failure every {formatting.duration(between)}")
        for name, stop, writing in (
            ("training stops for a checkpoint", plan["checkpoint_s"], 0.0),
            ("written beside the next step", statistics.fmean(plan["checkpoint_stop_s"]), plan["checkpoint_s"]),
        ):
            defaults = {
                "step": plan["step_expected_s"],
                "save": stop,
                "start": BEFORE_READING + max(plan["loading_s"], plan["checkpoint_s"]),
                "again": REQUEUE,
            }
            given = {"step": options.step, "save": options.save, "start": options.start, "again": options.requeue}
            used = defaults | seen | {key: value for key, value in given.items() if value is not None}
            limit = options.limit * 3600 if options.limit else None
            best = best_cadence(used["save"], between, writing)
            times = goodput.Times(**used, cadence=best, noticed=options.noticed, limit=limit, writing=writing)
            shown = ", ".join(f"{key} {formatting.duration(seconds)}" for key, seconds in used.items())
            print(f"  {name}: {shown}")
            for cadence in sorted({*(60.0 * minutes for minutes in MINUTES), best}):
                found = goodput.expected(dataclasses.replace(times, cadence=cadence), between, options.days * DAY)
                if gpus == GOAL_GPUS:
                    best_at_goal = max(best_at_goal, found.of_gpu_hours)
                print(
                    f"    every {formatting.duration(cadence):>13}{' (best by Daly)' if cadence == best else '':15}: "
                    f"{found.of_gpu_hours:6.2%} of the GPU hours train; saving {found.saving:.2%}, "
                    f"lost {found.lost:.2%}, starting {found.starting:.2%} of the time, waiting {found.waiting:.2%}"
                )
    print(f"best on {GOAL_GPUS} GPUs: {best_at_goal:.2%} (goal {GOAL:.0%})")
    return 0 if best_at_goal >= GOAL else 1


if __name__ == "__main__":
    sys.exit(main())
