"""Drills whose promise is the same on every kind of site; the files that import them say on which one they run."""

from drill_site import DrillSite


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


def lose_a_node(site: DrillSite, steps: int, after: int) -> None:
    """Take the power from the first node of a job of ``steps`` steps, saved every 50, once it is at step ``after``."""
    site.plan(steps=steps, save_every=50)
    first = site.start()
    site.wait_for_steps(after)
    node = site.cluster.exec("squeue", "--noheader", "--format=%B").stdout.split()[0]
    site.cluster.kill_node(node)
    try:
        assert first.end(400) == 0, first.text()
    finally:
        site.cluster.start_node(node)
    assert len(site.jobs()) == 1
    assert len(site.attempts()) == 2
    assert site.lost() <= 50 + 1
