"""Everything that befalls a training job of days, in minutes: `make drills`. Figures go to docs/reliability.md.

Each promise is about what is left: one job, no step lost or done twice beyond the last save, an exit code.
"""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster_fixture import Cluster
from drill_site import DrillSite, allow_preemption

pytestmark = pytest.mark.cluster
FIGURES = Path("drills.jsonl")


@pytest.fixture(scope="module")
def site(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DrillSite]:
    folder = tmp_path_factory.mktemp("drills")
    with Cluster(folder, 3) as cluster:
        allow_preemption(cluster)
        yield DrillSite(project, folder, cluster)


@pytest.fixture(autouse=True)
def around(site: DrillSite, request: pytest.FixtureRequest) -> Iterator[None]:
    site.cluster.exec("bash", "-c", "pkill -CONT -x slurmctld; true", check=False)
    begin = time.monotonic()
    yield
    site.cluster.exec("bash", "-c", "pkill -CONT -x slurmctld; true", check=False)
    steps = [step for step, _ in site.steps()]
    figures = {
        "drill": request.node.name,
        "jobs": len(site.jobs()),
        "attempts": len(site.attempts()),
        "steps_lost": len(steps) - len(set(steps)),
        "seconds": round(time.monotonic() - begin),
    }
    with open(FIGURES, "a", encoding="utf-8") as stream:
        stream.write(json.dumps(figures) + "\n")
    site.clean()


def once_each(site: DrillSite, last: int) -> bool:
    return [step for step, _ in site.steps()] == list(range(1, last + 1))


def test_ten_time_limits_in_a_row_with_snakemake_killed_after_the_third(site: DrillSite) -> None:
    """The signal comes from scancel, as soon as a start trains: Slurm's own, in tests/stages/test_slurm_life.py, takes
    two minutes each."""
    site.plan(steps=100_000)
    running = site.start()
    for number in range(1, 11):
        site.wait(lambda number=number: len(site.attempts()) == number, f"start {number}")
        site.wait_for_steps(3)
        if number == 4:
            running.kill()
            running = site.start()
        if number < 10:
            site.cluster.exec("scancel", "--signal=USR1", site.living()[0].split()[0])
    (site.results / "train/stop").touch()
    assert running.end(300) == 1
    (site.results / "train/stop").unlink()
    assert len(site.jobs()) == 1
    assert len(site.attempts()) == 10
    assert once_each(site, len(site.steps()))
    site.plan(steps=len(site.steps()) + 20)
    assert site.start().end(300) == 0
    assert once_each(site, len(site.steps()))


def test_kill_9_then_the_same_command(site: DrillSite) -> None:
    site.plan(steps=300)
    first = site.start()
    site.wait_for_steps()
    first.kill()
    second = site.start()
    assert second.end() == 0, second.text()
    assert len(site.jobs()) == 1
    assert once_each(site, 300)


def test_a_closed_terminal_then_the_same_command(site: DrillSite) -> None:
    site.plan(steps=300)
    first = site.start()
    site.wait_for_steps()
    first.send(signal.SIGHUP)
    first.process.wait(60)
    second = site.start()
    assert second.end() == 0, second.text()
    assert len(site.jobs()) == 1
    assert once_each(site, 300)


def test_two_snakemakes_of_one_experiment(site: DrillSite) -> None:
    site.plan(steps=400)
    first = site.start()
    site.wait_for_steps()
    begin = time.monotonic()
    second = site.start()
    assert second.end(120) == 1
    assert "wait for it or stop it" in second.text()
    print(f"refused after {time.monotonic() - begin:.0f} s")
    assert first.end() == 0, first.text()
    assert len(site.jobs()) == 1


def test_other_settings_beside_a_running_job_are_refused(site: DrillSite) -> None:
    site.plan(steps=100_000)
    first = site.start()
    site.wait_for_steps()
    first.kill()
    overlay = site.clone / "overlay.yaml"
    text = overlay.read_text()
    overlay.write_text(text.replace("\ntrain:\n", "\ntrain:\n  learning_rate: 1.0e-4\n", 1))
    try:
        second = site.start()
        assert second.end(120) == 1
        assert "with other settings or inputs" in second.text()
    finally:
        overlay.write_text(text)
    assert len(site.living()) == 1


def test_target_stop_saves_and_ends_for_good(site: DrillSite) -> None:
    site.plan(steps=100_000)
    first = site.start()
    site.wait_for_steps()
    begin = time.monotonic()
    stop = site.start("stop")
    assert stop.end(120) == 0, stop.text()
    print(f"stopped after {time.monotonic() - begin:.0f} s")
    assert first.end(120) == 1
    assert "is not tried again" in first.text()
    assert len(site.jobs()) == 1
    assert site.saved() == len(site.steps()), "nothing is lost"
    again = site.start()
    assert again.end(60) == 1
    assert "to train on: rm results/demo/train/stop" in again.text()
    (site.results / "train/stop").unlink()
    site.plan(steps=len(site.steps()) + 20)
    assert site.start().end() == 0


def test_the_stop_file_ends_for_good(site: DrillSite) -> None:
    site.plan(steps=100_000)
    first = site.start()
    site.wait_for_steps()
    (site.results / "train/stop").touch()
    assert first.end(120) == 1
    assert len(site.jobs()) == 1
    assert len(site.attempts()) == 1
    assert site.saved() == len(site.steps())


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_leaves_no_job(site: DrillSite, times: int) -> None:
    site.plan(steps=100_000, save_every=20)
    first = site.start()
    site.wait_for_steps(30)
    for _ in range(times):
        first.send(signal.SIGINT)
    assert first.end(120) != 0
    site.wait(lambda: not site.living(), "the job's end", 30)
    site.plan(steps=site.saved() + 30)
    assert site.start().end() == 0


def test_ctrl_c_at_any_moment_leaves_no_job(site: DrillSite) -> None:
    """Also while sbatch runs, and while the plugin has emptied its list of jobs to ask for their states."""
    site.plan(steps=100_000)
    for delay in (0.0, 0.3, 0.6, 1.0, 1.5, 2.1):
        running = site.start()
        running.pid()
        time.sleep(delay)
        running.send(signal.SIGINT)
        assert running.end(120) != 0
        site.wait(lambda: not site.living(), f"no job, {delay} s after the start", 30)


def test_a_controller_that_is_stopped_for_a_minute_is_no_news(site: DrillSite) -> None:
    site.plan(steps=400)
    first = site.start()
    site.wait_for_steps()
    site.cluster.exec("pkill", "-STOP", "-x", "slurmctld")
    time.sleep(60)
    site.cluster.exec("pkill", "-CONT", "-x", "slurmctld")
    assert first.end(300) == 0, first.text()
    assert len(site.jobs()) == 1
    assert once_each(site, 400)


def test_sbatch_that_fails_once_does_not_end_the_chain(site: DrillSite) -> None:
    tools = site.clone / "tools"
    tools.mkdir(exist_ok=True)
    (tools / "sbatch").write_text(
        f"#!/bin/bash\nif [ ! -e {tools}/failed ]; then touch {tools}/failed\n"
        "echo 'sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)' >&2\n"
        'exit 1; fi\nPATH=${PATH#*:} exec sbatch "$@"\n'
    )
    (tools / "sbatch").chmod(0o755)
    site.plan(steps=20)
    first = site.start(path=f"{tools}:/usr/local/bin:/usr/bin:/bin")
    assert first.end(300) == 0, first.text()
    assert (tools / "failed").exists()


def test_a_lost_node_costs_the_steps_since_the_last_save(site: DrillSite) -> None:
    site.plan(steps=600, save_every=50)
    first = site.start()
    site.wait_for_steps(120)
    node = site.cluster.exec("squeue", "--noheader", "--format=%B").stdout.split()[0]
    site.cluster.kill_node(node)
    try:
        assert first.end(400) == 0, first.text()
    finally:
        site.cluster.start_node(node)
    assert len(site.jobs()) == 1
    assert len(site.attempts()) == 2
    lost = len(site.steps()) - len({step for step, _ in site.steps()})
    assert lost <= 50 + 1


def test_an_orphan_beside_its_requeue_is_stopped_by_the_lock(site: DrillSite) -> None:
    """slurmd of the first node hangs: Slurm takes the node for dead and starts the job elsewhere; processes live."""
    site.plan(steps=100_000, save_every=20)
    first = site.start()
    site.wait_for_steps(20)
    node = site.cluster.exec("squeue", "--noheader", "--format=%B").stdout.split()[0]
    old = site.attempts()[0]
    site.cluster.node(node, "pkill", "-STOP", "-x", "slurmd")
    try:
        site.wait(lambda: len(site.attempts()) == 2, "the requeued start", 240)
        site.wait_for_steps(100)
        rows = [line.split() for line in (site.results / "train/runs/drill/steps").read_text().splitlines()]
        taken = min(float(row[2]) for row in rows if row[1] != old)
        last = max(float(row[2]) for row in rows if row[1] == old)
        print(f"the orphan's last step came {last - taken:.1f} s after the other's first")
        assert last - taken < 5
        site.plan(steps=site.saved() + 200)
        (site.results / "train/stop").touch()
        assert first.end(120) == 1
        marks = site.results.glob("train/runs/drill/step_*/committed.json")
        by_time = sorted(marks, key=lambda path: path.stat().st_mtime)
        committed = [json.loads(path.read_text())["attempt"] for path in by_time]
        assert committed == sorted(committed), "nothing of the orphan's is committed after the other's"
    finally:
        site.cluster.node(node, "pkill", "-CONT", "-x", "slurmd", check=False)
    assert len(site.jobs()) == 1


def test_three_crashes_without_progress_end_it(site: DrillSite) -> None:
    site.plan(steps=1000, crash=5)
    first = site.start()
    assert first.end(300) == 1
    assert "saved nothing new" in first.text()
    assert len(site.attempts()) == 3
    assert len(site.jobs()) == 1


def test_crashes_with_progress_go_on(site: DrillSite) -> None:
    site.plan(steps=100, crash=25, save_every=20)
    first = site.start()
    assert first.end(400) == 0, first.text()
    assert len(site.attempts()) == 5


def test_squeue_that_is_silent_for_a_minute_at_resume(site: DrillSite) -> None:
    run = site.results / "train/runs/drill"
    run.mkdir(parents=True)
    lock = {"host": "node9", "job_id": "1", "restarts": "0", "pid": 5, "started": "1", "time": "then"}
    (run / "lock.json").write_text(json.dumps(lock))
    site.plan(steps=50)
    first = site.start()
    site.wait(lambda: any("RUNNING" in job for job in site.jobs()), "the job's start")
    site.cluster.exec("pkill", "-STOP", "-x", "slurmctld")
    time.sleep(60)
    site.cluster.exec("pkill", "-CONT", "-x", "slurmctld")
    assert first.end(300) == 0, first.text()
    assert once_each(site, 50)


def test_snakemake_as_a_job_of_its_own_survives_its_own_requeue(site: DrillSite) -> None:
    site.plan(steps=400)
    words = ["--profile", "profiles/drill", "--configfile", "config/experiments/demo.yaml", "overlay.yaml"]
    script = ["sbatch", "--parsable", "--partition=cpu", f"--chdir={site.clone}", "workflow/snakemake.sbatch", *words]
    environment = ["env", f"PYTHONPATH={site.clone}/cluster/fastpoll", f"PATH={site.python.parent}:/usr/bin:/bin"]
    target = "results/demo/receipts/train.json"
    job = site.cluster.exec(*environment, *script, "--", target, cwd=site.clone).stdout.strip()
    site.wait_for_steps()
    site.cluster.exec("scontrol", "requeue", job)
    site.wait(lambda: (site.results / "receipts/train.json").exists(), "the receipt")
    site.wait(lambda: site.cluster.job_state(job) == "COMPLETED", "snakemake's job", 120)
    assert len(site.jobs()) == 1
    assert once_each(site, 400)


def test_a_preemption_costs_the_steps_since_the_last_save(site: DrillSite) -> None:
    site.plan(steps=150, save_every=20)
    first = site.start()
    site.wait_for_steps(30)
    site.cluster.submit("--partition=urgent", "--nodes=3", "--exclusive", wrap="sleep 5")
    assert first.end() == 0, first.text()
    assert len(site.jobs()) == 1
    assert len(site.attempts()) == 2
    assert len(site.steps()) - len({step for step, _ in site.steps()}) <= 20


def test_a_thousand_takers_of_a_dead_lock(project: Path, tmp_path: Path) -> None:
    command = [sys.executable, project / "tests/drills/lock_rounds.py", tmp_path / "locks", "1000"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
