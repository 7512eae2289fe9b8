"""Promises of few combinations that stand for many."""

import itertools

import expert_spreads
import pytest
from covering import covering, pairs

from deepseek_sft import expert_shards

FACTORS = {"a": (1, 2, 3), "b": (1, 2, 3), "c": (True, False), "d": (True, False)}


def test_every_pair_that_can_stand_together_stands_in_few_of_them():
    def allowed(one):
        return one["a"] <= one["b"] and (one["c"] or not one["d"])

    chosen = covering(FACTORS, allowed)
    every = [dict(zip(FACTORS, values, strict=True)) for values in itertools.product(*FACTORS.values())]
    wanted = set().union(*(pairs(one) for one in every if allowed(one)))
    assert all(map(allowed, chosen))
    assert set().union(*map(pairs, chosen)) == wanted
    assert len(chosen) <= 9 < sum(map(allowed, every))


def test_twenty_runs_cover_how_experts_can_be_spread():
    assert len(covering(expert_spreads.FACTORS, expert_spreads.allowed)) <= 20


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_what_they_cover_is_what_a_start_would_accept(size):
    every = itertools.product(*expert_spreads.FACTORS.values())
    for one in (dict(zip(expert_spreads.FACTORS, values, strict=True)) for values in every):
        if one["experts_over"] == size and expert_spreads.allowed(one):
            found = expert_spreads.settings(one)
            sizes = found["experts_per_shard"], size, one["world"], one["world"] // found.get("nodes", 1)
            assert not list(expert_shards.problems({"n_routed_experts": expert_spreads.EXPERTS}, *sizes)), one
