"""serve_node over several nodes, with a stand-in for vLLM: who ends whom, with which code, leaving what behind."""

import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import serving_fakes

from deepseek_sft import receipts
from deepseek_sft.serving import node_channel, watch

PROJECT = Path(__file__).resolve().parents[3]
DEADLINE_S = 60  # generous: only a hang reaches it


@dataclasses.dataclass
class Deployment:
    """Two or more serve_node programs on loopback that take themselves for nodes of one allocation."""

    folder: Path
    nodes: int
    programs: dict[str, subprocess.Popen]

    @property
    def run_dir(self) -> Path:
        return self.folder / "serve" / "job-7"

    @property
    def receipt(self) -> Path:
        return self.folder / "receipts" / "smoke_test.json"

    def start(self, *, smoke_test: bool = False, flaws: tuple[str, ...] = (), settings: dict | None = None) -> None:
        fakes = self.folder / "fakes"
        bin_folder = self.folder / "bin"
        for each in (fakes, bin_folder):
            each.mkdir(parents=True)
        if not (self.folder / "model").exists():
            serving_fakes.write_model(self.folder / "model")
        for flaw in flaws:
            (fakes / flaw).touch()
        vllm = bin_folder / "vllm"
        vllm.write_text(f'#!/bin/sh\nexec {sys.executable} {serving_fakes.__file__} "$@"\n')
        vllm.chmod(0o755)
        model = {"model": str(self.folder / "model")}
        receipts.write(
            self.folder / "verify_model.json", "verify_model", inputs={}, settings={}, result=model, figures={}
        )
        value = {
            "tensor_parallel_size": 1,
            "pipeline_parallel_size": self.nodes,
            "max_model_len": serving_fakes.CONTEXT,
            "served_model_name": serving_fakes.MODEL,
            "network_interface": "lo",
            "ready_timeout_s": DEADLINE_S,
            "stop_grace_s": 2,
            "smoke_test": {"max_tokens": 16, "benchmark": False, "logprobs_max_parameters": 0},
        } | (settings or {})
        (self.folder / "settings.json").write_text(json.dumps(value))
        for rank in reversed(range(self.nodes)):
            environment = os.environ | {
                "SLURM_JOB_ID": "7",
                "SLURM_NODEID": str(rank),
                "SLURM_NNODES": str(self.nodes),
                "SLURMD_NODENAME": f"n{rank}",
                "PATH": f"{bin_folder}:{os.environ['PATH']}",
                "FAKE_DIR": str(fakes),
            }
            words = ["--model-receipt", self.folder / "verify_model.json", "--settings", self.folder / "settings.json"]
            words += ["--run-dir", self.run_dir, *(["--smoke-test", self.receipt] if smoke_test else [])]
            with open(self.folder / f"n{rank}.out", "wb") as output:
                self.programs[f"n{rank}"] = subprocess.Popen(
                    [sys.executable, PROJECT / "workflow/scripts/serve_node.py", *words],
                    env=environment,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )

    def output(self, node: str) -> str:
        return (self.folder / f"{node}.out").read_text()

    def wait_for(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not condition():
            assert time.monotonic() < deadline, {node: self.output(node) for node in self.programs}
            time.sleep(0.05)

    def wait_until_serving(self) -> None:
        self.wait_for((self.run_dir / "endpoint.json").exists)

    def codes(self) -> list[int]:
        """Exit codes by rank."""
        return [self.programs[f"n{rank}"].wait(DEADLINE_S) for rank in range(self.nodes)]

    def pid_of_engine(self, node: str) -> int:
        path = self.folder / "fakes" / f"{node}.pid"
        self.wait_for(lambda: path.exists() and path.read_text() != "")
        return int(path.read_text())

    def alive(self, node: str = "") -> list[list[str]]:
        """Processes of this deployment that still run; where a node is given, its own, without the node program."""
        mine = []
        for process in psutil.process_iter():
            try:
                environment = process.environ()
                if environment.get("FAKE_DIR") != str(self.folder / "fakes") or process.status() == "zombie":
                    continue
                if not node or (environment["SLURMD_NODENAME"] == node and process.pid != self.programs[node].pid):
                    mine.append(process.cmdline())
            except psutil.Error:
                continue
        return mine


@pytest.fixture
def deployment(tmp_path: Path, request) -> Iterator[Deployment]:
    made = Deployment(tmp_path, getattr(request, "param", 2), {})
    yield made
    for program in made.programs.values():
        if program.poll() is None:
            program.kill()
    for path in tmp_path.glob("fakes/*.folder"):  # a program that was killed cannot remove its own
        shutil.rmtree(path.read_text(), ignore_errors=True)


def test_smoke_test_over_two_nodes_leaves_a_receipt_and_nothing_else(deployment):
    deployment.start(smoke_test=True)
    assert deployment.codes() == [0, 0], deployment.output("n0")
    receipt = receipts.read(deployment.receipt, "smoke_test")
    assert receipt["hosts"] == ["n0", "n1"]
    assert receipt["figures"]["time_to_ready_s"] > 0
    nodes = receipt["figures"]["nodes"]
    assert [(node, entry["address"]) for node, entry in nodes.items()] == [("n0", "127.0.0.1"), ("n1", "127.0.0.1")]
    for node, entry in nodes.items():
        assert f"vllm {deployment.pid_of_engine(node)}" in entry["processes"]
    assert (deployment.folder / "serve" / "transcript.jsonl").exists()
    places = [json.loads((deployment.run_dir / f"n{rank}.json").read_text()) for rank in (0, 1)]
    assert [place["pid"] for place in places] == [deployment.programs[node].pid for node in ("n0", "n1")]
    assert "--headless" in (deployment.run_dir / "n1.log").read_text()
    assert deployment.alive() == []
    assert not (deployment.run_dir / node_channel.RENDEZVOUS).exists()
    assert not any(Path(path.read_text()).exists() for path in (deployment.folder / "fakes").glob("*.folder"))


@pytest.mark.parametrize("deployment", [1], indirect=True)
def test_one_node_needs_no_multi_node_flags(deployment):
    deployment.start(smoke_test=True)
    assert deployment.codes() == [0], deployment.output("n0")
    assert "--nnodes" not in (deployment.run_dir / "n0.log").read_text()


def test_failed_gate_is_the_heads_exit_code_and_workers_end_in_order(deployment):
    deployment.start(smoke_test=True, flaws=("finish_reason",))
    assert deployment.codes() == [3, 0]
    assert not deployment.receipt.exists()
    assert "finish_reason: finish reason is length" in deployment.output("n0")


@pytest.mark.parametrize("node", ["n0", "n1"])
@pytest.mark.parametrize("deployment", [3], indirect=True)
def test_killed_engine_ends_every_node_with_its_name_and_last_lines(deployment, node):
    deployment.start()
    deployment.wait_until_serving()
    os.kill(deployment.pid_of_engine(node), signal.SIGKILL)
    assert deployment.codes() == [5, 5, 5]
    for each in deployment.programs:
        assert f"{node}: vllm was killed by SIGKILL" in deployment.output(each)
        assert f"{node}| fake vllm on {node}" in deployment.output(each)
    assert deployment.alive() == []


def test_no_node_leaves_before_all_have_cleaned_up(deployment):
    """Slurm kills the others soon after one task has failed."""
    deployment.start(flaws=("stubborn",))
    deployment.wait_until_serving()
    deployment.pid_of_engine("n0")
    deployment.wait_for((deployment.folder / "fakes" / "n1.grandchild").exists)
    os.kill(deployment.pid_of_engine("n1"), signal.SIGKILL)
    deployment.programs["n1"].wait(DEADLINE_S)
    assert deployment.alive("n0") == []
    assert not Path((deployment.folder / "fakes/n0.folder").read_text()).exists()
    assert deployment.codes() == [5, 5]


def test_lost_worker_ends_every_node_even_if_the_engine_goes_on_as_if_nothing_had_happened(deployment):
    deployment.start(flaws=("worker",))
    deployment.wait_until_serving()
    written = deployment.folder / "fakes/n1.worker"
    deployment.wait_for(lambda: written.exists() and written.read_text() != "")
    worker = int(written.read_text())
    time.sleep(3 * watch.OBSERVE_EVERY_S)  # by then it is watched
    os.kill(worker, signal.SIGKILL)
    assert deployment.codes() == [5, 5]
    assert f"n1: VLLM::Worker_TP0 (pid {worker}) has gone" in deployment.output("n0")
    assert "n1| fake vllm on n1" in deployment.output("n0")
    assert deployment.alive() == []


def test_worker_that_only_ray_misses_is_named_first_with_its_node_and_that_nodes_last_lines(deployment):
    deployment.start(flaws=("ray-lost-a-worker",))
    assert deployment.codes() == [5, 5]
    for each in deployment.programs:
        (_, first, *_) = deployment.output(each).split("error: ")[1].splitlines()
        assert first.startswith("n1: Ray's worker (pid 339) has gone")
        assert "n1| fake vllm on n1" in deployment.output(each)
        assert "n0: vllm ended with exit code 1" in deployment.output(each)


def test_engine_that_dies_before_it_is_ready_ends_the_wait(deployment):
    deployment.start(flaws=("never-ready",))
    os.kill(deployment.pid_of_engine("n1"), signal.SIGKILL)
    assert deployment.codes() == [5, 5]


def test_engine_that_dies_during_the_smoke_test_is_a_crash_not_a_failed_gate(deployment):
    deployment.start(smoke_test=True, flaws=("vanish",))
    assert deployment.codes() == [5, 5]
    assert "n0: vllm ended with exit code 1" in deployment.output("n0")


@pytest.mark.parametrize(("killed", "told"), [("n0", "the head node"), ("n1", "n1")])
def test_killed_node_program_ends_the_other_node(deployment, killed, told):
    deployment.start()
    deployment.wait_until_serving()
    deployment.pid_of_engine(killed)
    deployment.programs[killed].kill()
    other = "n1" if killed == "n0" else "n0"
    assert deployment.programs[other].wait(DEADLINE_S) == 5
    assert f"{told}: serve_node is gone" in deployment.output(other)
    deployment.wait_for(lambda: deployment.alive() == [])


def test_signal_stops_everything_even_what_ignores_it(deployment):
    deployment.start(flaws=("stubborn",))
    deployment.wait_until_serving()
    deployment.wait_for((deployment.folder / "fakes" / "n1.grandchild").exists)
    for program in deployment.programs.values():
        program.send_signal(signal.SIGTERM)
    assert deployment.codes() == [4, 4]
    assert "stopped by SIGTERM" in deployment.output("n0")
    assert deployment.alive() == []


def test_signal_to_one_node_stops_all(deployment):
    deployment.start()
    deployment.wait_until_serving()
    deployment.programs["n1"].send_signal(signal.SIGUSR1)
    assert deployment.codes() == [4, 4]
    assert "n1: stopped by SIGUSR1" in deployment.output("n0")


def test_stop_file_ends_a_lasting_deployment_in_order(deployment):
    deployment.start()
    deployment.wait_until_serving()
    endpoint = json.loads((deployment.run_dir / "endpoint.json").read_text())
    assert endpoint["nodes"] == ["n0", "n1"]
    (deployment.run_dir / "stop").touch()
    assert deployment.codes() == [0, 0]
    assert not (deployment.run_dir / "endpoint.json").exists()


def test_unhealthy_engine_ends_a_lasting_deployment(deployment, monkeypatch):
    from deepseek_sft.serving import node, watch

    class Clock(watch.Watch):
        def wait(self, *_arguments, **_options):
            return None

    made = node.Node.__new__(node.Node)
    made.watch, made.run_dir = Clock(deployment.folder), deployment.folder
    made.settings, made.api_key_file = node.ServeSettings(), deployment.folder / "api_key"
    with serving_fakes.fake_server("health") as server, pytest.raises(node.CrashError, match="three times"):
        made._stay("http://x", "127.0.0.1", server.server_port)


def test_deadline_says_what_it_was_waiting_for(deployment):
    deployment.start(flaws=("never-ready",), settings={"ready_timeout_s": 1.5})
    assert deployment.codes() == [5, 5]
    assert "gave up after 1.5 s waiting for http://127.0.0.1" in deployment.output("n0")
    assert "/health: loading weights, 40 %" in deployment.output("n0")
    assert "serve.ready_timeout_s" in deployment.output("n0")


def test_refused_flag_is_bad_input_and_shown(deployment):
    deployment.start(flaws=("bad-flag",))
    assert deployment.codes()[0] == 2
    assert ": vLLM does not accept its command line (" in deployment.output("n0")
    assert "unrecognized arguments: --bad-flag" in deployment.output("n0")
    assert "see serve.engine_args" in deployment.output("n0")


def test_model_folder_that_cannot_be_served_is_told_by_every_node_before_anything_starts(deployment):
    serving_fakes.write_model(deployment.folder / "model")
    (deployment.folder / "model" / "model-2.safetensors").unlink()
    deployment.start()
    assert deployment.codes() == [2, 2]
    for node in deployment.programs:
        assert "model-2.safetensors is missing" in deployment.output(node)
        assert "Traceback" not in deployment.output(node)
    assert not list((deployment.folder / "fakes").glob("*.pid"))


def test_taken_port_is_told_before_the_engine_starts(deployment):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        deployment.start(settings={"port": port, "host": "127.0.0.1"})
        assert deployment.codes() == [2, 2]
    assert f"n0: port {port} of 127.0.0.1 is taken by another program" in deployment.output("n1")
    assert not list((deployment.folder / "fakes").glob("*.pid"))


def test_port_and_address_are_for_lasting_deployments_only(deployment):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        deployment.start(smoke_test=True, settings={"port": port, "host": "0.0.0.0"})
        assert deployment.codes() == [0, 0], deployment.output("n0")
    assert "0.0.0.0" not in (deployment.run_dir / "n0.log").read_text()


def test_key_guards_a_lasting_deployment_and_is_shown_nowhere(deployment):
    deployment.start()
    deployment.wait_until_serving()
    file = deployment.run_dir.parent / "api_key"
    key = file.read_text().strip()
    assert file.stat().st_mode & 0o077 == 0
    engine = psutil.Process(deployment.pid_of_engine("n0"))
    assert engine.environ()["VLLM_API_KEY"] == key
    command_lines = [word for process in psutil.process_iter(["cmdline"]) for word in process.info["cmdline"] or ()]
    assert not any(key in word for word in command_lines)
    (deployment.run_dir / "stop").touch()
    assert deployment.codes() == [0, 0]
    for path in deployment.folder.rglob("*"):
        if path.is_file() and path != file:
            assert key not in path.read_text(errors="replace"), path


@pytest.mark.parametrize("deployment", [1], indirect=True)
def test_ranks_that_do_not_fit_the_nodes_start_nothing(deployment):
    deployment.nodes = 2
    deployment.start(settings={"pipeline_parallel_size": 3})
    assert deployment.codes() == [2, 2]
    assert "3 processes do not spread evenly over 2 nodes" in deployment.output("n0")
    assert "Traceback" not in deployment.output("n0")
