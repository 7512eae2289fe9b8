"""Plans of deployments: memory of a GPU, sizes that divide nothing, what a start reads."""

import itertools
import math

import docs_pages
import planning_models as models
import pytest

from deepseek_sft.errors import GateError
from deepseek_sft.planning import counting, deployment, gate
from deepseek_sft.planning.settings import GIB
from deepseek_sft.planning.terms import show, total
from deepseek_sft.settings import reading
from deepseek_sft.settings.serve import Serve

V3 = counting.count(models.DEEPSEEK_V3)
SMALL = counting.count(models.MOONLIGHT_16B)
H100, H200, A100_40 = 79.1 * GIB, 139.7 * GIB, 39.4 * GIB


def served(model=V3, dtype="bf16", memory=H100, gpus=8, **serve) -> deployment.Deployment:
    sizes = {"tensor_parallel_size": 1, "pipeline_parallel_size": 1} | serve
    return deployment.plan(model, reading.parse(Serve, sizes, "serve"), dtype, memory, gpus)


def test_weights_of_one_gpu_that_holds_all_are_the_model():
    found = served(expert_parallel=True)
    beside = next(term.value for term in found.weights if term.name == "absorbed projections")
    assert math.isclose(total(found.weights) - beside, V3.bf16_bytes, rel_tol=1e-3)
    assert served().node_reads == V3.bf16_bytes


def test_experts_are_spread_over_all_gpus_and_attention_over_a_replicas():
    one, many = served(), served(tensor_parallel_size=2, data_parallel_size=16, expert_parallel=True)
    for name, parts in (("routed experts", 32), ("attention", 2)):
        each, whole = (next(term.value for term in found.weights if term.name == name) for found in (many, one))
        assert math.isclose(each * parts, whole)


@pytest.mark.parametrize(
    ("model", "dtype", "memory", "sizes", "fits"),
    [
        (V3, "fp8", H100, {"data_parallel_size": 16, "expert_parallel": True}, True),  # 2 × 8
        (V3, "fp8", H100, {"tensor_parallel_size": 8, "pipeline_parallel_size": 2}, True),
        (V3, "fp8", H100, {"tensor_parallel_size": 8}, False),
        (V3, "fp8", H200, {"tensor_parallel_size": 8}, True),
        (V3, "bf16", H100, {"tensor_parallel_size": 8, "pipeline_parallel_size": 4}, True),  # 4 × 8
        (V3, "bf16", H100, {"tensor_parallel_size": 8, "data_parallel_size": 4, "expert_parallel": True}, True),
        (V3, "bf16", H100, {"data_parallel_size": 32, "expert_parallel": True}, False),  # attention 16 times too often
        (V3, "bf16", A100_40, {"tensor_parallel_size": 8, "pipeline_parallel_size": 4}, False),
        (SMALL, "bf16", H100, {"data_parallel_size": 8, "expert_parallel": True}, True),  # 1 × 8
    ],
)
def test_a_deployment_whose_weights_fill_the_gpus_is_refused(model, dtype, memory, sizes, fits):
    found = served(model, dtype, memory, **sizes)
    assert bool(found.problems) != fits
    if fits:
        assert found.cached_tokens > 2 * found.serve.max_model_len
        gate.check_deployment(found, "stop")
    else:
        with pytest.raises(GateError, match="vLLM may use"):
            gate.check_deployment(found, "stop")
        gate.check_deployment(found, "warn")


@pytest.mark.parametrize(
    ("model", "sizes", "problem"),
    [
        (V3, {"tensor_parallel_size": 24}, "24 does not divide the 128 heads"),
        (V3, {"pipeline_parallel_size": 62}, "62 is more than the 61 layers"),
        (V3, {"data_parallel_size": 3}, "an expert of 2,048 is not cut into 3 slices"),
        (SMALL, {"data_parallel_size": 72, "expert_parallel": True}, "72 GPUs of a stage share 64 whole experts"),
    ],
)
def test_sizes_that_divide_nothing_are_named(model, sizes, problem):
    assert any(problem in one for one in served(model, **sizes).problems)


def test_slices_of_fp8_experts_are_whole_blocks():
    wrong = [one for one in served(dtype="fp8", data_parallel_size=128).problems if "of whole blocks of 32" in one]
    assert len(wrong) == 1
    assert not [one for one in served(dtype="fp8", data_parallel_size=64).problems if "blocks" in one]


def test_a_start_reads_each_expert_once_where_experts_are_whole_and_the_rest_on_every_node():
    found = served(dtype="fp8", data_parallel_size=16, expert_parallel=True)
    assert found.nodes == 2
    rest = V3.fp8_bytes - V3.parameters["routed experts"]
    assert math.isclose(found.nodes * found.node_reads, V3.fp8_bytes + rest)
    sliced = served(dtype="fp8", data_parallel_size=16)
    assert sliced.node_reads == V3.fp8_bytes  # pages hold slices of several GPUs
    piped = served(tensor_parallel_size=8, pipeline_parallel_size=4)
    assert math.isclose(piped.nodes * piped.node_reads, V3.bf16_bytes)


def test_smaller_steps_leave_more_for_the_cache():
    few, many = (
        served(dtype="fp8", data_parallel_size=8, tensor_parallel_size=2, expert_parallel=True, **own)
        for own in ({"engine_args": {"max-num-batched-tokens": 256}}, {})
    )
    assert few.cached_tokens > many.cached_tokens
    lasting = served(
        engine_args={"max-num-batched-tokens": 2048}, deployment_engine_args={"max-num-batched-tokens": None}
    )
    assert [term.formula for term in lasting.working] == [term.formula for term in served().working]


def shapes_of_the_documentation() -> list[list[str]]:
    rows = docs_pages.table_rows(docs_pages.PROJECT / "docs/serving.md")
    begin = next(number for number, row in enumerate(rows) if row[0] == "nodes × GPUs")
    return list(itertools.takewhile(lambda row: " × 8" in row[0], rows[begin + 1 :]))


@pytest.mark.parametrize("row", shapes_of_the_documentation(), ids=lambda row: f"{row[0]} {row[2]}")
def test_the_documentations_table_of_shapes_is_what_is_planned(row):
    place, dtype, sizes, whole, weights, cache, contexts, golden = row
    tensor, pipeline, data = map(int, sizes.split(", "))
    found = served(
        SMALL if "16B" in place else V3,
        dtype.strip("`"),
        tensor_parallel_size=tensor,
        pipeline_parallel_size=pipeline,
        data_parallel_size=data,
        expert_parallel=whole == "true",
    )
    assert found.nodes == int(place[0])
    assert show(total(found.weights), "B") == weights
    if cache.startswith("refused"):
        assert found.problems
    else:
        assert f"{round(found.cached_tokens, -3):,}" == cache
        assert str(found.cached_tokens * data // 32768) == contexts
    assert not golden or list((docs_pages.PROJECT / "tests/golden").glob(f"serving.{golden.strip('`')}.native.txt"))
