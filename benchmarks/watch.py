"""What the live page costs: a run of 10,000 steps of the 671B model's layers, to which a step is added each second.

    .envs/dev/bin/python benchmarks/watch.py [--steps 10000] [--seconds 60]

Prints seconds until the page can be opened, the answers' seconds and bytes, the watch's share of one core and memory.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(PROJECT / "workflow"), str(PROJECT / "tests")]

import pytest  # noqa: E402
from unit.report import results as made  # noqa: E402
from unit.report.running import Site  # noqa: E402

RUNNING = "55|RUNNING|rule_train demo abc|node[1-32]|gpu|26:10|3-21:33:50|None"


def processor_seconds(process: int) -> float:
    fields = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident_mib(process: int) -> float:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


def measure(site: Site, steps: int, seconds: float) -> None:
    made.LAYERS, made.EXPERTS, made.STEPS = 58, 256, steps
    site.training(steps=steps, total=2 * steps)
    site.log("train", "55", "step\n")
    site.squeue(RUNNING)
    begun = time.monotonic()
    script = PROJECT / "workflow/scripts/watch.py"
    command = [sys.executable, str(script), str(site.results), "--logs", str(site.logs)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as watch:
        watch.stdout.readline()
        address = watch.stdout.readline().strip()
        print(f"address after {time.monotonic() - begun:.1f} s")
        before, begun, answers, body = processor_seconds(watch.pid), time.monotonic(), [], b""
        while time.monotonic() - begun < seconds:
            steps += 1
            with open(site.run / "metrics.jsonl", "a") as stream:
                stream.write(json.dumps(made.line(steps)) + "\n")
            asked = time.monotonic()
            body = urllib.request.urlopen(address).read()
            answers.append(time.monotonic() - asked)
            time.sleep(1)
        share = (processor_seconds(watch.pid) - before) / (time.monotonic() - begun)
        print(f"page of {len(body):,} bytes after {statistics.median(answers):.3f} s, {max(answers):.3f} s at most")
        print(f"{share:.1%} of one core, {resident_mib(watch.pid):.0f} MiB")
        watch.terminate()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=60)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        measure(Site(Path(folder), patch), arguments.steps, arguments.seconds)


if __name__ == "__main__":
    main()
