"""Warnings before a time limit, at every moment of a job: `make drills`. Figures go to docs/reliability.md."""

import drill_site
import pytest
from drill_site import DrillSite

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("figures")]
site, figures = drill_site.site, drill_site.figures


def warn(site: DrillSite) -> None:
    """What Slurm does before a time limit."""
    site.cluster.exec("scancel", "--signal=USR1", site.living()[0].split()[0])


def test_a_warning_during_preflight_starts_no_training(site: DrillSite) -> None:
    site.plan(steps=50, preflight=15)
    first = site.start()
    site.wait(lambda: len(site.programs()) == 1, "preflight")
    warn(site)
    assert first.end() == 0, first.text()
    assert [line.split()[0] for line in site.programs()] == ["preflight", "preflight", "train"]
    assert len(site.jobs()) == 1
    assert site.trained_once_each(50)


def test_a_warning_while_training_starts_is_heard_once_it_listens(site: DrillSite) -> None:
    site.plan(steps=200, deaf=15)
    first = site.start()
    site.wait(lambda: len(site.programs()) == 2, "training's program")
    warn(site)
    site.wait_for_steps(1)
    site.plan(steps=200)
    assert first.end() == 0, first.text()
    assert len(site.attempts()) == 2
    assert sum(attempt == site.attempts()[0] for _, attempt in site.steps()) < 100
    assert len(site.jobs()) == 1
    assert site.trained_once_each(200)


def test_a_warning_that_comes_before_anything_runs_is_known_from_the_time(site: DrillSite) -> None:
    """Slurm's own, to a job that has no step yet: a module system that takes a minute, at the first start."""
    site.profile(runtime=3, slurm_extra="--signal=USR1@135")  # sent 0 to 45 s after the start
    wait = 'while [ "$(squeue --noheader --jobs "$SLURM_JOB_ID" --format %M)" \\< "0:50" ]; do sleep 1; done'
    site.activate(f"[ -e first ] || {{ touch first; {wait}; }}")
    site.plan(steps=50)
    first = site.start()
    assert first.end() == 0, first.text()
    (site.clone / "first").unlink()
    assert not [line for line in site.programs() if line.endswith("-0")]
    assert len(site.jobs()) == 1
    assert site.trained_once_each(50)


def test_ten_time_limits_of_slurm_in_a_row_with_snakemake_killed_after_the_third(site: DrillSite) -> None:
    site.profile(runtime=2, slurm_extra="--signal=USR1@30")  # sent 60 to 90 s after the start
    site.plan(steps=1_000_000)
    running = site.start()
    for number in range(1, 11):
        site.wait(lambda number=number: len(site.attempts()) == number, f"start {number}")
        if number == 4:
            running.kill()
            running = site.start()
    last = len(site.steps()) + 100
    site.plan(steps=last)
    assert running.end(300) == 0, running.text()
    assert len(site.jobs()) == 1
    assert len(site.attempts()) == 10
    assert site.trained_once_each(last)
