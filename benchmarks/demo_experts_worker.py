"""Ranks of ``benchmarks/train.py demo_experts``, run by the train environment's Python.

Usage: demo_experts_worker.py CASE.json OUTPUT, with ``workflow`` and ``tests`` on its path
CASE is {"base", "tokens", "settings", "warm_up", "steps", "worlds"}, a world {"name", "nodes", "ranks", "sizes",
"settings"}. One engine for each size of expert parallelism lives in each rank, and they step in turn, in another order
each time: what else the machine does falls on all alike. Rank 0 writes OUTPUT/<name>.json.
"""

import contextlib
import dataclasses
import itertools
import json
import statistics
import sys
import time
from operator import truediv
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
    import torch
    import torch.distributed as dist
    from torch.utils._python_dispatch import TorchDispatchMode
    from training_engine import engine

    class Collectives(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, kinds, arguments=(), options=None):
            self.count += function.name().startswith("c10d::")
            return function(*arguments, **(options or {}))

    sizes = world["sizes"]
    found: dict[int, list[tuple[float, float, dict[str, float]]]] = {size: [] for size in sizes}
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
                begin, worked = time.perf_counter(), time.process_time()
                engines[size].step()
                worked = torch.tensor(time.process_time() - worked)
                dist.all_reduce(worked)
                if step >= case["warm_up"]:
                    found[size].append((time.perf_counter() - begin, worked.item(), engines[size].result.phases))
        for size in sizes:
            with Collectives() as counter:
                engines[size].step()
            counted[size] = counter.count
    if dist.get_rank():
        return
    alone, alone_worked, _ = zip(*found[sizes[0]], strict=True)
    figures: dict[str, Any] = {}
    for size, steps in found.items():
        seconds, worked, phases = zip(*steps, strict=True)
        figures[size] = {
            "seconds": statistics.median(seconds),
            "ratio": statistics.quantiles(map(truediv, seconds, alone), n=4),
            "worked": statistics.median(worked),
            "work ratio": statistics.quantiles(map(truediv, worked, alone_worked), n=4),
            "phases": {name: statistics.median(one[name] for one in phases) for name in phases[0]},
            "collectives": counted[size],
        }
    (output / f"{world['name']}.json").write_text(json.dumps(figures))


def main(case: dict[str, Any], output: Path) -> None:
    training_ranks.import_libraries()
    for world in case["worlds"]:
        training_ranks.group(world["ranks"], measure, output / f"meeting-{world['name']}", case, world, output)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
