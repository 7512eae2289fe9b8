"""Run by the train environment's Python: starts of runs on several nodes, each with a disk of its own.

Usage: node_local_probe.py INPUTS FOLDER; in a mount namespace of its own. Prints a JSON object: name of a start → its
losses, steps on each node's disk, the shared storage's steps, and what was said.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import training_ranks
from stored_checkpoint import flip, optimizer
from training_helpers import settings as make_settings

STEPS, SAVED = 9, 3
SETTINGS = {"sequence_parallel_size": 2, "micro_batch_size": 4, "max_steps": STEPS, "save_every_steps": SAVED}
SETTINGS |= {"balance_bias_speed": 0.01, "deal_rows": "cost", "async_save": "auto", "experts_per_shard": 8}
# After each step on the nodes; that a step has taken longer is certain.
TIERS = [{"path": "$OWN_DISK/sft", "every_minutes": 1e-9}, {"keep": 1}]


class Run:
    """A run, its nodes' disks, and its starts.

    Args:
        ranks: of all nodes.
    """

    def __init__(self, inputs: Path, folder: Path, ranks: int = 4, nodes: int = 4):
        self.inputs, self.folder, self.ranks = inputs, folder, ranks
        self.run = folder / "train" / "runs" / "probe"
        self.disks = [folder / f"disk{node}" for node in range(nodes)]
        for place in (self.run, *self.disks):
            place.mkdir(parents=True)
        self.starts = 0

    def start(self, kill_at: int | None = None, **changes) -> dict:
        """Train, and have every rank killed at the beginning of a step; what was found afterwards."""
        logs = self._logs()
        end = signal.SIGKILL if kill_at else 0
        training_ranks.group(
            self.ranks,
            start,
            logs / "meeting",
            self,
            logs,
            kill_at,
            SETTINGS | {"checkpoints": TIERS} | changes,
            end=end,
        )
        lines = (self.run / "metrics.jsonl").read_text().splitlines()
        return {
            "losses": [json.loads(line)["loss"] for line in lines],
            "nodes": [sorted(path.name for path in disk.glob("sft/*/step_*")) for disk in self.disks],
            "markers": sorted({path.read_text() for path in self._markers(*self.disks)}),
            "said": (logs / "said").read_text(),
        }

    def refused(self, **changes) -> str:
        """What is said by a start that must not train."""
        logs = self._logs()
        try:
            training_ranks.group(
                self.ranks, start, logs / "meeting", self, logs, 1, SETTINGS | {"checkpoints": TIERS} | changes
            )
        except SystemExit:
            return (logs / "said").read_text()
        raise SystemExit(f"it trained: {(logs / 'said').read_text()}")

    def _logs(self) -> Path:
        self.starts += 1
        logs = self.run / "logs" / str(self.starts)
        logs.mkdir(parents=True)
        return logs

    def newest(self, node: int) -> Path:
        """A node's newest committed checkpoint."""
        return max(self._markers(self.disks[node]), key=lambda path: path.stat().st_mtime_ns).parent

    def _markers(self, *disks: Path) -> list[Path]:
        return [path for disk in disks for path in disk.glob("sft/*/step_*/committed.json")]

    def lose(self, *nodes: int) -> None:
        for node in nodes:
            shutil.rmtree(self.disks[node])
            self.disks[node].mkdir()


def start(run: Run, logs: Path, kill_at: int | None, changes: dict) -> None:
    """One rank of a start: training's own loop."""
    import dataclasses

    import torch.distributed as dist

    from deepseek_sft.data.tokens import TokenDataset
    from deepseek_sft.slurm import nodes
    from deepseek_sft.training import schedule, stage, watchdog
    from deepseek_sft.training.xtuner_engine import config, loop, micro_batches

    with open(logs / "said", "a") as said:
        os.dup2(said.fileno(), 2)
    rank = dist.get_rank()
    node = rank * len(run.disks) // run.ranks
    os.environ |= {"OWN_DISK": str(run.disks[node]), "SLURMD_NODENAME": f"node{node}"}
    chosen = make_settings(**changes)
    tokens, base = run.inputs / "tokens", run.inputs / "base"
    plan = schedule.plan(chosen, len(TokenDataset(tokens)), run.ranks)
    told = config.of(
        stage.Run("probe", run.run, run.folder, base, tokens, chosen, plan, {}),
        nodes.detect("cpu", run.ranks, {}),
        "cpu",
    )
    told = dataclasses.replace(told, nodes=len(run.disks))
    attempt = config.Attempt(
        run=run.run,
        name=logs.name,
        logs=logs,
        hosts=[f"node{number}" for number in range(len(run.disks))],
        stop_files=[],
        end_after=None,
        memory_before_model_gib=0.0,
        began=time.time(),
    )
    of_step = micro_batches.StepRows.of_step

    def killing(self, step: int):
        if step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return of_step(self, step)

    with mock.patch.object(micro_batches.StepRows, "of_step", killing):
        loop.run(told, attempt, watchdog.Watchdog(rank, logs, dict.fromkeys(("start", "step", "save"), 600.0)))


def main(inputs: Path, folder: Path) -> dict:
    training_ranks.import_libraries()
    found = {"undisturbed": Run(inputs, folder / "undisturbed").start(checkpoints=[])}
    run = Run(inputs, folder / "run")
    found["killed"] = run.start(kill_at=6)  # step 4 is committed on the nodes, step 5 is being written
    run.lose(1)
    found["a node lost"] = run.start(kill_at=9)
    flip(optimizer(run.newest(0), 0))  # of a rank of that very node
    found["own file damaged"] = run.start(kill_at=9)
    run.lose(0)
    flip(optimizer(run.newest(1), 0))  # the copy
    found["copy damaged"] = run.start(kill_at=9)
    (run.run / "step_6").rename(run.folder / "away")  # as if nothing had been saved there
    found["ranks of another kind"] = {"said": run.refused(experts_per_shard=4)}
    (run.folder / "away").rename(run.run / "step_6")
    run.lose(0, 1)
    found["both lost"] = run.start(async_save="off")
    full = Run(inputs, folder / "full", nodes=2)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(full.disks[1])], check=True)
    found["full disk"] = full.start(kill_at=3, max_steps=4)
    found["full disk"]["left"] = [path.name for path in full.disks[0].rglob("step_1/*")]
    subprocess.run(["umount", str(full.disks[1])], check=True)
    found["space again"] = full.start(max_steps=4)
    one = Run(inputs, folder / "one")
    one.disks[3] = one.disks[0]
    found["no disks of their own"] = {"said": one.refused()}
    single = Run(inputs, folder / "single", ranks=2, nodes=1)
    single.start(kill_at=3, max_steps=4)
    found["a single node"] = single.start(max_steps=4)
    return found


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), Path(sys.argv[2]))))
