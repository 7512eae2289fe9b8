"""Run by the train environment's Python: a run that goes on again and again on other ranks, beside an unbroken one.

Usage: other_topology_probe.py INPUTS LEGS OUTPUT, with ``tests`` in PYTHONPATH
LEGS is JSON: a list of {"name", "ranks", "from": leg or null, "to": step, "settings", "sub_group_size", "flip": bool};
each resumes from the checkpoint that the leg ``from`` left, trains to step ``to`` and saves. ``flip``: it reads once
before with a bit of one of the files turned. Writes OUTPUT/<name>.json for each.
"""

import dataclasses
import filecmp
import json
import shutil
import sys
import threading
import time
import types
import zlib
from pathlib import Path
from unittest import mock

import training_ranks


def states_of(engine) -> dict[str, list[int]]:
    """Element checksums of the whole master weights and moments, however experts are fused; a collective."""
    import torch
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    from deepseek_sft.convert import repartition

    found: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for name, parameter in engine.module.named_parameters():
        key, first = repartition.key_of(name, tuple(parameter.ds_shape))
        whole = [safe_get_full_fp32_param(parameter)]
        whole += [safe_get_full_optimizer_state(parameter, moment) for moment in ("exp_avg", "exp_avg_sq")]
        found.setdefault(key, []).append((first, torch.stack([one.flatten().clone() for one in whole])))
    everyone: list = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, found)  # of other experts on other ranks
    parts_of: dict[str, dict[int, torch.Tensor]] = {}
    for entry in everyone:
        for key, parts in entry.items():
            parts_of.setdefault(key, {}).update(parts)
    together = {key: torch.cat([parts[first] for first in sorted(parts)], 1) for key, parts in parts_of.items()}
    return {key: [zlib.crc32(row.numpy().tobytes()) for row in rows] for key, rows in together.items()}


class Beside:
    """Saves the step that is done at once, and a second time beside the next step, where nothing is written before its
    forward and backward passes are over: what they change would show."""

    def __init__(self, run, folder: Path):
        import torch.distributed as dist

        from deepseek_sft.training.xtuner_engine.step_result import Due

        self.writing = Due.SHARED
        from deepseek_sft.training.xtuner_engine.background_writer import BackgroundWriter

        self._run, self._folder, self._later = run, folder, folder.with_name(f"{folder.name}_later")
        clock = types.SimpleNamespace(strftime=lambda *_: "now", localtime=lambda: None)
        with mock.patch("mmengine._strategy.deepspeed.time", clock):  # it writes the time into a file
            run.built.save(folder, run.steps_done)
            files = run.built.describe(self._later, run.steps_done)
        self._hold, self._writer = threading.Event(), BackgroundWriter()
        self._writer.after(self._hold.wait)
        self._written = self._writer.write(self._later, dist.get_rank(), files)
        run.tools = dataclasses.replace(run.tools, saves=self)

    def finish(self, _: int) -> None:
        self._hold.set()
        self._written.result()
        self.writing = type(self.writing).NOWHERE

    def stopped(self, asked: list[bool]) -> bool:
        """Whether the next step, asked to stop as told by turns, ends without an update."""
        from deepseek_sft.training.xtuner_engine import loop

        turns = iter(asked)
        requests = types.SimpleNamespace(flags=lambda: (next(turns), False, False))
        run, before = self._run, states_of(self._run.engine)
        tools = dataclasses.replace(run.tools, requests=requests)
        result = loop.train_step(run.engine, run.batches(run.steps_done), run.steps_done + 1, tools, time.monotonic())
        return result is None and states_of(run.engine) == before

    def same(self) -> dict[str, bool]:
        """By name, whether a file has the same bytes both ways; after the next step, on all ranks."""
        import torch.distributed as dist

        from deepseek_sft import engines

        self._writer.close()
        self._run.tools = dataclasses.replace(self._run.tools, saves=None)
        dist.barrier()
        names = {path.name for folder in (self._folder, self._later) for path in folder.iterdir()} - {engines.MARKER}
        files = {name: [folder / name for folder in (self._folder, self._later)] for name in names}
        found = {n: a.exists() and b.exists() and filecmp.cmp(a, b, shallow=False) for n, (a, b) in files.items()}
        dist.barrier()
        return found


def run_leg(inputs: Path, leg: dict, output: Path) -> None:
    """On each rank of a group: one leg."""
    import torch.distributed as dist
    from stored_checkpoint import flip, optimizer
    from training_engine import engine

    from deepseek_sft.convert import rank_state
    from deepseek_sft.training import checkpoints
    from deepseek_sft.training.xtuner_engine import other_topology, saving

    def turn_bit(file: Path) -> None:
        dist.barrier()  # all have judged the file's size, which changes for a moment
        if dist.get_rank() == 0:
            flip(file, -2)
        dist.barrier()

    figures: dict = {"losses": []}
    zero = {"sub_group_size": leg["sub_group_size"]} if leg.get("sub_group_size") else None
    with engine(inputs / "base", inputs / "tokens", zero=zero, **leg["settings"]) as run:
        if leg["from"]:
            folder = output / leg["from"] / "run" / f"step_{leg['start']}"
            saved = checkpoints.judge(folder, "probe")
            if leg.get("flip"):
                turn_bit(optimizer(folder, 1))
                told: list = [None] * dist.get_world_size()
                dist.all_gather_object(told, other_topology.fill(run.engine, saved))
                turn_bit(optimizer(folder, 1))
                figures["problems"] = told
            problems = other_topology.fill(run.engine, saved)
            if problems:
                raise SystemExit(f"{leg['name']}: {problems}")
            run.steps_done = leg["start"]
            figures["resumed"] = states_of(run.engine)
            figures["counts"] = [run.engine.global_steps, other_topology.is_same(run.engine, saved.marker)]
        figures["biases_resumed"] = [router.e_score_correction_bias.tolist() for router in run.model.llm.routers()]
        beside = None
        while run.steps_done < leg["to"]:
            figures["losses"].append(run.step())
            if beside:
                figures["same"], beside = beside.same(), None
            if run.steps_done in leg["saved"]:
                figures[f"states_{run.steps_done}"] = states_of(run.engine)
                figures[f"biases_{run.steps_done}"] = [
                    r.e_score_correction_bias.tolist() for r in run.model.llm.routers()
                ]
                folder = output / leg["name"] / "run" / f"step_{run.steps_done}"
                beside = Beside(run, folder)
                dist.barrier()
                if dist.get_rank() == 0:
                    config = dataclasses.replace(run.told, run_id="probe")
                    marker = saving.marker_of(config, run.steps_done, {})
                    sizes = checkpoints.sizes(folder)
                    checkpoints.commit(folder, marker | {"checksums": rank_state.digests_of(folder, sizes)}, sizes)
                dist.barrier()
        if beside:
            stopped = [beside.stopped([True]), bool(beside.writing)]
            figures["stopped"] = [*stopped, beside.stopped([False, True]), bool(beside.writing)]
            figures["same"] = beside.same()
    if dist.get_rank() == 0:
        (output / f"{leg['name']}.json").write_text(json.dumps(figures))


def main(inputs: Path, legs: list[dict], output: Path) -> None:
    training_ranks.import_libraries()
    for leg in legs:
        training_ranks.group(leg["ranks"], run_leg, output / f"meeting-{leg['name']}", inputs, leg, output)
    for leg in legs:
        shutil.rmtree(output / leg["name"], ignore_errors=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()), Path(sys.argv[3]))
