"""What share of its GPU hours a run trains on, by simulated failures; all times are seconds.

Failures are a Poisson process over all GPUs (Llama 3, arXiv 2407.21783, section 3.3.4: 419 unexpected interruptions
in 54 days on 16,384 H100). Each loses what came after the last committed checkpoint, is noticed after a while, and is
followed by a start that reads it; a failure may befall a start or a save as well as a step.
"""

import random
import statistics
from dataclasses import dataclass

LLAMA_3_PER_GPU_SECOND = 419 / (54 * 86400 * 16384)


@dataclass(frozen=True)
class Times:
    """What a run's parts take.

    Attributes:
        step: one optimizer step; only whole ones count.
        save: a checkpoint keeps the GPUs from steps for so long.
        cadence: of training between two checkpoints.
        start: from the job's begin to its first step, reading the checkpoint included.
        noticed: from a failure to the end of its job.
        again: from there until the job begins anew: Slurm's hold of a requeue, queue, other nodes.
        limit: a job's time limit, before which it saves and is begun again; None has none.
        writing: of a checkpoint beside the steps that follow: one that is not committed when a failure comes is lost.
    """

    step: float
    save: float
    cadence: float
    start: float
    noticed: float
    again: float
    limit: float | None = None
    writing: float = 0.0


@dataclass(frozen=True)
class Shares:
    """Where the time of a run goes, as shares that add up to 1; ``waiting`` has no nodes and is no GPU hours spent.

    Attributes:
        lost: steps and saves that no checkpoint keeps, and failures until they are noticed.
    """

    trained: float
    saving: float
    lost: float
    starting: float
    waiting: float

    @property
    def of_gpu_hours(self) -> float:
        """Trained over the GPU hours that the run held."""
        return self.trained / (1 - self.waiting)


def mean_time_between_failures(gpus: int, per_gpu_second: float = LLAMA_3_PER_GPU_SECOND) -> float:
    return 1 / (gpus * per_gpu_second)


def simulate(times: Times, between_failures: float, work: float, seed: int) -> Shares:
    """One run of ``work`` seconds of steps.

    Args:
        between_failures: mean time between failures of its nodes while it holds them.

    Raises:
        ValueError: a job's limit leaves no time for a step and a save.
    """
    if times.limit is not None and times.limit <= times.start + times.step + times.save:
        raise ValueError(f"a job of {times.limit:g} s has no time for a start, a step and a save")
    chance = random.Random(seed)
    steps, done = round(work / times.step), 0
    every = max(1, round(times.cadence / times.step))  # steps between two checkpoints
    spent = dict.fromkeys(("saving", "lost", "starting", "waiting"), 0.0)
    while done < steps:
        fails = chance.expovariate(1 / between_failures)
        if fails < times.start:
            spent["starting"] += fails
        else:
            spent["starting"] += times.start
            kept, saves, alive, failed = _job(times, fails - times.start, steps - done, every)
            done += kept
            spent["saving"] += saves * times.save
            spent["lost"] += alive - kept * times.step - saves * times.save
            if not failed:
                spent["waiting"] += times.again if done < steps else 0.0
                continue
        spent["lost"] += times.noticed
        spent["waiting"] += times.again
    trained = steps * times.step
    whole = trained + sum(spent.values())
    return Shares(trained / whole, **{name: seconds / whole for name, seconds in spent.items()})


def _job(times: Times, fails: float, steps: int, every: int) -> tuple[int, int, float, bool]:
    """A job from its first step on: steps that a checkpoint keeps, checkpoints, seconds alive, whether it failed.

    Args:
        fails: seconds after which it would fail.
        steps: that are left.
    """
    round_ = every * times.step + times.save
    limit = None if times.limit is None else times.limit - times.start
    whole, rest = divmod(steps, every)
    natural = whole * round_ + (rest * times.step + times.save if rest else 0.0)
    ends = natural if limit is None else min(natural, limit)
    if fails < ends:
        saves = int(max(0.0, fails - times.writing) // round_)
        return saves * every, saves, fails, True
    if natural <= ends:
        return steps, whole + bool(rest), natural, False
    saves = int(ends // round_)
    more = int((ends - saves * round_ - times.save) // times.step)  # saved early, before the limit
    if more < 1:
        return saves * every, saves, saves * round_, False
    return saves * every + more, saves + 1, saves * round_ + more * times.step + times.save, False


def expected(times: Times, between_failures: float, work: float, runs: int = 20, seed: int = 0) -> Shares:
    """Mean over simulated runs."""
    found = [simulate(times, between_failures, work, seed + number) for number in range(runs)]
    names = Shares.__dataclass_fields__
    return Shares(**{name: statistics.fmean(getattr(one, name) for one in found) for name in names})
