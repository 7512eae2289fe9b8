"""What each node runs, in full: golden files for the deployments that people have."""

import sys
from pathlib import Path

import pytest
import yaml

from deepseek_sft.errors import BadInputError
from deepseek_sft.serving import settings
from deepseek_sft.serving.command_listing import listing
from deepseek_sft.settings import field_types
from deepseek_sft.settings.serve import Serve

GOLDEN = Path(__file__).resolve().parents[2] / "golden"
VERSION = (0, 32, 0)
GPU = {"engine_args": {"gpu-memory-utilization": 0.92}, "environment": {"NCCL_DEBUG": "WARN"}}
CPU = {
    "tensor_parallel_size": 1,
    "pipeline_parallel_size": 1,
    "max_model_len": 512,
    "engine_args": {"enforce-eager": True, "kv-cache-memory-bytes": 134217728},
    "environment": {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"},
}
SHAPES = {
    "bf16-4x8": (4, {"tensor_parallel_size": 8, "pipeline_parallel_size": 4, "dtype": "bfloat16"} | GPU),
    "fp8-2x8": (2, {"tensor_parallel_size": 8, "pipeline_parallel_size": 2} | GPU),
    "cpu-1": (1, CPU),
}
# Replicas of attention whose experts lie on all GPUs: for throughput. vLLM's own mode alone.
REPLICAS = {
    "fp8-2x8-dp16": (2, {"data_parallel_size": 16, "expert_parallel": True} | GPU),
    "bf16-4x8-dp4": (4, {"tensor_parallel_size": 8, "data_parallel_size": 4, "expert_parallel": True} | GPU),
    "16b-1x8-dp8": (1, {"data_parallel_size": 8, "expert_parallel": True, "load_format": "fastsafetensors"} | GPU),
}
BACKENDS = field_types.keys(Serve)["backend"].choices
CASES = {f"{shape}.{backend}": (shape, backend) for shape in SHAPES for backend in BACKENDS}
CASES |= {f"{shape}.native": (shape, "native") for shape in REPLICAS}
SHAPES |= REPLICAS


def shown(case: str) -> str:
    shape, backend = CASES[case]
    nodes, given = SHAPES[shape]
    return listing(settings.parse(given | {"backend": backend}), nodes, "results/r1/model", VERSION)


@pytest.mark.parametrize("case", CASES)
def test_commands_of_every_node_equal_their_golden_file(case):
    """A wanted change: `PYTHONPATH=workflow python tests/unit/serving/test_listing.py`, then read the difference."""
    assert shown(case) == (GOLDEN / f"serving.{case}.txt").read_text()


@pytest.mark.parametrize("case", CASES)
def test_ranks_on_all_nodes_are_the_models_parts(case):
    nodes, given = SHAPES[CASES[case][0]]
    text = shown(case)
    world = settings.parse(given).ranks
    if CASES[case][1] == "ray":
        assert text.count(f"--num-gpus={world // nodes} ") == min(nodes, 2)
    assert text.count("vllm serve ") == (1 if CASES[case][1] == "ray" else min(nodes, 2))


def test_a_lasting_deployment_has_no_limit_that_only_the_smoke_test_needs():
    config = yaml.safe_load((GOLDEN.parents[1] / "config/config.yaml").read_text())["serve"]
    tested = settings.parse(config)
    assert "--max-num-batched-tokens 2048" in listing(tested, 4, "model", VERSION)
    assert "max-num-batched-tokens" not in listing(tested.lasting, 4, "model", VERSION)


def test_settings_that_do_not_fit_the_nodes_are_refused():
    with pytest.raises(BadInputError, match="do not spread evenly over 3 nodes"):
        listing(settings.parse({"tensor_parallel_size": 8}), 3, "model", VERSION)


if __name__ == "__main__":
    sys.path.insert(0, str(GOLDEN.parents[1] / "workflow"))
    for case in CASES:
        (GOLDEN / f"serving.{case}.txt").write_text(shown(case))
