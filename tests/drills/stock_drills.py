"""Slurm with its own defaults: `make drills`. Figures go to docs/reliability.md."""

import drill_site
import pytest
from drill_site import DrillSite

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("figures")]
site, figures = drill_site.site, drill_site.figures
KIND = ("--stock",)


def test_a_controller_that_is_stopped_for_a_minute_is_no_news(site: DrillSite) -> None:
    site.plan(steps=400)
    first = site.start()
    site.wait_for_steps()
    site.stop_controller(60)
    assert first.end(300) == 0, first.text()
    assert len(site.jobs()) == 1
    assert site.trained_once_each(400)


def test_a_preemption_costs_the_steps_since_the_last_save(site: DrillSite) -> None:
    site.profile(slurm_partition="preemptible")
    site.plan(steps=150, save_every=20)
    first = site.start()
    site.wait_for_steps(30)
    site.cluster.submit("--partition=cpu", "--nodes=3", "--exclusive", wrap="sleep 5")
    assert first.end() == 0, first.text()
    assert len(site.jobs()) == 1
    assert len(site.attempts()) == 2
    assert site.lost() <= 20


def test_a_lost_node_costs_the_steps_since_the_last_save_where_jobs_are_not_asked_to_requeue(site: DrillSite) -> None:
    """JobRequeue=1: Slurm requeues what does not ask, so the profile may leave the line out."""
    site.profile(**{"slurm-requeue": None})
    site.plan(steps=400, save_every=50)
    first = site.start()
    site.wait_for_steps(80)
    node = site.cluster.exec("squeue", "--noheader", "--format=%B").stdout.split()[0]
    site.cluster.kill_node(node)
    try:
        assert first.end(400) == 0, first.text()
    finally:
        site.cluster.start_node(node)
    assert len(site.jobs()) == 1
    assert len(site.attempts()) == 2
    assert site.lost() <= 50 + 1
