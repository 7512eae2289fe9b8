"""A copy of the project on an emulated cluster, done up to training, whose training program is a stand-in.

Rules, stage.sh, templates, Snakemake, its Slurm plugin and Slurm are the real ones (tests/drills/training.py).
"""

import itertools
import json
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from cluster_copy import ClusterCopy
from cluster_fixture import Cluster

from deepseek_sft import files

DEADLINE_S = 600  # only a hang reaches it
FIGURES = Path("drills.jsonl")


def allow_preemption(cluster: Cluster) -> None:
    """Give the running cluster a partition ``urgent`` whose jobs take the nodes of partition train."""
    conf = cluster.state / "state" / "slurm.conf"
    text = conf.read_text()
    assert "\nPartitionName=train\n" in text
    rules = "PreemptType=preempt/partition_prio\nPreemptMode=REQUEUE\n"
    ranks = "PartitionName=train PriorityTier=1\nPartitionName=urgent PriorityTier=100 PreemptMode=OFF\n"
    conf.write_text(rules + text.replace("PartitionName=train\n", ranks))
    cluster.exec("scontrol", "reconfigure")
    assert "partition_prio" in cluster.exec("scontrol", "show", "config").stdout


@pytest.fixture(scope="module")
def site(
    project: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator["DrillSite"]:
    """One site for all tests of a module, which may set ``KIND`` (options of `vcluster up`), ``SITE`` (class)."""
    folder = tmp_path_factory.mktemp("drills")
    kind = getattr(request.module, "KIND", ())
    cluster = Cluster(folder, 3)
    cluster.up(*kind, timeout=300)
    try:
        if not kind:
            allow_preemption(cluster)
        yield getattr(request.module, "SITE", DrillSite)(project, folder, cluster)
    finally:
        cluster.down()


@pytest.fixture
def clean(site: "DrillSite") -> Iterator[None]:
    yield
    site.clean()


@pytest.fixture
def figures(site: "DrillSite", request: pytest.FixtureRequest) -> Iterator[None]:
    """Write what the drill has cost to ``drills.jsonl``, and clean up."""
    site.wake_controller()
    begin = time.monotonic()
    yield
    site.wake_controller()
    steps = [step for step, _ in site.steps()]
    values = {
        "drill": request.node.name,
        "kind": " ".join(getattr(request.module, "KIND", ())),
        "jobs": len(site.jobs()),
        "attempts": len(site.attempts()),
        "steps_lost": len(steps) - len(set(steps)),
        "seconds_to_recover": site.recoveries(),
        "seconds": round(time.monotonic() - begin),
    }
    with open(FIGURES, "a", encoding="utf-8") as stream:
        stream.write(json.dumps(values) + "\n")
    site.clean()


class DrillSite(ClusterCopy):
    """The copy and its cluster.

    Args:
        project: the checkout under test.
        folder: existing folder that the nodes see.
        cluster: running.
    """

    def __init__(self, project: Path, folder: Path, cluster: Cluster):
        super().__init__(project, folder, cluster)
        self.activate("")
        self.profile()
        before = [str(self.results / f"receipts/{name}.json") for name in ("prepare_model", "refine_plan")]
        before = [str(Path(name).relative_to(self.clone)) for name in before]
        done = subprocess.run(
            [*self.words("profiles/local"), "--quiet", "all", "--", *before],
            cwd=self.clone,
            env=self.variables(),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        self.planned: dict[str, int] = {}
        self.longest: float = DEADLINE_S  # cuts every wait short
        self.number = self.forgotten = 0  # starts of snakemake; the last job before this drill

    def activate(self, line: str) -> None:
        """Write overlay.yaml: the stand-in as training's interpreter, after a line of shell."""
        environment = {"python": "tests/drills/python", "activate": line}
        train = {"environment": {"DRILL_PYTHON": str(self.python)}}
        values = {"experiment": "demo", "envs": {"train": environment}, "train": train}
        (self.clone / "overlay.yaml").write_text(yaml.safe_dump(values))

    def profile(self, **train: object) -> None:
        """Write profiles/drill: the demo's, with other resources for train."""
        profile = yaml.safe_load((self.clone / "profiles/demo/config.yaml").read_text())
        options = {key: train.pop(key) for key in list(train) if "-" in key or key == "retries"}
        profile["set-resources"]["train"] |= {"runtime": 20, **train}
        profile["set-resources"]["train"].setdefault("slurm_extra", "")
        if "slurm_extra" not in train:
            profile["set-resources"]["train"]["slurm_extra"] = ""
        profile["printshellcmds"] = False
        profile = {key: value for key, value in (profile | options).items() if value is not None}
        (self.clone / "profiles/drill").mkdir(exist_ok=True)
        (self.clone / "profiles/drill/config.yaml").write_text(yaml.safe_dump(profile))

    def plan(self, steps: int, **more: int) -> None:
        """What the stand-in does from its next start on; ``steps`` also of one that runs (tests/drills/training.py)."""
        self.results.mkdir(parents=True, exist_ok=True)
        values = {"steps": steps} | dict.fromkeys(("save_every", "crash", "preflight", "deaf"), 0) | more
        files.write_json(self.results / "drill.json", values)
        self.planned = values

    def end_soon(self, more: int = 50) -> int:
        """Let what trains end after some more steps; returns the last one."""
        last = max(step for step, _ in self.steps()) + more
        self.plan(last, **{key: value for key, value in self.planned.items() if key != "steps"})
        return last

    def programs(self) -> list[str]:
        """Programs that have begun on the first node, ``preflight`` or ``train`` with the attempt, in order."""
        file = self.results / "drill.programs"
        return file.read_text().splitlines() if file.exists() else []

    def start(self, *targets: str, path: str | None = None) -> "Snakemake":
        """Start snakemake on the login node, training unless another target is named."""
        self.number += 1
        log = self.clone / f"snakemake-{self.number}.log"
        targets = targets or ("results/demo/receipts/train.json",)
        process = self.background(self.on_login(*self.words("profiles/drill"), "--", *targets, path=path), log)
        return Snakemake(self, process, log)

    def jobs(self) -> list[str]:
        """Training jobs since the last ``clean`` in order, ``id state``, those that have ended included."""
        listed = self.cluster.exec("squeue", "--noheader", "--states=all", "--format=%i %T %k", timeout=60).stdout
        rows = [line.split() for line in listed.splitlines() if "rule_train" in line]
        rows = sorted((row for row in rows if int(row[0]) > self.forgotten), key=lambda row: int(row[0]))
        return [f"{row[0]} {row[1]}" for row in rows]

    def living(self) -> list[str]:
        return [job for job in self.jobs() if job.split()[1] in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING")]

    def stop_controller(self, seconds: float) -> None:
        """Keep slurmctld from answering for a while."""
        self.cluster.exec("pkill", "-STOP", "-x", "slurmctld")
        time.sleep(seconds)
        self.wake_controller()

    def wake_controller(self) -> None:
        self.cluster.exec("bash", "-c", "pkill -CONT -x slurmctld; true", check=False)

    def lost(self) -> int:
        """Steps that were trained more than once."""
        steps = [step for step, _ in self.steps()]
        return len(steps) - len(set(steps))

    def trained_once_each(self, last: int) -> bool:
        return [step for step, _ in self.steps()] == list(range(1, last + 1))

    def steps(self) -> list[tuple[int, str]]:
        """Step and attempt of every step ever trained."""
        return [(int(row[0]), row[1]) for row in self._step_lines()]

    def _step_lines(self) -> list[list[str]]:
        """Step, attempt and time of every whole line that the stand-in has written."""
        file = self.results / "train/runs/drill/steps"
        rows = [line.split() for line in file.read_text().splitlines()] if file.exists() else []
        return [row for row in rows if len(row) == 3]

    def attempts(self) -> list[str]:
        return list(dict.fromkeys(attempt for _, attempt in self.steps()))

    def recoveries(self) -> list[float]:
        """Seconds from the last step of each attempt to the first one of the next."""
        pairs = itertools.pairwise(self._step_lines())
        return [round(float(b[2]) - float(a[2]), 1) for a, b in pairs if a[1] != b[1]]

    def saved(self) -> int:
        marks = self.results.glob("train/runs/drill/step_*/committed.json")
        return max((int(path.parent.name[5:]) for path in marks), default=0)

    def wait(self, condition: Callable[[], object], why: str, deadline: float = DEADLINE_S) -> float:
        """Wait until ``condition`` holds; returns the seconds it took."""
        deadline = min(deadline, self.longest)
        begin = time.monotonic()
        while not condition():
            if time.monotonic() - begin > deadline:
                log = self.clone / f"snakemake-{self.number}.log"
                pytest.fail(f"waited {deadline:.0f} s for {why}\n{log.read_text()[-4000:]}\n{self.jobs()}")
            time.sleep(0.25)
        return time.monotonic() - begin

    def wait_for_steps(self, more: int = 5) -> float:
        """Wait until so many further steps are trained."""
        before = len(self.steps())
        return self.wait(lambda: len(self.steps()) >= before + more, f"{more} steps")

    def clean(self) -> None:
        """Forget training, and end what a failed drill has left."""
        self.cluster.exec("bash", "-c", "scancel --me; pkill -KILL -f bin/snakemake; true", check=False)
        # Slurm drains a node whose processes did not die in time, as on a busy machine.
        drained = "sinfo --noheader --Node --states=drain --partition=cpu --format=%N"
        resume = f"for node in $({drained}); do scontrol update nodename=$node state=resume; done; true"
        self.cluster.exec("bash", "-c", resume, check=False)
        self.wait(lambda: not self.living(), "jobs to end", 120)
        self.forgotten = max([self.forgotten, *(int(job.split()[0]) for job in self.jobs())])
        made = ("train", "receipts/train.json", "drill.programs")
        subprocess.run(["rm", "-rf", *(self.results / name for name in made)], check=True)
        subprocess.run(["rm", "-rf", self.logs / "train", self.logs / "snakemake", self.logs / "train.log"], check=True)
        subprocess.run(["rm", "-rf", self.clone / ".snakemake/locks"], check=True)
        self.activate("")
        self.profile()


class Snakemake:
    """One running snakemake."""

    def __init__(self, site: DrillSite, process: subprocess.Popen, log: Path):
        self.site, self.process, self.log = site, process, log

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def send(self, number: signal.Signals) -> None:
        """Signal it on the login node, where its record says it runs."""
        self.site.cluster.exec("kill", f"-{number.value}", self.pid())

    def pid(self) -> str:
        """Process id on the login node; that of the newest record."""
        found: list[Path] = []

        def record() -> bool:
            found[:] = sorted(self.site.logs.glob("snakemake/*.json"), key=lambda path: path.stat().st_mtime)
            return bool(found)

        self.site.wait(record, "snakemake's record", 60)
        return str(json.loads(found[-1].read_text())["holder"]["pid"])

    def kill(self) -> None:
        self.send(signal.SIGKILL)
        self.process.wait(60)

    def end(self, deadline: float = DEADLINE_S) -> int:
        """Exit code, once it has ended."""
        deadline = min(deadline, self.site.longest)
        try:
            return self.process.wait(deadline)
        except subprocess.TimeoutExpired:
            pytest.fail(f"snakemake has not ended after {deadline:.0f} s:\n{self.text()[-4000:]}\n{self.site.jobs()}")
