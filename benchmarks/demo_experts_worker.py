"""Ranks of ``benchmarks/train.py demo_experts``, run by the train environment's Python.

Usage: demo_experts_worker.py CASE.json OUTPUT, with ``workflow`` and ``tests`` on its path
CASE is {"base", "tokens", "settings", "warm_up", "steps", "worlds"}, a world {"name", "nodes", "ranks", "sizes", "settings"}.
One engine for each size of expert parallelism lives in each rank, and they step in turn, in another order each time:
what else the machine does falls on all alike. Rank 0 writes OUTPUT/<name>.json.
"""

import contextlib
import dataclasses
import itertools
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import training_ranks


def settings_of(case: dict[str, Any], world: dict[str, Any], size: int, output: Path) -> dict[str, Any]:
    """The demo's, its open keys settled as a new run's are; a rank holds one shard at least."""
    from deepseek_sft import json_files
    from deepseek_sft.training import new_runs, settings

    names = {field.name for field in dataclasses.fields(settings.Settings)}
    file = output / f"settings-{size}.json"
    values = {key: value for key, value in (case["settings"] | world["settings"]).items() if key in names}
    model = json_files.load(Path(case["base"]) / "config.json")
    values["experts_per_shard"] = min(values["experts_per_shard"], model["n_routed_experts"] // size)
    file.write_text(json.dumps(values | {"run_name": "", "expert_parallel_size": size}))
    chosen = new_runs.settle(settings.read(file), output / "runs/none", "none", model)
    return {field.name: getattr(chosen, field.name) for field in dataclasses.fields(chosen)}


def measure(case: dict[str, Any], world: dict[str, Any], output: Path) -> None:
    """On each rank of a world: all engines, then their steps."""
    import torch.distributed as dist
    from torch.utils._python_dispatch import TorchDispatchMode
    from training_engine import engine

    class Collectives(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, kinds, arguments=(), options=None):
            self.count += function.name().startswith("c10d::")
            return function(*arguments, **(options or {}))

    sizes = world["sizes"]
    found: dict[int, list[tuple[float, dict[str, float]]]] = {size: [] for size in sizes}
    orders, counted = itertools.cycle(itertools.permutations(sizes)), {}
    with contextlib.ExitStack() as stack:
        engines = {}
        for size in sizes:
            settings = settings_of(case, world, size, output) if dist.get_rank() == 0 else None
            told = [settings]
            dist.broadcast_object_list(told)
            made = engine(Path(case["base"]), Path(case["tokens"]), nodes=world["nodes"], **told[0])
            engines[size] = stack.enter_context(made)
        for step in range(case["warm_up"] + case["steps"]):
            for size in next(orders):
                dist.barrier()
                begin = time.perf_counter()
                engines[size].step()
                dist.barrier()
                if step >= case["warm_up"]:
                    found[size].append((time.perf_counter() - begin, engines[size].result.phases))
        for size in sizes:
            with Collectives() as counter:
                engines[size].step()
            counted[size] = counter.count
    if dist.get_rank():
        return
    figures: dict[str, Any] = {}
    for size, steps in found.items():
        ratios = [one / alone for (one, _), (alone, _) in zip(steps, found[sizes[0]], strict=True)]
        low, ratio, high = statistics.quantiles(ratios, n=4)
        phases = {name: statistics.median(step[1][name] for step in steps) for name in steps[0][1]}
        seconds = statistics.median(step[0] for step in steps)
        figures[size] = {"seconds": seconds, "phases": phases}
        figures[size] |= {"ratio": ratio, "low": low, "high": high, "collectives": counted[size]}
    (output / f"{world['name']}.json").write_text(json.dumps(figures))


def main(case: dict[str, Any], output: Path) -> None:
    training_ranks.import_libraries()
    for world in case["worlds"]:
        training_ranks.group(world["ranks"], measure, output / f"meeting-{world['name']}", case, world, output)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
