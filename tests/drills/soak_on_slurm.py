"""Real training on the emulated cluster that random faults befall, as `make soak` does without Slurm: node power loss,
the controller killed and started again, Snakemake killed, warnings, lost ranks. All end with the losses of a run that
nothing befell, bit for bit, in one job.

    make soak-slurm SOAK_RUNS=10 SOAK_SEED=18

Results go to ``soak-slurm.jsonl``. Run number N of a seed draws the same faults every time.
"""

import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import drill_site
import pytest
import yaml
from drill_site import DrillSite, Snakemake

pytestmark = pytest.mark.cluster
STEPS = 14
RUNS, SEED = int(os.environ.get("SOAK_RUNS", "3")), int(os.environ.get("SOAK_SEED", "18"))
RECORD = Path("soak-slurm.jsonl")
TRAIN: dict[str, Any] = {"max_steps": STEPS, "save_every_steps": 2, "keep_checkpoints": 3, "micro_batch_size": 2}


class RealSite(DrillSite):
    """A site whose training program is the real one."""

    def activate(self, line: str) -> None:
        values = {"experiment": "demo", "train": TRAIN, "preflight": {"in_training": False}}
        (self.clone / "overlay.yaml").write_text(yaml.safe_dump(values))

    def metrics(self) -> list[dict[str, Any]]:
        files = list(self.results.glob("train/runs/*/metrics.jsonl"))
        lines = files[0].read_text().splitlines() if files else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def losses(self) -> dict[int, float]:
        """Of a step that ran twice the later line counts."""
        return {line["step"]: line["loss"] for line in self.metrics()}

    def reach(self, step: int) -> None:
        self.wait(lambda: any(line["step"] >= step for line in self.metrics()), f"step {step}")

    def job(self) -> str:
        """Id of the training job."""
        return self.living()[0].split()[0]

    def nodes(self) -> list[str]:
        """Nodes of the training job that runs."""
        names = self.cluster.exec("squeue", "--noheader", "--jobs", self.job(), "--format=%N").stdout.strip()
        return self.cluster.exec("scontrol", "show", "hostnames", names).stdout.split()


SITE, site = RealSite, drill_site.site


def node_without_power(site: RealSite, running: Snakemake, chance: random.Random) -> Snakemake:
    node = chance.choice(site.nodes())
    site.cluster.kill_node(node)
    job = site.job()
    site.wait(lambda: "RUNNING" not in site.cluster.job_state(job), "Slurm to notice")
    site.cluster.start_node(node)
    return running


def controller_started_again(site: RealSite, running: Snakemake, chance: random.Random) -> Snakemake:
    words = site.cluster.exec("ps", "-C", "slurmctld", "-o", "args=").stdout.split()
    site.cluster.exec("pkill", "-KILL", "-x", "slurmctld")
    time.sleep(chance.random() * 5)
    site.cluster.exec(*words)
    return running


def controller_asleep(site: RealSite, running: Snakemake, chance: random.Random) -> Snakemake:
    site.stop_controller(10 + chance.random() * 10)
    return running


def snakemake_killed(site: RealSite, running: Snakemake, chance: random.Random) -> Snakemake:
    running.kill()
    return site.start()


def warning(site: RealSite, running: Snakemake, chance: random.Random) -> Snakemake:
    site.cluster.exec("scancel", "--signal=USR1", site.job())
    return running


def rank_killed(site: RealSite, running: Snakemake, chance: random.Random) -> Snakemake:
    node = chance.choice(site.nodes())
    site.cluster.node(node, "pkill", "-KILL", "--oldest", "-f", "xtuner_engine.worker", check=False)
    return running


def preempted(site: RealSite, running: Snakemake, chance: random.Random) -> Snakemake:
    site.cluster.submit("--partition=urgent", "--nodes=3", "--exclusive", wrap="sleep 2")
    return running


FAULTS = (
    *(node_without_power, controller_started_again, controller_asleep, snakemake_killed),
    *(warning, rank_killed, preempted),
)


def deal() -> list[list[Callable[..., Snakemake]]]:
    """Two faults for each run, each kind before one comes up again."""
    chance, queue = random.Random(SEED), []
    for _ in range(2 * RUNS):
        queue += chance.sample(FAULTS, len(FAULTS))
    return [queue[2 * n : 2 * n + 2] for n in range(RUNS)]


@pytest.fixture(scope="module")
def wanted(site: RealSite) -> dict[int, float]:
    """Losses of a run that nothing befalls."""
    first = site.start()
    assert first.end() == 0, first.text()
    losses = site.losses()
    assert len(losses) == STEPS
    site.clean()
    return losses


@pytest.mark.parametrize("number", range(RUNS))
def test_a_run_that_faults_befall_ends_with_the_same_losses(
    site: RealSite, wanted: dict[int, float], number: int
) -> None:
    faults, chance = deal()[number], random.Random(f"{SEED}-{number}")
    begun = time.monotonic()
    running = site.start()
    try:
        for part, fault in enumerate(faults):
            site.reach(chance.randint(2, 5) + 6 * part)
            running = fault(site, running, chance)
        code = running.end()
        entry = {"run": number, "seed": SEED, "faults": [fault.__name__ for fault in faults], "exit_code": code}
        entry |= {"jobs": len(site.jobs()), "equal": site.losses() == wanted}
        entry |= {"steps_trained": len(site.metrics()), "seconds": round(time.monotonic() - begun)}
        with open(RECORD, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(entry) + "\n")
        print(json.dumps(entry))
        assert code == 0, running.text()
        assert entry["equal"], (site.losses(), wanted)
        assert entry["jobs"] == 1
        assert "defect of the workflow" not in running.text()
    finally:
        if running.process.poll() is None:
            running.send(signal.SIGKILL)
        site.clean()
