"""Training runs that random faults befall, until each is finished: `make soak`. All end with the losses of a run that
nothing befell, bit for bit.

    soak.py [--runs 20] [--seed N] [--folder DIR]

The seed is printed; the same seed and folder go on after the last run that is written down in soak.jsonl. Run number N
of a seed draws the same faults every time; the moment at which one strikes depends on the machine. The runs' folders
lie on a small disk of their own (tmpfs in a mount namespace), which a fault can fill.
"""

import argparse
import collections
import contextlib
import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(PROJECT / "tests"), str(PROJECT / "workflow")]

import psutil  # noqa: E402
import stored_checkpoint as stored  # noqa: E402
from training_inputs import Trainer, ranks_of  # noqa: E402

STEPS, RANKS = 12, 2
SETTINGS: dict[str, Any] = stored.SETTINGS | {"max_steps": STEPS, "save_every_steps": 2, "keep_checkpoints": 3}
DISK = 64 << 20  # bytes of the runs' disk; a checkpoint has 2.5 MB
LIMIT = 300.0  # seconds of one start
MOST_STARTS = 8
NAMESPACE = "SOAK_NAMESPACE"
DEFECT = "called a defect of the workflow"


@dataclasses.dataclass
class Start:
    """A start of training that a fault is meant for."""

    trainer: Trainer
    process: subprocess.Popen
    random: random.Random
    step: int  # at which the fault strikes

    def reach(self, condition: Callable[[], bool]) -> bool:
        """Wait for ``condition``; False where the process has ended before."""
        deadline = time.monotonic() + LIMIT
        while not condition():
            if self.process.poll() is not None:
                return False
            if time.monotonic() > deadline:
                raise TimeoutError(f"step {self.step} was not reached in {LIMIT:.0f} s\n{self.trainer.log.read_text()}")
            time.sleep(0.005)
        return True

    def reach_step(self) -> bool:
        reached = self.reach(lambda: self.trainer.steps_done() >= self.step)
        time.sleep(self.random.random() * 0.2)
        return reached

    def reach_save(self) -> bool:
        """Until a checkpoint is being written."""

        def saving() -> bool:
            folders = [p for p in self.trainer.work.glob("train/runs/*/step_*") if p.suffix == ""]
            return any(not (folder / "committed.json").exists() for folder in folders)

        return self.reach_step() and self.reach(saving)


def _kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def kill_rank(start: Start) -> None:
    if start.reach_step():
        _kill([start.random.choice(ranks_of(start.process))])


def kill_rank_inside_a_save(start: Start) -> None:
    if start.reach_save():
        _kill([start.random.choice(ranks_of(start.process))])


def kill_torchrun(start: Start) -> None:
    if start.reach_step():
        _kill([p for p in psutil.Process(start.process.pid).children() if "torchrun" in " ".join(p.cmdline())])


def kill_program(start: Start) -> None:
    if start.reach_step():
        start.process.kill()


def power_loss(start: Start) -> None:
    """All processes of the node at once."""
    if start.reach_step():
        _kill([psutil.Process(start.process.pid), *psutil.Process(start.process.pid).children(recursive=True)])


def power_loss_inside_a_save(start: Start) -> None:
    if start.reach_save():
        _kill([psutil.Process(start.process.pid), *psutil.Process(start.process.pid).children(recursive=True)])


def stop_signal(start: Start) -> None:
    if start.reach_step():
        start.process.send_signal(signal.SIGUSR1)


def terminate(start: Start) -> None:
    if start.reach_step():
        start.process.send_signal(signal.SIGTERM)


def interrupt(start: Start) -> None:
    if start.reach_step():
        start.process.send_signal(signal.SIGINT)


def early_kill(start: Start) -> None:
    """While Python starts, the checkpoint is read, or the engine is built."""
    time.sleep(start.random.random() * 12)
    start.process.kill()


def disk_full(start: Start) -> None:
    """The next checkpoint finds no room; the room is there again afterwards."""
    if start.reach_step():
        with open(_ballast(start), "wb") as stream, contextlib.suppress(OSError):
            stream.write(bytes(shutil.disk_usage(start.trainer.work).free - (1 << 20)))


def _ballast(start: Start) -> Path:
    return start.trainer.work.parent / "ballast"


def _newest(run: Path) -> Path:
    return max((p.parent for p in run.glob("step_*/committed.json")), key=lambda p: int(p.name.split("_")[1]))


def flip(folder: Path, chance: random.Random) -> None:
    file, records = chance.choice([(stored.optimizer, 3), (stored.model, 1)])
    stored.flip(file(folder, chance.randrange(RANKS)), record=-1 - chance.randrange(records), where=chance.random())


def lose_page(folder: Path, chance: random.Random) -> None:
    stored.lose_page(stored.optimizer(folder, chance.randrange(RANKS)))


def exchange(folder: Path, chance: random.Random) -> None:
    pick = chance.choice([stored.optimizer, stored.model])
    stored.exchange(pick(folder, 0), pick(folder, 1))


def cut(folder: Path, chance: random.Random) -> None:
    file = stored.optimizer(folder, chance.randrange(RANKS))
    os.truncate(file, int(file.stat().st_size * chance.random()))


def tear_marker(folder: Path, chance: random.Random) -> None:
    marker = folder / "committed.json"
    os.truncate(marker, int(marker.stat().st_size * chance.random()))


def edit_marker(folder: Path, chance: random.Random) -> None:
    change: dict[str, Any] = chance.choice([{"step": "4"}, {"files": []}, {"world_size": 1e9}, {"progress": None}])
    stored.change_marker(folder, lambda marker: marker | change)


def gadget(folder: Path, chance: random.Random) -> None:
    stored.plant_gadget(stored.optimizer(folder, chance.randrange(RANKS)), folder.parents[3] / "CANARY")


WHILE_IT_RUNS = (
    *(kill_rank, kill_rank_inside_a_save, kill_torchrun, kill_program, power_loss, power_loss_inside_a_save),
    *(stop_signal, terminate, interrupt, early_kill, disk_full),
)
AT_REST = (flip, lose_page, exchange, cut, tear_marker, edit_marker, gadget)


def deal(seed: int, runs: int) -> list[list[Callable[..., None]]]:
    """Faults of every run: each kind comes up before one comes up again; two while it runs, one at rest."""
    chance = random.Random(seed)

    def endless(kinds: tuple[Callable[..., None], ...]):
        while True:
            yield from chance.sample(kinds, len(kinds))

    running, resting = endless(WHILE_IT_RUNS), endless(AT_REST)
    return [[next(running), next(resting), next(running)] for _ in range(runs)]


def befall(trainer: Trainer, faults: list[Callable[..., None]], chance: random.Random) -> dict[str, Any]:
    """Train to the end with faults on the way; returns what happened."""
    story, recoveries, pending = [], [], list(faults)
    for _ in range(MOST_STARTS):
        sound_ones = len(list(trainer.work.glob("train/runs/*/step_*/committed.json")))
        if pending and pending[0] in AT_REST and sound_ones >= 2:  # one is left
            fault = pending.pop(0)
            damaged = _newest(trainer.run_folder)
            fault(damaged, chance)
            story.append(f"{fault.__name__} of {damaged.name}")
        fault = next((fault for fault in pending if fault in WHILE_IT_RUNS), None)
        begun, done = time.monotonic(), trainer.steps_done()
        process = trainer.start(RANKS, **SETTINGS)
        start = Start(trainer, process, chance, min(STEPS - 1, done + chance.randint(1, 5)))
        try:
            if fault:
                pending.remove(fault)
                fault(start)
            code = process.wait(LIMIT)
        finally:
            _kill([psutil.Process(process.pid)] if process.poll() is None else [])
        if fault is disk_full:
            _ballast(start).unlink(missing_ok=True)
        text = trainer.log.read_text()
        story.append(f"{fault.__name__ if fault else 'nothing'}: exit code {code}")
        if "defect of the workflow" in text:
            story.append(DEFECT)
        if code == 0:
            recoveries.append(round(time.monotonic() - begun, 1))
            return {"story": story, "seconds_of_last_start": recoveries[-1]}
        time.sleep(0.5)  # the kernel ends orphans
    return {"story": [*story, "never finished"], "seconds_of_last_start": None}


def enter_namespace() -> None:
    """Start this program again where it may mount a disk that nobody else sees."""
    if NAMESPACE not in os.environ:
        unshare = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--mount", "--map-root-user"]
        environment = os.environ | {NAMESPACE: "1"}
        os.execvpe(unshare[0], [*unshare, sys.executable, *sys.argv], environment)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 16))
    parser.add_argument("--folder", type=Path, help="where soak.jsonl is; a temporary folder if not given")
    options = parser.parse_args()
    if NAMESPACE not in os.environ:
        sys.argv = [sys.argv[0], "--runs", str(options.runs), "--seed", str(options.seed)]
        folder = options.folder or Path(tempfile.mkdtemp(prefix="soak-"))
        sys.argv += ["--folder", str(folder.absolute())]
        print(f"seed {options.seed}; the same command goes on: {' '.join(sys.argv)}", flush=True)
        enter_namespace()
    return soak(options.folder, options.seed, options.runs)


def soak(folder: Path, seed: int, runs: int) -> int:
    disk, inputs, python = folder / "disk", folder / "inputs", PROJECT / ".envs/train/bin/python"
    disk.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(disk)], check=True)
    if not inputs.exists():
        stored.write_inputs(inputs)
    undisturbed = Trainer(python, inputs, folder / "undisturbed")
    if not undisturbed.receipt_file.exists():
        undisturbed.run(RANKS, **SETTINGS)
    wanted = [(line["step"], line["loss"]) for line in undisturbed.metrics()]
    record = folder / "soak.jsonl"
    lines = record.read_text().splitlines() if record.exists() else []
    known = {entry["run"]: entry for entry in map(json.loads, lines) if entry["seed"] == seed}
    for number, faults in enumerate(deal(seed, runs)):
        if number in known:
            continue
        work = disk / f"run-{number}"
        begun = time.monotonic()
        trainer = Trainer(python, inputs, work)
        entry = {"run": number, "seed": seed} | befall(trainer, faults, random.Random(f"{seed}-{number}"))
        found = [(line["step"], line["loss"]) for line in trainer.metrics()]
        entry |= {"equal": found == wanted, "executed": (work / "CANARY").exists()}
        entry |= {"seconds": round(time.monotonic() - begun)}
        known[number] = entry
        with open(record, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(entry) + "\n")
        print(json.dumps(entry), flush=True)
        if not sound(entry):
            shutil.copytree(work, folder / f"failed-{number}", dirs_exist_ok=True)
        shutil.rmtree(work)
    good = sum(map(sound, known.values()))
    kinds = collections.Counter(line.split(":")[0].split(" of ")[0] for e in known.values() for line in e["story"])
    print(f"{good} of {len(known)} runs sound; faults: {dict(kinds)}")
    return 0 if good == len(known) else 1


def sound(entry: dict[str, Any]) -> bool:
    return entry["equal"] and not entry["executed"] and DEFECT not in entry["story"]


if __name__ == "__main__":
    sys.exit(main())
