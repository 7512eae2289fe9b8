"""Promises about how the rows of a step are dealt."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_sft.data import dealing
from deepseek_sft.data.packing import best_fit
from deepseek_sft.data.tokens import TokenDataset, TokenWriter, made_unpacked, write_index

SHAPES = st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 3))


def lognormal(mean: float, spread: float, longest: int, count: int) -> np.ndarray:
    drawn = np.random.default_rng(3).lognormal(np.log(mean) - spread**2 / 2, spread, count)
    return np.clip(drawn, 16, longest).astype(np.int64)


def alone(lengths: np.ndarray) -> dealing.Rows:
    """Rows of one sample each."""
    return dealing.rows_of(lengths, np.arange(len(lengths) + 1))


@given(st.data(), SHAPES, st.integers(0, 9), st.integers(1, 9))
def test_every_row_of_a_step_is_dealt_once_and_always_alike(data, shape, seed, step):
    count = int(np.prod(shape))
    costs = np.array(data.draw(st.lists(st.integers(0, 50), min_size=count, max_size=count)), np.int64)
    accumulation, groups, micro_batch = shape
    dealt = dealing.deal(costs, micro_batch, accumulation, groups, seed, step)
    assert dealt.shape == shape
    assert sorted(dealt.ravel().tolist()) == list(range(count))
    assert (dealt == dealing.deal(costs, micro_batch, accumulation, groups, seed, step)).all()


@given(st.lists(st.integers(1, 30), min_size=6, max_size=6))
def test_no_other_dealing_waits_less(costs):
    """Sum over turns of the costliest row: two turns of three groups, against all ways to cut six rows."""
    values = np.array(costs, np.int64)
    waited = values[dealing.deal(values, 1, 2, 3, 0, 1)].max(axis=(1, 2)).sum()
    best = min(
        max(costs[i] for i in first) + max(costs[i] for i in range(6) if i not in first)
        for first in itertools.combinations(range(6), 3)
    )
    assert waited == best


def test_no_group_has_always_the_longest():
    costs = np.arange(64 * 8, dtype=np.int64)
    first = [dealing.deal(costs, 2, 4, 64, 42, step)[0].max(axis=1).argmax() for step in range(50)]
    assert len(set(first)) > 20


def test_attention_counts_not_tokens_alone():
    """Rows as long as each other: one sample of 8 tokens costs more than four of 2."""
    rows = dealing.rows_of(np.array([2, 2, 2, 2, 8, 4, 4]), np.array([0, 4, 5, 7]))
    assert rows.lengths.tolist() == [8, 8, 8]
    assert rows.pairs.tolist() == [12, 36, 20]
    assert dealing.deal(rows.costs(10), 1, 3, 1, 0, 1).ravel().tolist() == [1, 2, 0]


def useful(rows: dealing.Rows, shape: tuple[int, int, int], dealt_by_cost: bool) -> float:
    accumulation, groups, micro_batch = shape
    shares = []
    for step in range(20):
        chosen = rows.of(np.random.default_rng(step).integers(len(rows), size=int(np.prod(shape))))
        costs = chosen.costs(14_000)
        dealt = dealing.deal(costs, micro_batch, accumulation, groups, 0, step)
        lengths = chosen.lengths[dealt] if dealt_by_cost else chosen.lengths.reshape(shape)
        shares.append(chosen.lengths.sum() / dealing.slots(lengths, 4))
    return float(np.mean(shares))


def test_on_a_lognormal_set_85_percent_of_slots_are_useful_dealt_and_95_packed():
    """The published batch: 64 groups, micro batches of 2; rows of 7.8k tokens on average, up to 32,768."""
    lengths = lognormal(8_200, 0.9, 32_768, 100_000)
    assert 7_600 < lengths.mean() < 8_100
    rows, shape = alone(lengths), (16, 64, 2)
    assert useful(rows, shape, dealt_by_cost=False) < 0.3
    assert useful(rows, shape, dealt_by_cost=True) >= 0.85
    packed = best_fit(lengths[:20_000].astype(np.int32), 32_768)
    full = np.array([lengths[row].sum() for row in packed], np.int64)
    assert useful(alone(full), (4, 64, 2), dealt_by_cost=True) >= 0.95


def test_slots_are_those_of_the_longest_row_of_a_turn_rounded_up():
    assert dealing.slots(np.array([[[3, 5], [2, 2]], [[1, 1], [1, 1]]]), 4) == (8 + 4) * 4


@pytest.mark.parametrize(("per_row", "steps"), [(1, 16), (4.1, 4), (5.4, 3), (40, 1)])
def test_accumulation_of_packed_rows_keeps_the_samples(per_row, steps):
    assert dealing.accumulation_for(16, per_row) == steps


def test_quantiles_stand_for_all_rows():
    rows = alone(lognormal(800, 0.8, 4096, 5000))
    shown = dealing.quantiles(rows, 256)
    assert len(shown) == 256
    assert shown.lengths.mean() == pytest.approx(rows.lengths.mean(), rel=0.02)
    assert shown.pairs.mean() == pytest.approx(rows.pairs.mean(), rel=0.05)


def written(folder, rows: list[list[int]], packed: bool = False) -> TokenDataset:
    """Rows of samples of these lengths."""
    writer = TokenWriter(folder, batch_tokens=8)
    for number, samples in enumerate(rows):
        ids = np.zeros(sum(samples), np.int32)
        writer.add(str(number), ids, ids, np.array(samples, np.int32))
    write_index(folder, {"shards": writer.close(), "rows": len(rows), "packed": packed})
    return TokenDataset(folder)


def test_lengths_and_pairs_of_token_files_are_read_without_their_tokens(tmp_path):
    rows = [[3], [2, 4], [1, 1, 1], [9], [2]]
    found = written(tmp_path, rows).rows()
    assert found.lengths.tolist() == [sum(row) for row in rows]
    assert found.pairs.tolist() == [sum(n * (n + 1) // 2 for n in row) for row in rows]


def test_tokens_made_unpacked_are_known_and_nothing_else_is(tmp_path):
    assert not made_unpacked(tmp_path)
    for name, packed in (("one", False), ("several", True)):
        (tmp_path / name).mkdir()
        written(tmp_path / name, [[3]], packed)
    assert made_unpacked(tmp_path / "one")
    assert not made_unpacked(tmp_path / "several")
