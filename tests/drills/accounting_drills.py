"""Where slurmdbd knows all jobs, and sacct is asked: `make drills`. Figures go to docs/reliability.md."""

import drill_site
import pytest
from drill_site import DrillSite
from drills.on_every_site import (  # noqa: F401 (pytest collects them here)
    test_a_controller_that_is_stopped_for_a_minute_is_no_news,
    test_a_preemption_costs_the_steps_since_the_last_save,
)

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("figures")]
site, figures = drill_site.site, drill_site.figures
KIND = ("--accounting",)


def test_the_job_of_a_snakemake_that_was_killed_is_found_again(site: DrillSite) -> None:
    site.plan(steps=200)
    first = site.start()
    site.wait_for_steps()
    first.kill()
    second = site.start()
    assert second.end() == 0, second.text()
    assert len(site.jobs()) == 1
