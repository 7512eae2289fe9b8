"""Everything that befalls a training job of days, in minutes: `make drills`. Figures go to docs/reliability.md.

Each promise is about what is left: one job, no step lost or done twice beyond the last save, an exit code.
"""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import drill_site
import pytest
from drill_site import DrillSite
from drills.on_every_site import (  # noqa: F401 (pytest collects them here)
    lose_a_node,
    test_a_controller_that_is_stopped_for_a_minute_is_no_news,
)

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("figures")]
site, figures = drill_site.site, drill_site.figures


def test_kill_9_then_the_same_command(site: DrillSite) -> None:
    site.plan(steps=300)
    first = site.start()
    site.wait_for_steps()
    first.kill()
    second = site.start()
    assert second.end() == 0, second.text()
    assert len(site.jobs()) == 1
    assert site.trained_once_each(300)


def test_a_closed_terminal_then_the_same_command(site: DrillSite) -> None:
    site.plan(steps=300)
    first = site.start()
    site.wait_for_steps()
    first.send(signal.SIGHUP)
    first.process.wait(60)
    second = site.start()
    assert second.end() == 0, second.text()
    assert len(site.jobs()) == 1
    assert site.trained_once_each(300)


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


def assert_never_requeued(site: DrillSite) -> None:
    assert len(site.jobs()) == 1
    assert "Restarts=0 " in site.cluster.exec("scontrol", "show", "job", site.jobs()[0].split()[0]).stdout


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
    assert_never_requeued(site)
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
    assert_never_requeued(site)
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


def test_a_plugin_that_turns_to_sacct_keeps_its_job(site: DrillSite) -> None:
    """It does so for good when the controller is slow at the one moment of a poll; there is no slurmdbd."""
    site.plan(steps=100_000)
    first = site.start()
    site.wait_for_steps()
    for _ in range(12):
        if "Falling back to 'sacct'" in first.text():
            break
        site.stop_controller(14)
        time.sleep(3)
    assert "Falling back to 'sacct'" in first.text()
    site.end_soon()
    assert first.end(200) == 0, first.text()
    assert len(site.jobs()) == 1


def test_sbatch_that_fails_once_does_not_end_the_chain(site: DrillSite) -> None:
    tools = site.clone / "tools"
    tools.mkdir(exist_ok=True)
    (tools / "sbatch").write_text(
        "#!/bin/bash\n"
        # --test-only is the check at start
        f"if [[ $* != *--test-only* ]] && [ ! -e {tools}/failed ]; then touch {tools}/failed\n"
        "echo 'sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)' >&2\n"
        'exit 1; fi\nPATH=${PATH#*:} exec sbatch "$@"\n'
    )
    (tools / "sbatch").chmod(0o755)
    site.profile(retries=0)
    site.plan(steps=20)
    first = site.start(path=f"{tools}:/usr/local/bin:/usr/bin:/bin")
    assert first.end(300) == 0, first.text()
    assert (tools / "failed").exists()
    subprocess.run(["rm", "-r", tools], check=True)


def test_a_lost_node_costs_the_steps_since_the_last_save(site: DrillSite) -> None:
    lose_a_node(site, steps=600, after=120)


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
    tools = site.clone / "tools"
    tools.mkdir(exist_ok=True)
    (tools / "squeue").write_text(
        "#!/bin/bash\n"
        "case $* in *--jobs=*) # as training asks\n"
        f"    [ -e {tools}/since ] || date +%s > {tools}/since\n"
        f"    if [ $(($(date +%s) - $(cat {tools}/since))) -lt 60 ]; then\n"
        "        echo 'slurm_load_jobs error: Unable to contact slurm controller (connect failure)' >&2\n"
        '        exit 1\n    fi ;;\nesac\nPATH=${PATH#*:} exec squeue "$@"\n'
    )
    (tools / "squeue").chmod(0o755)
    run = site.results / "train/runs/drill"
    run.mkdir(parents=True)
    lock = {"host": "node9", "job_id": "1", "restarts": "0", "pid": 5, "started": "1", "time": "then"}
    (run / "lock.json").write_text(json.dumps(lock))
    site.activate(f"export PATH={tools}:$PATH")
    site.plan(steps=50)
    first = site.start()
    assert first.end(300) == 0, first.text()
    assert (tools / "since").exists()
    assert [line.split()[0] for line in site.programs()] == ["preflight", "train"]
    assert site.trained_once_each(50)
    subprocess.run(["rm", "-r", tools], check=True)


def test_a_controller_that_is_silent_for_a_minute_when_the_job_starts(site: DrillSite) -> None:
    site.plan(steps=50)
    first = site.start()
    site.wait(lambda: any("RUNNING" in job for job in site.jobs()), "the job's start")
    site.stop_controller(60)
    assert first.end(300) == 0, first.text()
    assert site.trained_once_each(50)


@pytest.mark.parametrize("by", ["hand", "its own limit"])
def test_snakemake_as_a_job_of_its_own_survives_its_own_requeue(site: DrillSite, by: str) -> None:
    site.plan(steps=100_000)
    script = ["sbatch", "--parsable", "--partition=cpu", f"--chdir={site.clone}"]
    script += [*(["--time=2", "--signal=B:USR1@30"] if by == "its own limit" else []), "workflow/snakemake.sbatch"]
    environment = ["env", f"PYTHONPATH={site.clone}/cluster/fastpoll", f"PATH={site.python.parent}:/usr/bin:/bin"]
    words = [*site.words("profiles/drill")[1:], "--", "results/demo/receipts/train.json"]
    job = site.cluster.exec(*environment, *script, *words, cwd=site.clone).stdout.strip()
    site.wait_for_steps()
    if by == "hand":
        site.cluster.exec("scontrol", "requeue", job)
    site.wait(lambda: "Restarts=1 " in site.cluster.exec("scontrol", "show", "job", job).stdout, "the requeue")
    site.wait(lambda: site.cluster.job_state(job) == "RUNNING", "snakemake's second start")
    last = site.end_soon()
    site.wait(lambda: (site.results / "receipts/train.json").exists(), "the receipt")
    site.wait(lambda: site.cluster.job_state(job) == "COMPLETED", "snakemake's job", 180)
    assert len(site.jobs()) == 1
    assert site.trained_once_each(last)


def test_a_preemption_costs_the_steps_since_the_last_save(site: DrillSite) -> None:
    site.plan(steps=150, save_every=20)
    first = site.start()
    site.wait_for_steps(30)
    site.cluster.submit("--partition=urgent", "--nodes=3", "--exclusive", wrap="sleep 5")
    assert first.end() == 0, first.text()
    assert len(site.jobs()) == 1
    assert len(site.attempts()) == 2
    assert site.lost() <= 20


def test_a_thousand_takers_of_a_dead_lock(site: DrillSite, tmp_path: Path) -> None:
    command = [sys.executable, site.clone / "tests/drills/lock_rounds.py", tmp_path / "locks", "1000"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
