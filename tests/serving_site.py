"""An emulated cluster with a copy of the project whose chain is done up to verify_model, for tests of serving."""

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import finished_chain
import pytest
import scripted_model
import yaml
from cluster_copy import ClusterCopy
from cluster_fixture import Cluster

from deepseek_sft import receipts

DEADLINE_S = 600  # generous: only a hang reaches it
PROGRAMS = "vllm|VLLM|ray|serve_node|smoke_test"


class Site(ClusterCopy):
    """The copy and its cluster.

    Args:
        project: the checkout under test.
        folder: existing folder that the nodes see.
        cluster: running.
    """

    def __init__(self, project: Path, folder: Path, cluster: Cluster):
        super().__init__(project, folder, cluster)
        model = self.results / "model"
        make = [project / ".envs/workflow/bin/python", project / "workflow/scripts/prepare_model.py"]
        make += ["--tiny", "--output", model, "--receipt", folder / "prepare_model.json"]
        subprocess.run(make, check=True, capture_output=True)
        scripted_model.script(model)
        for rule in finished_chain.ORDER[: finished_chain.ORDER.index("smoke_test")]:
            self._pretend_done(rule)
        prompts = folder / "held_out.jsonl"
        prompts.write_text(json.dumps({"id": "1", "messages": [{"role": "user", "content": "2 + 3?"}], "answer": "5"}))
        self.envs: dict[str, object] = {}
        # The prompts have no references: a bound on their loss could not be judged, and would fail.
        nothing = {"max_loss": None, "min_loss_drop": None}
        self.smoke_test = nothing | {"prompts": str(prompts), "max_tokens": 16, "benchmark": False}

    def _pretend_done(self, rule: str) -> None:
        """Write the receipt of a stage before the smoke test: a chain with gaps would be filled first."""
        made = {}
        for name, place in finished_chain.RESULTS[rule].items():
            path = self.results / place
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                path.write_text("{}\n")
            made[name] = str(path.parent if name in finished_chain.FOLDERS else path)
        receipt = self.results / f"receipts/{rule}.json"
        receipts.write(receipt, rule, inputs={}, settings={}, result=made, figures={})

    def pretend_tested(self) -> None:
        """Write a smoke test's receipt where there is none, so that the target `serve` starts at once."""
        receipt, transcript = self.results / "receipts/smoke_test.json", self.results / "serve/transcript.jsonl"
        if not receipt.exists():
            transcript.parent.mkdir(exist_ok=True)
            transcript.touch()
            made = {"transcript": str(transcript)}
            receipts.write(receipt, "smoke_test", inputs={}, settings={}, result=made, figures={})

    def profile_with(self, **resources: object) -> str:
        """A profile in which the rule smoke_test, and so `serve`, has other resources than in the demo's."""
        profile = yaml.safe_load((self.clone / "profiles/demo/config.yaml").read_text())
        profile["set-resources"]["smoke_test"] |= resources
        (self.clone / "profiles/changed").mkdir(exist_ok=True)
        (self.clone / "profiles/changed/config.yaml").write_text(yaml.safe_dump(profile))
        return "profiles/changed"

    def command(self, *arguments: str, profile: str = "profiles/demo", **serve: object) -> list[str]:
        """Command line of snakemake on the login node with changes of section ``serve``."""
        overlay = self.clone / "overlay.yaml"
        sections = {"experiment": "demo", "serve": serve, "smoke_test": self.smoke_test, "envs": self.envs}
        overlay.write_text(yaml.safe_dump(sections))
        return self.on_login(*self.words(profile), *arguments)

    def start(self, *arguments: str, **serve: object) -> subprocess.Popen:
        """Start snakemake in the copy; its output goes to the file ``snakemake.log`` there."""
        return self.run(self.command(*arguments, **serve))

    def again(self) -> subprocess.Popen:
        """Start the script of the target `serve` alone, as the rule does, once the target has been asked for."""
        words = [f"{self.project}/.envs/workflow/bin/python", "workflow/scripts/serve.py"]
        words += ["--results", "results/demo", "--logs", "logs/demo"]
        return self.run(self.cluster.command("exec", *words))

    def run(self, command: list[str]) -> subprocess.Popen:
        """Start a command in the copy; its output goes to the file ``snakemake.log`` there."""
        return self.background(command, self.clone / "snakemake.log")

    def output(self) -> str:
        """What the last snakemake said, the failed stage's log included."""
        return (self.clone / "snakemake.log").read_text(errors="replace")

    def node_log(self, run: str, node: str) -> str:
        """Output of the serving processes of a node, of the newest run whose folder matches ``run``."""
        found = sorted(self.results.glob(f"serve/{run}/{node}.log"), key=lambda path: path.stat().st_mtime)
        return found[-1].read_text(errors="replace") if found else ""

    def attempt(self, number: int) -> str:
        """The log of an attempt of the newest smoke test; empty where there is none yet."""
        found = sorted(self.clone.glob(f"logs/demo/smoke_test/*-{number}.log"), key=lambda path: path.stat().st_mtime)
        return found[-1].read_text(errors="replace") if found else ""

    def wait_for(self, condition: Callable[[], object], running: subprocess.Popen | None = None) -> None:
        """Wait until ``condition`` holds; fails when ``running`` ends before."""
        deadline = time.monotonic() + DEADLINE_S
        while not condition():
            if running and running.poll() is not None:
                pytest.fail(f"ended early with {running.returncode}:\n{self.output()[-6000:]}")
            assert time.monotonic() < deadline, self.output()[-6000:]
            time.sleep(0.25)

    def kill_engine(self, node: str) -> bool:
        """Kill the process on ``node`` that holds a part of the model; False while there is none."""
        return (
            self.cluster.node(node, "pkill", "-KILL", "-f", "VLLM::Worker|RayWorkerProc", check=False).returncode == 0
        )

    def left_on_nodes(self) -> dict[str, str]:
        """Serving processes, temporary folders and shared memory that are on each node."""
        look = f"pgrep -fa '{PROGRAMS}' | grep -v pgrep; ls -d /tmp/serve-* 2> /dev/null; ls /dev/shm"
        nodes = [f"node{i + 1}" for i in range(self.cluster.nodes)]
        return {node: self.cluster.node(node, "bash", "-c", look, check=False).stdout for node in nodes}
