"""A training job meets its time limit, a preemption, the death of Snakemake; the rest: `make drills`. About 3 min."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster_fixture import Cluster
from drill_site import DrillSite

pytestmark = pytest.mark.cluster
LIMIT = {"runtime": 1, "slurm_extra": "--signal=USR1@30"}


@pytest.fixture(scope="module")
def site(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DrillSite]:
    folder = tmp_path_factory.mktemp("drills")
    with Cluster(folder, 3) as cluster:
        yield DrillSite(project, folder, cluster)


@pytest.fixture(autouse=True)
def clean(site: DrillSite) -> Iterator[None]:
    yield
    site.clean()


def test_a_time_limit_costs_no_step_and_no_second_job(site: DrillSite) -> None:
    site.profile(**LIMIT)
    site.plan(steps=400)
    snakemake = site.start()
    assert snakemake.end() == 0, snakemake.text()
    assert [step for step, _ in site.steps()] == list(range(1, 401))
    assert len(site.jobs()) == 1
    assert len(site.attempts()) >= 2


def test_the_same_command_finds_the_job_of_a_snakemake_that_was_killed(site: DrillSite) -> None:
    site.plan(steps=250)
    first = site.start()
    site.wait_for_steps()
    first.kill()
    second = site.start()
    assert second.end() == 0, second.text()
    assert "of an earlier start works on train: waiting for it" in second.text()
    assert len(site.jobs()) == 1
    assert [step for step, _ in site.steps()] == list(range(1, 251))
