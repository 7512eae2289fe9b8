"""Promises of plans with experts spread over ranks: what comes into a node, and which sizes are refused."""

import dataclasses

import pytest
from planning_models import DEEPSEEK_V3
from planning_plans import published

from deepseek_sft import expert_shards
from deepseek_sft.errors import BadInputError
from deepseek_sft.planning import alternatives, expert_choice, gate
from deepseek_sft.planning import plan as planning
from deepseek_sft.planning.expert_exchange import Exchange


def spread(size: int, **changes):
    """The published plan on 32 nodes with experts over ``size`` ranks."""
    plan = published(32, 4, "zero3_offload", 1)
    shard = 16 if size <= 8 else 256 // size
    values = {"expert_parallel_size": size, "experts_per_shard": shard, "stock_experts": False} | changes
    training = dataclasses.replace(plan.training, **values)
    return planning.make(plan.model, training, plan.samples, plan.cluster, plan.served_dtype)


def into_node(plan, tokens: int) -> float:
    """Terabytes of a micro batch."""
    exchange = Exchange(plan.model, plan.training, plan.cluster)
    return (exchange.weights_into_node() + exchange.rows_into_node(tokens)) / 1e12


@pytest.mark.parametrize(("tokens", "terabytes"), [(16_384, 2.4), (8_192, 1.4), (4_096, 0.94)])
def test_experts_over_eight_nodes_bring_weights_and_rows_once_into_each(tokens, terabytes):
    assert into_node(spread(64, recompute="without_experts"), tokens) == pytest.approx(terabytes, rel=0.03)


@pytest.mark.parametrize("size", [1, 2, 8])
def test_inside_a_node_every_node_still_needs_all_weights(size):
    gathered, others = Exchange(*_parts(spread(size))).gathers()
    assert others == 3 and gathered == 3 - 2 / (16 // size), "the last two shards stay from recomputation on"
    assert into_node(spread(size), 16_384) == pytest.approx(5.2 * (gathered + 1) / 4, rel=0.01)


def test_a_layer_of_which_a_rank_holds_little_stays_from_its_recomputation_to_its_backward_pass():
    assert Exchange(*_parts(spread(64))).gathers() == (2, 2)
    assert Exchange(*_parts(spread(8, experts_per_shard=4))).gathers() == (3 - 3 / 8, 3)


def test_a_recomputed_layer_exchanges_again_unless_its_experts_are_kept():
    assert Exchange(*_parts(spread(64))).passes == 7
    assert Exchange(*_parts(spread(64, recompute="without_experts"))).passes == 5


def _parts(plan):
    return plan.model, plan.training, plan.cluster


def test_spreading_takes_memory_for_a_chunk_and_gives_the_host_less_to_do():
    alone, over = spread(1), spread(8)
    assert over.device_bytes > alone.device_bytes
    assert _host_seconds(over) < _host_seconds(alone) / 2


def _host_seconds(plan) -> float:
    return next(part.fastest for part in plan.duration.parts if part.name == "host")


@pytest.mark.parametrize(
    ("each", "parallel", "ranks", "per_node", "said"),
    [
        (7, 1, 8, 8, "does not divide the base's 256 routed experts"),
        (16, 32, 256, 8, "does not divide the 16 shards"),
        (16, 8, 12, 12, "does not divide the 12 ranks"),
        (8, 4, 24, 6, "neither divides the 6 ranks of a node"),
        (8, 16, 32, 8, "in one shard, and train.experts_per_shard is 8"),
    ],
)
def test_a_size_that_does_not_divide_is_refused_with_what_to_write(each, parallel, ranks, per_node, said):
    found = list(expert_shards.problems(DEEPSEEK_V3, each, parallel, ranks, per_node))
    assert said in found[0][0] and found[0][1]


@pytest.mark.parametrize("parallel", [1, 2, 8, 16, 64, 256])
def test_auto_divides_whatever_the_size(parallel):
    each = expert_shards.experts_per_shard(DEEPSEEK_V3, "auto", parallel)
    assert not list(expert_shards.problems(DEEPSEEK_V3, each, parallel, 256, 8))


@pytest.mark.parametrize(
    ("stated", "parallel", "per_node", "each"),
    [
        (16, 1, 8, 16),
        (16, 8, 8, 16),
        (16, 64, 8, 4),
        (16, 4, 2, 64),
        (12, 8, 8, 8),
        ("auto", 64, 8, 4),
        (16, 48, 8, 16),
    ],
)
def test_a_stated_shard_follows_another_size_as_far_as_it_must(stated, parallel, per_node, each):
    assert expert_shards.adapted(DEEPSEEK_V3, stated, parallel, per_node) == each


def test_the_fewest_nodes_are_some_whose_ranks_the_groups_of_experts_divide():
    plan = spread(64)
    assert alternatives.fewest_nodes(plan, lambda one: one.cluster.nodes >= 9).cluster.nodes == 16
    assert alternatives.fewest_nodes(spread(8), lambda one: one.cluster.nodes >= 9).cluster.nodes == 9


def test_keeping_experts_inside_a_node_is_refused():
    with pytest.raises(BadInputError, match="lies within a node"):
        gate.check_possible(spread(8, recompute="without_experts"))


@pytest.mark.parametrize(
    ("nodes", "accumulation", "length", "spread_over"),
    [(32, 1, 2_048, 64), (32, 16, 16_384, 1), (1, 16, 16_384, 1)],
)
def test_auto_spreads_experts_where_that_is_worth_it(nodes, accumulation, length, spread_over):
    plan = published(nodes, 8, "zero3_offload", 1, longest_row=8 * length, host_bytes=8e12)
    changes = {"stock_experts": False, "gradient_accumulation_steps": accumulation, "offload": "optimizer"}
    samples = dataclasses.replace(plan.samples, mean_length=8 * length, spread=None)
    plan = planning.make(plan.model, dataclasses.replace(plan.training, **changes), samples, plan.cluster)
    chosen = expert_choice.choose(plan, "auto")
    assert chosen.training.expert_parallel_size == spread_over
    gate.check_possible(chosen)
    assert planning.figures(chosen)["expert_parallel_size"] == spread_over, "where training looks for it"


def test_auto_keeps_to_sizes_over_nodes_where_their_results_are_kept():
    plan = spread(64, recompute="without_experts")
    assert expert_choice.choose(plan, "auto").training.expert_parallel_size > plan.cluster.ranks_per_node


def test_auto_spreads_nothing_where_no_time_is_known():
    plan = spread(8)
    unknown = planning.make(plan.model, plan.training, plan.samples, dataclasses.replace(plan.cluster, gpu_bytes=None))
    assert unknown.duration.expected_step_s is None
    assert expert_choice.choose(unknown, "auto").training.expert_parallel_size == 1
