"""Real vLLM serving a small random model: one start of the server for all tests."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from deepseek_sft import receipts

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
    "smoke_test": {"max_tokens": 24, "concurrency": 4},
}


@pytest.fixture(scope="module")
def served(tmp_path_factory, project: Path, environment) -> tuple[subprocess.CompletedProcess, Path]:
    """A smoke test of a random model from start to end, and the folder of its files."""
    folder = tmp_path_factory.mktemp("serve")
    scripts = project / "workflow" / "scripts"
    model = folder / "model"
    make = [scripts / "prepare_model.py", "--tiny", "--output", model, "--receipt", folder / "prepare_model.json"]
    subprocess.run([sys.executable, *make], check=True, capture_output=True)
    receipts.write(
        folder / "verify_model.json",
        "verify_model",
        inputs={},
        settings={},
        result={"model": str(model)},
        figures={},
    )
    prompts = folder / "held_out.jsonl"
    lines = [{"id": str(i), "messages": [{"role": "user", "content": f"{i} + 1?"}], "answer": "x"} for i in range(3)]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = SETTINGS | {"smoke_test": SETTINGS["smoke_test"] | {"prompts": str(prompts)}}
    (folder / "settings.json").write_text(json.dumps(settings))
    command = [environment("serve-cpu"), scripts / "serve_node.py", "--model-receipt", folder / "verify_model.json"]
    command += ["--settings", folder / "settings.json", "--run-dir", folder / "serve" / "job-1"]
    command += ["--smoke-test", folder / "smoke_test.json"]
    alone = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    done = subprocess.run(command, env=alone, capture_output=True, text=True, timeout=900, check=False)
    return done, folder


def verdict(served: tuple[subprocess.CompletedProcess, Path], check: str) -> tuple[str, str]:
    """Verdict and detail that the output gives for a check."""
    found = re.search(rf"^  (\S+) +{check}: (.*)$", served[0].stderr, re.MULTILINE)
    assert found, served[0].stderr
    return found.groups()


def test_served_logprobs_equal_transformers(served):
    word, detail = verdict(served, "logprobs")
    assert word == "ok", detail
    assert "bfloat16" in detail


def test_random_model_fails_the_format_gate(served):
    done, folder = served
    assert done.returncode == 3, done.stderr
    assert verdict(served, "held_out_format") == (
        "FAILED",
        "0 of 3 well formed = 0.000, expected at least 0.9; not: 0, 1, 2",
    )
    assert not (folder / "smoke_test.json").exists()


@pytest.mark.parametrize(
    "check", ["health", "model_name", "unknown_model", "repeatable", "concurrency", "over_long_prompt", "health_after"]
)
def test_checks_of_the_server_itself_pass_whatever_the_model_says(served, check):
    assert verdict(served, check)[0] == "ok"


def test_transcript_holds_the_models_own_words(served):
    lines = [json.loads(line) for line in (served[1] / "serve" / "transcript.jsonl").read_text().splitlines()]
    replies = [json.loads(line["response"]) for line in lines if line["check"] == "held_out_format"]
    assert len(replies) == 3
    assert all(reply["choices"][0]["message"]["content"] is None for reply in replies)


def test_nothing_keeps_running(served):
    run_dir = str(served[1])
    left = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_text()
        except OSError:
            continue
        if run_dir in command and int(process.name) != os.getpid():
            left.append(command)
    assert left == []
