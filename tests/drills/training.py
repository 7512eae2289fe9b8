"""Stand-in for preflight.py and train.py in drills of Slurm: everything around it is the project's own.

A step is a tenth of a second of sleep. It holds the run's lock, looks at it as the real one does, saves when told to by
USR1 or the stop file and every ``save_every`` steps, and leaves the receipt. ``results/demo/drill.json`` steers it:
``steps`` to train, ``save_every`` (0: only when told), ``crash`` (step at which every start crashes, 0: never),
``preflight`` and ``deaf`` (seconds of preflight, and of a start that does not listen to signals yet).
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, "workflow")
from deepseek_sft import cli, receipts
from deepseek_sft.errors import CrashError, StoppedError
from deepseek_sft.training import lock

STEP_S = 0.1
FIRST = os.environ.get("SLURM_PROCID", "0") == "0"
ATTEMPT = f"{os.environ.get('SLURM_JOB_ID')}-{os.environ.get('SLURM_RESTART_COUNT', '0')}"
asked: list[int] = []


def value_of(option: str) -> Path:
    return Path(sys.argv[sys.argv.index(option) + 1])


def read_plan() -> dict:
    return json.loads(Path("results/demo/drill.json").read_text())


def newest(run: Path) -> int:
    return max((int(path.parent.name[5:]) for path in run.glob("step_*/committed.json")), default=0)


def save(run: Path, step: int) -> None:
    (run / f"step_{step}").mkdir(exist_ok=True)
    (run / f"step_{step}" / "committed.json").write_text(json.dumps({"attempt": ATTEMPT}))
    cli.say(f"saved step {step}")


def train(run: Path, plan: dict, stop_file: Path) -> None:
    """Train to the last step; a line of ``steps`` for each, so that lost and doubled ones are seen."""
    step = begun = newest(run)
    cli.say(f"start {ATTEMPT} goes on after step {step}")
    with lock.hold(run, ATTEMPT) as held, open(run / "steps", "a", encoding="utf-8") as steps:
        if stop_file.exists():
            raise StoppedError(f"the stop file {stop_file} exists")
        while step < plan["steps"]:
            time.sleep(STEP_S)
            if step % 10 == 0:
                held.check()
                plan = read_plan()
            step += 1
            steps.write(f"{step} {ATTEMPT} {time.time():.1f}\n")
            steps.flush()
            if plan.get("crash") and step == begun + plan["crash"]:
                raise CrashError("crashed as the drill wants it")
            told = bool(asked) or stop_file.exists()
            if told or step == plan["steps"] or (plan["save_every"] and step % plan["save_every"] == 0):
                held.check()
                save(run, step)
            if told:
                raise StoppedError(f"stopped on request after step {step}; the checkpoint is saved")
    result = {"checkpoint": str(run / f"step_{step}"), "run": str(run), "metrics": str(run)}
    receipts.write(value_of("--receipt"), "train", inputs={}, settings={}, result=result, figures={}, hosts=[])


def main() -> None:
    plan = read_plan()
    program = Path(sys.argv[1]).stem
    if FIRST:
        with open("results/demo/drill.programs", "a", encoding="utf-8") as programs:
            programs.write(f"{program} {ATTEMPT}\n")
    if program == "preflight":
        time.sleep(plan["preflight"])
        return
    time.sleep(plan["deaf"])
    signal.signal(signal.SIGUSR1, lambda *_: asked.append(1))
    run = value_of("--output") / "runs" / "drill"
    run.mkdir(parents=True, exist_ok=True)
    ended = run / f"ended-{ATTEMPT}"
    if FIRST:
        try:
            train(run, plan, value_of("--stop-file"))
            ended.write_text("0")
        except (CrashError, StoppedError) as error:
            ended.write_text(str(error.exit_code))
            raise
    while not ended.exists():
        time.sleep(STEP_S)
    sys.exit(int(ended.read_text()))


cli.run(main)
