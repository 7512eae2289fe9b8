"""A training job meets its time limit, a preemption, the death of Snakemake; the rest: `make drills`."""

import drill_site
import pytest
from drill_site import DrillSite

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("clean")]
site, clean = drill_site.site, drill_site.clean
LIMIT = {"runtime": 2, "slurm_extra": "--signal=USR1@60"}  # Slurm looks every 30 s


ENDLESS = 1_000_000


def test_a_time_limit_costs_no_step_and_no_second_job(site: DrillSite) -> None:
    site.profile(**LIMIT)
    site.plan(steps=ENDLESS)
    snakemake = site.start()
    site.wait(lambda: len(site.attempts()) == 2, "the start after the limit")
    last = site.end_soon()
    assert snakemake.end() == 0, snakemake.text()
    assert site.trained_once_each(last)
    assert len(site.jobs()) == 1


def test_the_same_command_finds_the_job_of_a_snakemake_that_was_killed(site: DrillSite) -> None:
    site.plan(steps=ENDLESS)
    first = site.start()
    site.wait_for_steps()
    first.kill()
    second = site.start()
    site.wait(lambda: "of an earlier start works on train: waiting for it" in second.text(), "the job to be found")
    last = site.end_soon()
    assert second.end() == 0, second.text()
    assert len(site.jobs()) == 1
    assert site.trained_once_each(last)


def test_a_preempted_job_goes_on_under_its_id_from_the_last_save(site: DrillSite) -> None:
    site.plan(steps=ENDLESS, save_every=20)
    snakemake = site.start()
    site.wait_for_steps(30)
    site.cluster.submit("--partition=urgent", "--nodes=3", "--exclusive", wrap="sleep 5")
    site.wait(lambda: len(site.attempts()) == 2, "the start after the preemption")
    last = site.end_soon()
    assert snakemake.end() == 0, snakemake.text()
    assert len(site.jobs()) == 1
    assert {step for step, _ in site.steps()} == set(range(1, last + 1))
    assert site.lost() <= 20
