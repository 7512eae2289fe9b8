"""A training job meets its time limit, a preemption, the death of Snakemake; the rest: `make drills`. About 3 min."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster_fixture import Cluster
from drill_site import DrillSite, allow_preemption

pytestmark = pytest.mark.cluster
LIMIT = {"runtime": 2, "slurm_extra": "--signal=USR1@60"}  # Slurm looks every 30 s


@pytest.fixture(scope="module")
def site(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DrillSite]:
    folder = tmp_path_factory.mktemp("drills")
    with Cluster(folder, 3) as cluster:
        allow_preemption(cluster)
        yield DrillSite(project, folder, cluster)


@pytest.fixture(autouse=True)
def clean(site: DrillSite) -> Iterator[None]:
    yield
    site.clean()


def test_a_time_limit_costs_no_step_and_no_second_job(site: DrillSite) -> None:
    site.profile(**LIMIT)
    site.plan(steps=700)
    snakemake = site.start()
    assert snakemake.end() == 0, snakemake.text()
    assert [step for step, _ in site.steps()] == list(range(1, 701))
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


def test_a_preempted_job_goes_on_under_its_id_from_the_last_save(site: DrillSite) -> None:
    site.plan(steps=150, save_every=20)
    snakemake = site.start()
    site.wait_for_steps(30)
    site.cluster.submit("--partition=urgent", "--nodes=3", "--exclusive", wrap="sleep 5")
    assert snakemake.end() == 0, snakemake.text()
    assert len(site.jobs()) == 1
    assert len(site.attempts()) == 2
    steps = [step for step, _ in site.steps()]
    assert sorted(set(steps)) == list(range(1, 151))
    assert len(steps) - len(set(steps)) <= 20
