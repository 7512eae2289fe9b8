"""The target `serve` on the emulated cluster with a stand-in for vLLM: one job, stopped cleanly, failures told."""

import json
import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import serving_fakes
from cluster_fixture import Cluster
from serving_site import Site

from deepseek_sft.serving.lasting_endpoint import Endpoint

pytestmark = pytest.mark.cluster
NOTHING = {"node1": "", "node2": ""}


class FakeSite(Site):
    """A site whose serving environment holds the stand-in."""

    def prepare(self, folder: Path) -> None:
        self.fakes = folder / "fakes"
        bin_folder = folder / "environment" / "bin"
        for each in (self.fakes, bin_folder):
            each.mkdir(parents=True)
        python = bin_folder / "python"
        python.write_text(f'#!/bin/sh\nexec {self.project}/.envs/workflow/bin/python "$@"\n')
        vllm = bin_folder / "vllm"
        vllm.write_text(f'#!/bin/sh\nexec {sys.executable} {self.project}/tests/serving_fakes.py "$@"\n')
        for each in (python, vllm):
            each.chmod(0o755)
        activate = f"export PATH={bin_folder}:$PATH"
        self.envs = {"serve": {"python": str(python), "activate": activate}}
        self.pretend_tested()

    def serve(self, *flaws: str, target: str = "serve", profile: str = "profiles/demo") -> int:
        """Ask for the target; returns snakemake's exit code."""
        self.set_flaws(*flaws)
        return self.start_serving(target, profile).wait()

    def set_flaws(self, *flaws: str) -> None:
        for old in self.fakes.iterdir():
            old.unlink()
        for flaw in flaws:
            (self.fakes / flaw).touch()

    def start_serving(self, target: str = "serve", profile: str = "profiles/demo"):
        given = {"environment": {"FAKE_DIR": str(self.fakes)}, "served_model_name": serving_fakes.MODEL}
        forced = [] if target == "serve" else ["--forcerun", target]
        return self.start(target, "--rerun-triggers", "mtime", *forced, profile=profile, **given)

    def processes_on_nodes(self) -> str:
        """Serving processes on all nodes; what a killed program had no time to remove is taken away."""
        left = ""
        for node in NOTHING:
            self.cluster.node(node, "bash", "-c", "rm -rf /tmp/serve-*")
            left += self.left_on_nodes()[node]
        return left

    def job(self) -> dict[str, str]:
        return json.loads((self.results / "serve/deployment/job.json").read_text())

    def scancel(self) -> None:
        self.cluster.exec("scancel", self.job()["job"])
        self.wait_for(lambda: self.cluster.job_state(self.job()["job"]) == "CANCELLED")
        self.wait_for(lambda: self.left_on_nodes() == NOTHING)


@pytest.fixture(scope="module")
def site(project: Path, tmp_path_factory) -> Iterator[FakeSite]:
    folder = tmp_path_factory.mktemp("deployment")
    with Cluster(folder, 2) as cluster:
        made = FakeSite(project, folder, cluster)
        made.prepare(folder)
        yield made


def test_deployment_is_found_again_and_ends_with_scancel_leaving_nothing(site):
    assert site.serve() == 0, site.output()
    job = site.job()
    endpoint = Endpoint.read(site.clone / job["run_dir"] / "endpoint.json")
    assert endpoint.nodes == ["node1", "node2"]
    assert endpoint.url.startswith("http://10.77.0.101:")  # the node's own address, not every one it has
    assert endpoint.text() in site.output()

    assert site.again().wait() == 0
    assert f"job {job['job']} serves this model already" in site.output()
    assert endpoint.url in site.output()
    assert site.job() == job

    receipt = site.results / "receipts/verify_model.json"
    text, times = receipt.read_text(), receipt.stat()
    receipt.write_text(text + "\n")
    assert site.again().wait() == 2
    assert (
        f"still serves an earlier model of this experiment\n  fix: stop it first: scancel {job['job']}" in site.output()
    )
    receipt.write_text(text)
    os.utime(receipt, ns=(times.st_atime_ns, times.st_mtime_ns))  # else the smoke test would be due

    site.scancel()
    assert not (site.clone / job["run_dir"] / "endpoint.json").exists()
    assert "stopped by SIGTERM" in (site.clone / job["log"]).read_text()


def test_start_that_fails_is_told_where_it_was_asked_for(site):
    assert site.serve("bad-flag") != 0
    assert "ended before the model answered (FAILED, exit code 2)" in site.output()
    assert "vLLM does not accept its command line (vllm: error: unrecognized arguments: --bad-flag)" in site.output()
    assert "fix: see serve.engine_args" in site.output()
    assert site.left_on_nodes() == NOTHING


def test_interrupt_before_it_answers_cancels_the_job(site):
    site.set_flaws("never-ready")
    running = site.start_serving()
    site.wait_for(lambda: "submitted job" in site.output() and (site.fakes / "node2.pid").exists(), running)
    running.send_signal(signal.SIGINT)
    assert running.wait(timeout=60) != 0
    site.wait_for(lambda: site.cluster.job_state(site.job()["job"]) == "CANCELLED")
    site.wait_for(lambda: site.left_on_nodes() == NOTHING)


@pytest.mark.parametrize("target", ["smoke_test", "serve"])
def test_job_that_slurm_kills_for_lack_of_memory_names_node_limit_and_fix(site, target):
    assert site.serve("eats-memory", "never-ready", target=target, profile=site.profile_with(mem_mb=500)) != 0
    assert "for lack of memory" in site.output()
    assert re.search("slurmstepd-node2: error: StepId=.* exceeded memory limit", site.output())
    assert re.search("fix: +raise `mem_mb` of ", site.output())
    assert site.processes_on_nodes() == ""
    site.pretend_tested()
