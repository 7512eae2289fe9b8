"""The demo's training with and without its experts spread over ranks, step by step in turn."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from faked_ranks import PROJECT

STAGES = ("prepare_data", "prepare_model", "tokenize_data")
WORLDS: list[dict[str, Any]] = [
    # As profiles/demo and config/experiments/demo.yaml have them: 2 is inside a node, 4 over both.
    {"name": "two-ranks-a-node", "nodes": 2, "ranks": 4, "sizes": [1, 2, 4], "settings": {}},
    # 2 is over both nodes; as many samples a step.
    {"name": "one-rank-a-node", "nodes": 2, "ranks": 2, "sizes": [1, 2], "settings": {"micro_batch_size": 16}},
]
WARM_UP = 6  # steps of each, in which DeepSpeed learns the order of modules
NOT_SLOWER = 1.0


def demo_experts(bench: Any) -> None:
    """Seconds of a step of the demo for each size, on the demo's own rows; 2 beside 1 is held against its bar."""
    from deepseek_sft import config as configuration
    from deepseek_sft.experiment import Experiment

    folder = Path(bench.folder) / "demo-experts"
    folder.mkdir()
    read = [
        yaml.safe_load((PROJECT / "config" / name).read_text()) for name in ("config.yaml", "experiments/demo.yaml")
    ]
    config = configuration.merge(configuration.merge(*read), {"results": str(folder)})
    experiment = Experiment.from_config(config)
    results = Path(experiment.results)
    (results / "data").mkdir(parents=True)
    for stage in STAGES:
        script, receipt = PROJECT / f"workflow/scripts/{stage}.py", results / f"{stage}.json"
        words = [sys.executable, script, *shlex.split(experiment.arguments(stage)), "--receipt", receipt]
        subprocess.run(list(map(str, words)), cwd=PROJECT, stdout=subprocess.DEVNULL, check=True)
    settings = json.loads(experiment.settings("train")) | json.loads(experiment.operational("train"))
    case = {"base": str(results / "base"), "tokens": str(results / "data/tokens"), "settings": settings}
    (folder / "case.json").write_text(json.dumps(case | {"worlds": WORLDS, "warm_up": WARM_UP, "steps": bench.steps}))
    variables = {"PYTHONPATH": f"{PROJECT / 'workflow'}:{PROJECT / 'tests'}", "OMP_NUM_THREADS": "1"}
    variables |= {"DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo", "TOKENIZERS_PARALLELISM": "false"}
    worker = [PROJECT / ".envs/train/bin/python", PROJECT / "benchmarks/demo_experts_worker.py"]
    done = subprocess.run(
        [*worker, folder / "case.json", folder], env=os.environ | variables, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(done.stderr[-6000:])
    for world in WORLDS:
        _told(bench, world, json.loads((folder / f"{world['name']}.json").read_text()))


def _told(bench: Any, world: dict[str, Any], found: dict[str, Any]) -> None:
    print(
        f"the demo's training, {world['nodes']} nodes × {world['ranks'] // world['nodes']} ranks on this machine, "
        f"sizes in turn step by step, medians of {bench.steps} steps of each after {WARM_UP}"
    )
    for size, one in found.items():
        phases = ", ".join(f"{name} {1e3 * seconds:.0f}" for name, seconds in one["phases"].items())
        (low, middle, high), (_, work, _) = one["ratio"], one["work ratio"]
        print(
            f"  experts over {size}: {1e3 * one['seconds']:.0f} ms a step ({phases}), {middle:.3f} of 1's (middle half "
            f"{low:.3f} to {high:.3f}); processors {1e3 * one['worked']:.0f} ms, {work:.3f}; "
            f"{one['collectives']} collectives"
        )
    if world is WORLDS[0]:
        bench.bar("seconds of a step of the demo, experts over 2 / over 1", found["2"]["ratio"][1], NOT_SLOWER)
