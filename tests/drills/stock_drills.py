"""Slurm with its own defaults: `make drills`. Figures go to docs/reliability.md."""

import drill_site
import pytest
from drill_site import DrillSite
from drills.on_every_site import (  # noqa: F401 (pytest collects them here)
    lose_a_node,
    test_a_controller_that_is_stopped_for_a_minute_is_no_news,
    test_a_preemption_costs_the_steps_since_the_last_save,
)

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("figures")]
site, figures = drill_site.site, drill_site.figures
KIND = ("--stock",)


def test_a_lost_node_costs_the_steps_since_the_last_save_where_jobs_are_not_asked_to_requeue(site: DrillSite) -> None:
    """JobRequeue=1: Slurm requeues what does not ask, so the profile may leave the line out."""
    site.profile(**{"slurm-requeue": None})
    lose_a_node(site, steps=400, after=80)
