"""Promises of the memory plan: published verdicts, cross-checks, and what must grow or shrink with what."""

import ast
import dataclasses

import planning_models as models
import pytest
from hypothesis import given
from hypothesis import strategies as st
from planning_plans import make, published

from deepseek_sft.errors import BadInputError
from deepseek_sft.planning import device_memory, gate, host_memory
from deepseek_sft.planning.alternatives import change
from deepseek_sft.planning.plan import MISFIT, longest_row_that_fits
from deepseek_sft.planning.settings import GIB
from deepseek_sft.planning.terms import total
from deepseek_sft.training import launch


def with_training(plan, **changes):
    """The same plan with other training settings."""
    return make(
        models.DEEPSEEK_V3, dataclasses.replace(plan.training, **changes), plan.cluster, plan.samples.longest_row
    )


@pytest.mark.parametrize("row", models.PUBLISHED, ids=str)
def test_published_row_gets_its_published_verdict(row):
    *settings, trainable = row
    plan = published(*settings)
    assert (plan.verdict != MISFIT) == trainable
    if not trainable:
        assert plan.binding == "GPU memory per rank"


@pytest.mark.parametrize("longest", [14_000, 16_384, 20_000])
def test_published_verdicts_do_not_hang_on_one_length_of_rows(longest):
    for *settings, trainable in models.PUBLISHED:
        assert (published(*settings, longest_row=longest).verdict != MISFIT) == trainable, settings


def test_recommended_run_at_full_context_comes_near_its_published_memory():
    plan = published(32, 4, "zero3_offload", 2, longest_row=32_768)
    assert plan.device_bytes / 1e9 == pytest.approx(74, rel=0.03)


def test_host_memory_lies_below_deepspeeds_estimate_and_above_the_states():
    for nodes in (16, 32):
        plan = with_training(published(nodes, 8, "zero3_offload", 1), gradient_accumulation_dtype="bfloat16")
        estimate = host_memory.estimator_host_bytes(plan.model, plan.training, plan.cluster)
        assert estimate / 1e9 == pytest.approx(671.026 * 18 * 1.5 / nodes, rel=1e-4)
        assert 20 * plan.model.trained / nodes < total(plan.host) < estimate
        summed = with_training(plan, gradient_accumulation_dtype="float32")
        more = 8 * 2 * plan.model.partition(8 * nodes, 8)  # two bytes of every element on each of 8 ranks
        assert total(summed.host) - total(plan.host) == more


@pytest.mark.parametrize(("dtype", "share"), [("float32", 1), ("bfloat16", 16 / 18)])
def test_states_on_the_gpu_are_deepspeeds_estimate_with_gradients_in_their_dtype(dtype, share):
    plan = with_training(published(32, 4, "zero3", 1), gradient_accumulation_dtype=dtype)
    states = total(term for term in plan.peaks[0].terms if term.name.split(",")[0] in STATES)
    largest = 4 * 129_280 * 7168
    estimate = host_memory.estimator_device_bytes(plan.model, plan.training, plan.cluster) - largest
    assert states / estimate == pytest.approx(share, rel=1e-3)


STATES = ("parameters", "gradients", "fp32 master weights", "Adam moments")


def test_logits_are_chunked_as_the_training_code_does(project):
    source = ast.parse((project / "workflow/deepseek_sft/model/loss.py").read_text())
    (value,) = (n.value for n in source.body if isinstance(n, ast.Assign) and n.targets[0].id == "MAX_LOGITS")
    assert eval(compile(ast.Expression(value), "loss.py", "eval")) == device_memory.MAX_LOGITS


@pytest.mark.parametrize("size", [1, 3, 2**25 + 1, 2**26])
def test_small_pinned_buffers_are_rounded_up_to_a_power_of_two(size):
    rounded = host_memory.pinned(size)
    assert rounded & (rounded - 1) == 0
    assert size <= rounded < 2 * size


@pytest.mark.parametrize("size", [2**26 + 1, 2**31 + 1, 10**10])
def test_large_ones_are_not_by_the_settings_that_training_starts_with(size):
    assert host_memory.pinned(size) == size
    assert f"pinned_max_round_threshold_mb:{host_memory.ROUNDED_MB}" in launch.ALLOCATOR


def test_sub_groups_cover_a_partition():
    assert host_memory.sub_groups(2_621_000_000) == [10**9, 10**9, 621_000_000]
    assert sum(host_memory.sub_groups(2 * 10**9)) == 2 * 10**9


NODES = st.sampled_from([1, 2, 4, 16, 32, 64, 128])
SIZES = st.sampled_from([1, 2, 4, 8])
STRATEGIES = st.sampled_from(["zero3", "zero3_offload"])


@given(NODES, SIZES, STRATEGIES, st.integers(1, 8), st.integers(16, 65536))
def test_more_work_never_needs_less_memory(nodes, size, strategy, micro_batch, longest):
    plan = published(nodes, size, strategy, micro_batch, longest_row=longest)
    assert change(plan, micro_batch=micro_batch + 1).device_bytes >= plan.device_bytes
    assert change(plan, longest_row=longest + size).device_bytes >= plan.device_bytes


@given(NODES, SIZES, STRATEGIES, st.integers(1, 8), st.integers(16, 65536))
def test_more_nodes_longer_groups_and_offload_never_need_more_gpu_memory(nodes, size, strategy, micro_batch, longest):
    plan = published(nodes, size, strategy, micro_batch, longest_row=longest)
    assert change(plan, nodes=2 * nodes).device_bytes <= plan.device_bytes
    assert change(plan, nodes=2 * nodes).host_mb <= plan.host_mb
    assert change(plan, sequence_parallel=8).device_bytes <= plan.device_bytes
    assert change(plan, strategy="zero3_offload").device_bytes <= plan.device_bytes


@given(SIZES, STRATEGIES, st.integers(1, 2))
def test_longest_row_that_fits_is_the_last_one_that_does(size, strategy, micro_batch):
    plan = published(32, size, strategy, micro_batch)
    longest = longest_row_that_fits(plan)
    assert longest == 0 or change(plan, longest_row=longest).device_bytes <= plan.cluster.gpu_bytes
    assert change(plan, longest_row=longest + 2 * size).device_bytes > plan.cluster.gpu_bytes


def test_without_checkpointing_every_layer_is_held():
    whole = with_training(published(32, 8, "zero3_offload", 1), activation_checkpointing=False)
    assert whole.device_bytes > 1000 * GIB


def test_attention_that_is_not_computed_again_is_held_for_every_layer():
    plan = published(32, 4, "zero3_offload", 1)
    kept = with_training(plan, recompute="without_attention")
    found = {peak.moment: peak.bytes for peak in kept.peaks}
    tokens = plan.samples.longest_row // 4
    for before in plan.peaks:
        more = (2 * (128 + 64) + 4) * 128 * 61 * tokens * (1 + device_memory.SLACK)
        assert found[before.moment] - before.bytes == pytest.approx(more, rel=1e-6), before.moment


def test_every_component_is_a_size_with_a_formula():
    plan = published(32, 4, "zero3", 2)
    for term in [*plan.host, *plan.disk, *(term for peak in plan.peaks for term in peak.terms)]:
        assert term.value >= 0 and term.formula, term


def test_this_workflows_experts_need_less_than_stock_ones():
    stock = published(32, 4, "zero3", 1)
    assert with_training(stock, stock_experts=False).device_bytes < stock.device_bytes - 18 * GIB


def test_what_stays_on_the_gpu_is_planned_there_and_what_is_offloaded_on_the_host():
    both = published(32, 8, "zero3_offload", 1)
    partition = both.model.partition(both.cluster.ranks, 8)
    for offload, on_gpu in (("optimizer", 2), ("parameters", 16)):  # parameters; fp32 gradients, weights and moments
        plan = with_training(both, offload=offload)
        assert plan.device_bytes - both.device_bytes == pytest.approx(1.05 * on_gpu * partition, rel=1e-6)
        assert total(plan.host) < total(both.host)


def test_a_layer_that_is_kept_gathered_takes_its_memory_and_saves_its_traffic():
    plan = published(32, 8, "zero3_offload", 1)
    kept = with_training(plan, keep_layer_gathered=True)
    assert kept.device_bytes - plan.device_bytes == pytest.approx(1.05 * 23e9, rel=0.01)
    assert kept.duration.traffic.value / plan.duration.traffic.value == pytest.approx(3 / 4)


def test_gradients_summed_in_float32_take_a_quarter_more_traffic_and_room_to_be_widened():
    plan = published(32, 8, "zero3_offload", 1)
    wide = with_training(plan, gradient_communication_dtype="float32")
    assert wide.duration.traffic.value / plan.duration.traffic.value == pytest.approx(5 / 4)
    assert wide.device_bytes - plan.device_bytes == pytest.approx(1.05 * 6 * 5e8, rel=1e-6)


def test_shards_that_do_not_divide_the_experts_are_refused_before_any_job():
    with pytest.raises(BadInputError, match="experts_per_shard 7 does not divide the base's 256 routed experts"):
        gate.check_possible(with_training(published(32, 4, "zero3_offload", 1), experts_per_shard=7))


def test_gradients_of_an_fp32_run_are_held_in_fp32_whatever_they_are_added_up_in():
    training = published(32, 4, "zero3_offload", 1).training
    several = dataclasses.replace(training, gradient_accumulation_steps=4, gradient_accumulation_dtype="bfloat16")
    assert (several.gradient_width, dataclasses.replace(several, dtype="float32").gradient_width) == (2, 4)
