"""Real vLLM serving a small model whose words are known: one start of the server for all tests."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import scripted_model

from deepseek_sft import receipts
from deepseek_sft.data import loss_rows

pytestmark = pytest.mark.stage("serve-cpu")

SETTINGS = {
    "max_model_len": 256,
    "served_model_name": "tiny",
    "reasoning_parser": "deepseek_r1",
    "engine_args": {"enforce-eager": True},
    "environment": {
        "VLLM_CPU_KVCACHE_SPACE": 1,
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": 1,
    },
    "ready_timeout_s": 600,
}
REFERENCE = f"<think>\n{scripted_model.REASONING}\n</think>\n\n{scripted_model.ANSWER}"
SAMPLES = [
    {
        "id": f"sum-{i}",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": f"{i} + 1?"},
            {"role": "assistant", "content": "1"},
            {"role": "user", "content": "And 2 + 3?"},
            {"role": "assistant", "content": REFERENCE},
        ],
    }
    for i in range(3)
]


class Server:
    """The running server and its folders: ``model`` is served, ``base`` is the random model it was made from."""

    def __init__(self, folder: Path, scripts: Path, python: Path, training: Path):
        self.folder, self.scripts, self.python, self.training = folder, scripts, python, training
        self.model, self.base = folder / "model", folder / "base"
        for model in (self.model, self.base):
            make = ["prepare_model.py", "--tiny", "--output", model, "--receipt", folder / "prepare_model.json"]
            subprocess.run([sys.executable, scripts / make[0], *make[1:]], check=True, capture_output=True)
        scripted_model.script(self.model)
        self.verified = self.receipt("verify_model", self.model)
        self.prompts = folder / "held_out.jsonl"
        self.prompts.write_text("".join(json.dumps(sample) + "\n" for sample in SAMPLES))
        self.run_dir = folder / "serve" / "job-1"
        self.log = folder / "server.log"

    def receipt(self, name: str, trained: Path) -> Path:
        """A receipt of verify_model for the served model, with the losses that training leaves with ``trained``."""
        random = np.random.default_rng(0)
        # Short: a scripted model finds all words but its own alike, and as many equal losses are taken for a stand-in.
        rows = [random.integers(100, 100_000, length).tolist() for length in (62, 60, 55, 40, 17, 9, 5, 2)]
        (self.folder / "rows.json").write_text(json.dumps(rows))
        probe, record = Path(__file__).with_name("trained_losses_probe.py"), self.folder / f"{name}-losses.json"
        words = [self.training, probe, trained, "bfloat16", self.folder / "rows.json", record]
        library = str(self.scripts.parent)
        environment = os.environ | {"PYTHONPATH": library, "DS_ACCELERATOR": "cpu", "LOCAL_RANK": "0"}
        done = subprocess.run(list(map(str, words)), env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        path = self.folder / f"{name}.json"
        receipts.write(
            path,
            "verify_model",
            inputs={"base": {"path": str(self.base), "fingerprint": ""}},
            settings={},
            result={"model": str(self.model)},
            figures={loss_rows.KEY: json.loads(record.read_text())},
        )
        return path

    def start(self) -> subprocess.Popen:
        (self.folder / "settings.json").write_text(json.dumps(SETTINGS))
        command = [self.python, self.scripts / "serve_node.py", "--model-receipt", self.verified]
        command += ["--settings", self.folder / "settings.json", "--run-dir", self.run_dir]
        alone = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
        with open(self.log, "w") as output:
            running = subprocess.Popen(command, env=alone, stdout=output, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + 600
        while not (self.run_dir / "endpoint.json").exists():
            assert running.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.5)
        return running

    def run(self, script: str, *arguments: object) -> subprocess.CompletedProcess:
        """One of the scripts against the server."""
        endpoint = json.loads((self.run_dir / "endpoint.json").read_text())
        key = Path(endpoint["api_key_file"]).read_text().strip()
        words = ["--url", endpoint["url"], "--model", "tiny", "--prompts", self.prompts, "--template", "deepseek-r1"]
        return subprocess.run(
            [self.python, self.scripts / script, *map(str, [*words, *arguments])],
            env=os.environ | {"VLLM_API_KEY": key},
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )

    def smoke_test(self, name: str, *arguments: object) -> subprocess.CompletedProcess:
        """A smoke test whose files carry ``name``."""
        files = ["--receipt", self.folder / f"{name}.json", "--transcript", self.folder / name / "transcript.jsonl"]
        return self.run("smoke_test.py", *files, "--max-tokens", 24, "--max-model-len", 256, *arguments)


@pytest.fixture(scope="module")
def server(tmp_path_factory, project: Path, environment) -> Iterator[Server]:
    """A lasting deployment for all tests of this module."""
    scripts = project / "workflow" / "scripts"
    server = Server(tmp_path_factory.mktemp("serve"), scripts, environment("serve-cpu"), environment("train"))
    running = server.start()
    try:
        yield server
    finally:
        (server.run_dir / "stop").touch()
        running.wait(timeout=60)


@pytest.fixture(scope="module")
def passed(server: Server) -> dict:
    """The receipt of a smoke test with everything switched on."""
    load = ["--benchmark-concurrency", "2", "--benchmark-input-tokens", 32, "--benchmark-output-tokens", 8]
    done = server.smoke_test("smoke_test", "--model-receipt", server.verified, "--model-dir", server.model, *load)
    assert done.returncode == 0, done.stderr + server.log.read_text()[-3000:]
    return receipts.read(server.folder / "smoke_test.json", "smoke_test")


def test_no_check_is_skipped_and_all_pass(passed):
    assert passed["figures"]["skipped"] == {}
    assert {name for name, check in passed["figures"]["checks"].items() if not check["passed"]} == set()


def test_served_logprobs_equal_transformers(passed):
    assert "bfloat16" in passed["figures"]["checks"]["logprobs"]["detail"]


def test_served_losses_are_those_that_training_computes_with_the_same_weights(passed):
    figures = passed["figures"]["weights_as_trained"]
    assert (figures["rows"], figures["tokens"], figures["judged_as"]) == (8, 242, "bfloat16")


def test_losses_of_other_weights_fail_that_check_alone(server):
    other = server.receipt("other_weights", server.base)
    done = server.smoke_test("not_trained", "--model-receipt", other, "--no-benchmark")
    assert done.returncode == 3, done.stderr
    assert re.findall(r"^  FAILED (\w+)", done.stderr, re.MULTILINE) == ["weights_as_trained"]


def test_prompts_of_several_turns_are_rendered_as_in_training(passed):
    assert passed["figures"]["checks"]["prompt_as_trained"]["detail"].startswith("3 prompts equal deepseek-r1")


def test_loss_lies_below_that_of_the_base_on_the_same_samples(passed):
    loss = passed["figures"]["loss"]
    assert loss["tuned"] < loss["base"]
    assert loss["base"] == pytest.approx(11.8, abs=0.5)  # a random model guesses evenly over 129,280 tokens


def test_samples_hold_question_answer_reference_and_the_bases_words(passed):
    (first, *_) = passed["figures"]["samples"]
    assert (first["question"], first["answer"]) == ("And 2 + 3?", scripted_model.ANSWER)
    assert first["reference"]["reasoning"] == scripted_model.REASONING
    assert first["base"]["reasoning"] != first["reasoning"]


def test_speed_is_measured_by_vllms_own_benchmark(passed):
    benchmark = passed["figures"]["benchmark"]
    assert benchmark["tool"].startswith("vllm bench serve")
    assert benchmark["by_concurrency"]["2"]["requests"] == 8
    assert benchmark["by_concurrency"]["2"]["tokens_per_second"] > 0


def test_measured_base_gives_the_loss_that_the_smoke_test_finds(server, passed):
    output = server.folder / "measured.json"
    done = server.run("measure_held_out.py", "--tokenizer", server.model, "--output", output, "--max-tokens", 24)
    assert done.returncode == 0, done.stderr
    measured = json.loads(output.read_text())
    assert measured["loss"] == pytest.approx(passed["figures"]["loss"]["tuned"], abs=0.02)
    assert measured["samples"][0]["answer"] == scripted_model.ANSWER


def test_other_weights_than_the_converted_ones_fail_the_log_probabilities_alone(server):
    done = server.smoke_test("other", "--model-dir", server.base, "--no-benchmark")
    assert done.returncode == 3, done.stderr
    assert re.findall(r"^  FAILED (\w+)", done.stderr, re.MULTILINE) == ["logprobs"]
    assert not (server.folder / "other.json").exists()
    assert (server.folder / "other" / "transcript.jsonl").stat().st_size > 0
