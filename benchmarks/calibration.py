"""Planned beside measured: trains the demo, or reads a finished run, and prints how far the plan was off.

    .envs/dev/bin/python benchmarks/calibration.py                          demo: 2 ranks on this machine, some minutes
    .envs/dev/bin/python benchmarks/calibration.py --ranks 4                the same with 4 ranks
    .envs/dev/bin/python benchmarks/calibration.py --results results/demo   a run that is there already; reads only

The demo goes to a temporary folder and is deleted. The exit code is 0 only if one checkpoint and the host memory
of a node are within 10 % of the plan.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT / "workflow"))
BAR = 0.10
JUDGED = ("one checkpoint", "host memory of a node")


def train(folder: Path, ranks: int, steps: int) -> Path:
    """Train the demo without Slurm; returns its results."""
    overlay = folder / "overlay.yaml"
    overlay.write_text(f"experiment: demo\nresults: {folder}\ntrain: {{ranks_per_node: {ranks}, max_steps: {steps}}}\n")
    snakemake = [str(PROJECT / ".envs/workflow/bin/snakemake"), "--profile", "profiles/local", "--quiet", "all"]
    snakemake += ["--configfile", "config/experiments/demo.yaml", str(overlay), "--until", "train"]
    subprocess.run(snakemake, cwd=PROJECT, check=True, stdout=sys.stderr)
    return folder / "demo"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, help="results/<experiment> of a finished run")
    parser.add_argument("--ranks", type=int, default=2, help="ranks to train the demo with; a multiple of 2")
    parser.add_argument("--steps", type=int, default=200, help="steps to train; memory is flat after about 50")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = options.results or train(Path(folder), options.ranks, options.steps)
        return show(results)


def show(results: Path) -> int:
    """Print the comparison; returns the exit code."""
    from deepseek_sft.report import calibration, collect

    stages = collect.stages(results, None)
    planned = stages["refine_plan"] if stages["refine_plan"].receipt else stages["plan"]
    compared = calibration.compare(planned, stages["train"], collect.training_metrics(results, stages["train"]))
    for one in compared:
        print(f"{one.name}: {one.text()}")
    shares = {one.name: abs(one.difference_share) for one in compared}
    missed = [name for name in JUDGED if shares.get(name, 1.0) > BAR]
    print(f"bar, {BAR:.0%}: " + (f"missed by {', '.join(missed)}" if missed else "met"))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
