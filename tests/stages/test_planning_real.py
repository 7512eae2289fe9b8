"""The plan's counts against transformers' own model, and its cross-check against DeepSpeed's own estimator."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import planning_models as models
import pytest
from planning_plans import published

from deepseek_sft.convert import tiny_model
from deepseek_sft.planning import host_memory
from deepseek_sft.planning.counting import count

PROBE = Path(__file__).with_name("planning_probe.py")
pytestmark = pytest.mark.stage("train")


def probe(python: Path, *words: object) -> dict[str, float]:
    done = subprocess.run([python, PROBE, *map(str, words)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


CONFIGS = {
    "671B": models.DEEPSEEK_V3,
    "16B": models.MOONLIGHT_16B,
    "tiny": tiny_model.config_of(tiny_model.TinyShape()),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_counts_are_exactly_those_of_transformers_model(
    name: str, environment: Callable[[str], Path], tmp_path: Path
) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(CONFIGS[name]))
    found, ours = probe(environment("train"), "counts", file), count(CONFIGS[name])
    assert (ours.trained, ours.total, ours.tensors) == (found["trained"], found["parameters"], found["tensors"])


@pytest.mark.parametrize("strategy", ["zero3", "zero3_offload"])
def test_deepspeeds_estimate_is_reproduced(strategy: str, environment: Callable[[str], Path]) -> None:
    plan = published(32, 8, strategy, 1)
    largest = plan.model["vocab_size"] * plan.model["hidden_size"]
    offload = int(strategy == "zero3_offload")
    found = probe(environment("train"), "estimate", plan.model.trained, largest, 8, 32, offload)
    arguments = plan.model, plan.training, plan.cluster
    assert host_memory.estimator_host_bytes(*arguments) == pytest.approx(found["host"], rel=1e-9)
    assert host_memory.estimator_device_bytes(*arguments) == pytest.approx(found["device"], rel=1e-9)
