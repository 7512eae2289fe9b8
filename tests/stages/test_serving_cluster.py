"""Real vLLM over two nodes of the emulated cluster, by the workflow's own targets: through Ray, lasting, and killed."""

import json
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster_fixture import Cluster
from scripted_model import ANSWER, REASONING
from serving_site import Site

pytestmark = [pytest.mark.stage("serve-cpu"), pytest.mark.cluster]
NOTHING = {"node1": "", "node2": ""}


@pytest.fixture(scope="module")
def site(project: Path, environment, tmp_path_factory) -> Iterator[Site]:
    """One cluster and one model for all tests."""
    environment("serve-cpu")
    folder = tmp_path_factory.mktemp("serving")
    with Cluster(folder, 2) as cluster:
        yield Site(project, folder, cluster)


@pytest.fixture(scope="module")
def through_ray(site) -> str:
    """A smoke test through Ray whose engine is killed on the second node while it loads, tried again by Snakemake.

    Returns the log of the first attempt.
    """
    running = site.start("smoke_test", "--retries", "1", backend="ray")
    site.wait_for(lambda: site.kill_engine("node2"), running)
    killed = time.monotonic()
    site.wait_for(lambda: "error: the deployment ended" in site.attempt(1), running)
    print(f"through Ray, killed while loading: failed after {time.monotonic() - killed:.1f} s")
    assert running.wait() == 0, site.output()[-8000:]
    return site.attempt(1)


def test_worker_of_ray_killed_on_the_second_node_while_it_loads_is_named_with_its_node(through_ray):
    assert "error: the deployment ended because of a failure" in through_ray
    # Ray tells of it, or the node's own watch, whichever looks first.
    named = r"^0: node2: (Ray's worker|ray::RayWorkerProc\S*) \(pid \d+\) has gone"
    assert re.search(named, through_ray, re.MULTILINE), through_ray
    assert "node2| " in through_ray


def test_smoke_test_through_ray_passes_and_its_receipt_names_hosts_and_processes(site, through_ray):
    receipt = json.loads((site.results / "receipts/smoke_test.json").read_text())
    assert receipt["hosts"] == ["node1", "node2"]
    nodes = receipt["figures"]["nodes"]
    assert [entry["address"] for entry in nodes.values()] == ["10.77.0.101", "10.77.0.102"]
    for entry in nodes.values():
        names = [process.split()[0] for process in entry["processes"]]
        assert "ray" in names
        assert any("RayWorkerProc" in name for name in names), names
    assert "Ray counts 2 of 2 nodes: 10.77.0.101, 10.77.0.102" in site.node_log("job-*", "node1")
    assert all(check["passed"] for check in receipt["figures"]["checks"].values())
    assert site.left_on_nodes() == NOTHING


def test_lasting_deployment_answers_whoever_has_the_key_and_ends_when_a_node_does(site):
    site.pretend_tested()
    running = site.start("serve", "--rerun-triggers", "mtime", backend="native")
    assert running.wait() == 0, site.output()[-8000:]
    job = json.loads((site.results / "serve/deployment/job.json").read_text())
    endpoint = json.loads((Path(site.clone) / job["run_dir"] / "endpoint.json").read_text())
    for line in (endpoint["url"], endpoint["curl"], "stop   scancel " + job["job"]):
        assert line in site.output()

    # The ready request, as a user on the login node would paste it; without the key nobody is let in.
    answer = json.loads(site.cluster.exec("bash", "-c", endpoint["curl"], cwd=site.clone).stdout)
    message = answer["choices"][0]["message"]
    assert (message["reasoning"].strip(), message["content"].strip()) == (REASONING, ANSWER)
    refused = ["curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", f"{endpoint['url']}/models"]
    assert site.cluster.exec(*refused).stdout == "401"
    key = (site.results / "serve/api_key").read_text().strip()
    shown = [path for path in site.clone.rglob("*") if path.is_file() and key.encode() in path.read_bytes()]
    assert shown == [site.results / "serve/api_key"]
    assert key not in "".join(site.cluster.node(node, "ps", "-eo", "args").stdout for node in NOTHING)

    # A long request is being answered when the second node's engine is killed.
    endless = endpoint["curl"].replace('"messages"', '"ignore_eos": true, "max_tokens": 480, "messages"')
    request = subprocess.Popen(
        site.cluster.command("exec", "bash", "-c", endless),
        cwd=site.clone,
        env=site.cluster.environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    metrics = ["curl", "-s", endpoint["url"].replace("/v1", "/metrics")]
    site.wait_for(lambda: re.search(r"^vllm:num_requests_running.* 1\.0$", site.cluster.exec(*metrics).stdout, re.M))
    assert site.kill_engine("node2")
    killed = time.monotonic()
    site.wait_for(lambda: site.cluster.job_state(job["job"]) == "FAILED")
    print(f"killed during a request: the job failed after {time.monotonic() - killed:.1f} s")
    request.wait(timeout=60)
    log = (site.clone / job["log"]).read_text(errors="replace")
    # Of its engine, or of the worker that was killed where the engine takes long to end: whoever is seen first.
    assert re.search(r"node2: (vllm ended with exit code|VLLM::Worker\w* \(pid \d+\) has gone)", log)
    assert "node2| " in log
    assert not (Path(site.clone) / job["run_dir"] / "endpoint.json").exists()
    assert site.left_on_nodes() == NOTHING


def test_engine_killed_on_the_second_node_while_it_loads_ends_the_target_with_its_name(site):
    running = site.again()  # natively, like the deployment before it
    site.wait_for(lambda: site.kill_engine("node2"), running)
    killed = time.monotonic()
    assert running.wait(timeout=300) == 5
    print(f"natively, killed while loading: the target failed after {time.monotonic() - killed:.1f} s")
    assert "error: the deployment ended because of a failure" in site.output()
    assert "node2: vllm ended with exit code" in site.output()
    assert "node2| " in site.output()
    assert site.left_on_nodes() == NOTHING
