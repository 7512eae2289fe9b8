"""Kills at random moments while a checkpoint is written beside a step: `make async-save-kills`.

    async_save_kills.py [--kills 20] [--seed N] [--folder DIR]

One run of two ranks, started again after each kill of one rank or of all processes at once. Writing is slowed down, so
that moments fall into every part of it. Each start must go on from the newest checkpoint with a marker, and the
finished run must have the losses of a run that nothing befell, bit for bit. Exit code 1 where one does not.
"""

import argparse
import collections
import json
import random
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(PROJECT / "tests"), str(PROJECT / "workflow")]

import psutil  # noqa: E402
import stored_checkpoint as stored  # noqa: E402
from training_inputs import Trainer, ranks_of  # noqa: E402

from deepseek_sft.training import checkpoints  # noqa: E402

RANKS, EVERY = 2, 2
LONGEST = 1.5  # seconds from a checkpoint's first file to the kill
LIMIT = 300.0
# A module that Python imports at start: each record of a file takes a twentieth of a second.
SLOW = """
import sys
if any("xtuner_engine.worker" in word for word in sys.orig_argv):
    import time
    from deepseek_sft.training.xtuner_engine.background_writer import BackgroundWriter
    count = BackgroundWriter._count
    def slower(self, size):
        count(self, size)
        time.sleep(0.05)
    BackgroundWriter._count = slower
"""
RESUMED = re.compile(r"resumed from (step_\d+):")
ANEW = re.compile(r"step 1/\d+ +loss")  # of a start that finds no checkpoint: what the one before left is gone by then


def unfinished(work: Path) -> Path | None:
    """The checkpoint that is being written."""
    folders = [p for p in work.glob("train/runs/*/step_*") if p.suffix == "" and any(p.iterdir())]
    return next((folder for folder in folders if not (folder / "committed.json").exists()), None)


def newest(trainer: Trainer) -> str | None:
    """The newest checkpoint that counts."""
    found = checkpoints.newest(trainer.run_folder, trainer.run_folder.name)
    return found and found.folder.name


def kill(trainer: Trainer, settings: dict[str, Any], slow: Path, chance: random.Random, known: str | None) -> dict:
    """One start and its kill; what was found."""
    process = trainer.start(RANKS, environment={"PYTHONPATH": str(slow)}, **settings)
    after = int(known.split("_")[1]) if known else 0
    # The checkpoint that a start begins first, or a later one: whatever is there once so many steps are done.
    least = after + EVERY * chance.randint(1, 2)
    deadline = time.monotonic() + LIMIT
    # What the start before has left is set aside, and its metrics are cut, by then.
    while not (
        (RESUMED if known else ANEW).search(trainer.log.read_text())
        and trainer.steps_done() >= least
        and unfinished(trainer.work)
    ):
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"exit code {process.poll()}\n{trainer.log.read_text()}")
        time.sleep(0.002)
    time.sleep(chance.random() * LONGEST)
    whole = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    one = chance.random() < 0.5
    for victim in [chance.choice(ranks_of(process))] if one else whole:
        if victim.is_running():
            victim.kill()
    process.wait(LIMIT)
    time.sleep(0.5)  # the kernel ends orphans
    resumed = RESUMED.search(trainer.log.read_text())
    torn = unfinished(trainer.work)
    return {
        "killed": "a rank" if one else "all",
        "resumed_from": resumed and resumed[1],
        "as_it_should": (resumed and resumed[1]) == known,
        "inside": torn.name if torn else "between two checkpoints",
        "newest": newest(trainer),
    }


def drill(folder: Path, kills: int, seed: int) -> int:
    chance = random.Random(seed)
    # Enough steps: a start may train six of them and their checkpoints before it is killed.
    settings = stored.SETTINGS | {"max_steps": 6 * kills + 8, "save_every_steps": EVERY, "keep_checkpoints": 2}
    settings |= {"async_save": "auto", "epochs": 1000}
    (slow := folder / "slow").mkdir()
    (slow / "sitecustomize.py").write_text(SLOW)
    stored.write_inputs(folder / "inputs")
    python = PROJECT / ".envs/train/bin/python"
    trainer, known, told = Trainer(python, folder / "inputs", folder / "killed"), None, []
    for number in range(kills):
        told.append({"kill": number + 1} | kill(trainer, settings, slow, chance, known))
        known = told[-1]["newest"]
        print(json.dumps(told[-1]), flush=True)
    text = trainer.run(RANKS, **settings)
    resumed = RESUMED.search(text)
    wrong = [one["kill"] for one in told if not one["as_it_should"]]
    wrong += [] if resumed and resumed[1] == known else ["the last start"]
    undisturbed = Trainer(python, folder / "inputs", folder / "undisturbed")
    undisturbed.run(RANKS, **settings)
    equal = [(line["step"], line["loss"]) for line in undisturbed.metrics()] == [
        (line["step"], line["loss"]) for line in trainer.metrics()
    ]
    inside = sum(one["inside"].startswith("step_") for one in told)
    went_on = f"not {wrong}" if wrong else "all starts"
    print(
        f"{kills} kills, {dict(collections.Counter(one['killed'] for one in told))}, {inside} left a checkpoint "
        f"without a marker; {went_on} went on from the newest with one; losses of "
        f"{settings['max_steps']} steps {'equal' if equal else 'DIFFER'}"
    )
    return 0 if equal and not wrong else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 16))
    parser.add_argument("--folder", type=Path, help="in which a temporary folder is made; removed at the end")
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    folder = Path(tempfile.mkdtemp(prefix="async-save-kills-", dir=options.folder))
    try:
        return drill(folder, options.kills, options.seed)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    sys.exit(main())
