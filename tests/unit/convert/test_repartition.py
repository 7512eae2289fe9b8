"""Promises of reading a checkpoint by other ranks: every element once, from where it lies, and no padding."""

import json
import math
import random
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import stored_checkpoint as stored

from deepseek_sft.convert import rank_state, repartition, zero
from deepseek_sft.convert.repartition import Layout, SubGroup
from deepseek_sft.errors import BadInputError
from deepseek_sft.tensors.byte_ranges import OpenFiles

ODD = {"a": (7, 3), "b": (5,), "c": (2, 2, 2), "d": (1,)}


def flat_tensors(layout: Layout, elements: dict[str, np.ndarray], world_size: int) -> dict[tuple[int, int], np.ndarray]:
    """Rank and index → flat tensor, written as DeepSpeed does; padding is -1."""
    found = {}
    for group in layout.groups:
        for place, rank in enumerate(group.ranks):
            parts = []
            for name in group.shapes:
                size = -(-elements[name].size // len(group.ranks))
                part = elements[name][place * size : (place + 1) * size]
                parts.append(np.pad(part, (0, size - part.size), constant_values=-1))
            found[rank, group.index] = np.concatenate(parts)
    assert {rank for rank, _ in found} == set(range(world_size))
    return found


def moved(old: Layout, new: Layout, flat: dict, new_ranks: int) -> dict:
    """What the new ranks hold after their copies; what none fills is -1."""
    found = {}
    for group in new.groups:
        length = sum(-(-math.prod(shape) // len(group.ranks)) for shape in group.shapes.values())
        found |= {(rank, group.index): np.full(length, -1) for rank in group.ranks}
    for rank in range(new_ranks):
        for copy in repartition.copies(old, new, rank):
            part = flat[copy.from_rank, copy.from_index][copy.from_offset : copy.from_offset + copy.count]
            assert part.size == copy.count and (part >= 0).all(), "padding, or beyond the tensor"
            found[rank, copy.index][copy.offset : copy.offset + copy.count] = part
    return found


@pytest.mark.parametrize("ranks", [(4, 2), (2, 4), (4, 3), (3, 7), (16, 1), (1, 5)])
def test_other_ranks_and_sub_groups_get_the_same_elements_without_padding(ranks):
    elements, position = {}, 0
    for name, shape in ODD.items():
        elements[name] = np.arange(position, position + math.prod(shape))
        position += math.prod(shape)
    old = repartition.of_all_ranks([{"a": ODD["a"], "b": ODD["b"]}, {"c": ODD["c"], "d": ODD["d"]}], ranks[0])
    new = repartition.of_all_ranks([{"a": ODD["a"]}, {"b": ODD["b"], "c": ODD["c"]}, {"d": ODD["d"]}], ranks[1])
    found = moved(old, new, flat_tensors(old, elements, ranks[0]), ranks[1])
    wanted = flat_tensors(new, elements, ranks[1])
    assert {key: part.tolist() for key, part in found.items()} == {key: part.tolist() for key, part in wanted.items()}


def test_experts_move_to_other_shards_and_partition_groups_need_not_be_all_ranks():
    """Four experts in two shards over all of 3 ranks, then each shard of one expert on a group of its own."""
    whole = np.arange(4 * 5)
    old = repartition.of_all_ranks([{"x.mlp.experts.0.w2": (2, 5), "x.mlp.experts.1.w2": (2, 5)}], 3)
    groups = [(0, 1), (2, 3)]
    new = Layout(
        [
            SubGroup(index, {f"x.mlp.experts.{2 * side + index}.w2": (1, 5)}, groups[side])
            for side in range(2)
            for index in range(2)
        ]
    )
    assert not old.difference(new)
    flat = flat_tensors(old, {f"x.mlp.experts.{i}.w2": whole[10 * i : 10 * i + 10] for i in range(2)}, 3)
    found = moved(old, new, flat, 4)
    wanted = flat_tensors(new, {f"x.mlp.experts.{i}.w2": whole[5 * i : 5 * i + 5] for i in range(4)}, 4)
    assert {key: part.tolist() for key, part in found.items()} == {key: part.tolist() for key, part in wanted.items()}


@pytest.mark.parametrize("change", [{"b": (6,)}, {"a": (3, 7)}, {"e": (2,)}])
def test_a_model_of_other_parameters_is_told_apart(change):
    other = repartition.of_all_ranks([ODD | change], 2)
    assert repartition.of_all_ranks([ODD], 4).difference(other) == next(iter(change))
    assert not repartition.of_all_ranks([ODD], 4).difference(repartition.of_all_ranks([ODD], 3))


def test_what_no_copy_fills_is_known_as_padding():
    layout, other = repartition.of_all_ranks([ODD], 4), repartition.of_all_ranks([ODD], 3)
    lengths = [sum(-(-math.prod(shape) // 4) for shape in ODD.values())]
    sizes = [
        sum(
            end - start
            for _, start, end in repartition.sub_group_gaps(repartition.copies(other, layout, rank), lengths)
        )
        for rank in range(4)
    ]
    assert sum(sizes) == 4 * lengths[0] - sum(map(math.prod, ODD.values()))


def expert_parallel(tmp_path, sharing=((0, 2), (1, 3), (0, 2), (1, 3))):
    """Four ranks in two groups of experts: a dense sub-group over all, and one over those that hold the same shard."""
    states = {}
    for rank, shared in enumerate(sharing):
        flat = SimpleNamespace(file=tmp_path / f"rank{rank}")
        shapes = [{"a": (7, 3)}, {f"x.mlp.experts.{rank % 2}.w2": (2, 5)}]
        states[rank] = SimpleNamespace(flat=[flat, flat], shapes=shapes, sharing=[[0, 1, 2, 3], list(shared)])
    return repartition.Source(tmp_path, {"world_size": 4, "step": 1}, states)


@pytest.mark.parametrize("asked", range(4))
def test_files_of_an_expert_parallel_run_say_who_shares_what(tmp_path, asked):
    layout = expert_parallel(tmp_path).layout(asked)
    found = sorted((group.index, tuple(group.ranks), *group.shapes) for group in layout.groups)
    assert found == [(0, (0, 1, 2, 3), "a"), (1, (0, 2), "x.mlp.experts.0.w2"), (1, (1, 3), "x.mlp.experts.1.w2")]
    elements = {"a": np.arange(21)} | {f"x.mlp.experts.{i}.w2": 100 + 10 * i + np.arange(10) for i in range(2)}
    whole = repartition.of_all_ranks([{name: (part.size,) for name, part in elements.items() if name == "a"}], 1)
    assert layout.difference(whole), "experts are missing there"
    other = repartition.of_all_ranks([{"a": (7, 3), "x.mlp.experts.0.w2": (4, 5)}], 3)
    assert not layout.difference(other)
    joined = elements | {"x.mlp.experts.0.w2": np.concatenate([elements[f"x.mlp.experts.{i}.w2"] for i in range(2)])}
    found = moved(layout, other, flat_tensors(layout, elements, 4), 3)
    wanted = flat_tensors(other, joined, 3)
    assert {key: part.tolist() for key, part in found.items()} == {key: part.tolist() for key, part in wanted.items()}


@pytest.mark.parametrize("sharing", [((0, 2), (1, 3), (0, 2), (2, 3)), ((0, 2), (1, 2), (0, 2), (1, 3)), ((1, 2),) * 4])
def test_files_that_contradict_each_other_on_who_shares_what_are_refused(tmp_path, sharing):
    with pytest.raises(BadInputError, match="which ranks share its parameters"):
        source = expert_parallel(tmp_path, sharing)
        states = dict(source._states)
        source._states.clear()
        with pytest.MonkeyPatch.context() as patch:
            for state in states.values():
                state.optimizer_steps, state.hyperparameters, state.skipped_steps = [1.0], [], 0
            patch.setattr(rank_state, "read", lambda _, rank, __: states[rank])
            source.layout(0)
            for rank in range(4):
                source.state(rank)


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(stored.STORED / f"step_{stored.STEP}", tmp_path / f"step_{stored.STEP}")


def read_by(folder, world_size, changed=lambda shapes: shapes):
    """What ranks of another number read of the stored checkpoint: name → whole master weights, and what is wrong."""
    marker = json.loads((folder / "committed.json").read_text())
    whole, ranges, problems, total, padding = {}, {}, [], 0, 0
    for rank in range(world_size):
        source = repartition.Source(folder, marker)
        with rank_state.RecordingFiles() as opened:
            try:
                first, *_ = old_ranks = repartition.old_ranks_of(rank, world_size, source.world_size)
                old = source.layout(first)
                new = repartition.of_all_ranks(source.state(first).shapes, world_size)
                padding = old.padding * 4
                for other in old_ranks:
                    for stored_buffer in source.state(other).buffers.values():
                        opened.read(stored_buffer.file, stored_buffer.offset, np.uint8, stored_buffer.bytes)
                keys = [place for _, _, *place in new.of_rank(rank)]
                copies = list(repartition.copies(old, new, rank))
                for moment in (None, "exp_avg", "exp_avg_sq"):
                    parts = []
                    for copy in copies:
                        tensor, offset = source.place(copy, moment)
                        parts.append(opened.read(tensor.file, offset, np.float32, copy.count))
                    if moment is None:
                        joined, position = np.concatenate(parts), 0
                        for key, start, count in keys:
                            whole.setdefault(key, []).append((start, joined[position : position + count]))
                            position += count
            except BadInputError as error:
                problems.append(str(error))
            total += opened.bytes_read
            for name, some in opened.ranges().items():
                ranges.setdefault(name, []).extend(some)
    checked, unchecked, found = rank_state.check_ranges(folder, ranges, sorted(ranges), padding)
    weights = {
        key: np.concatenate([part for _, part in sorted(parts, key=lambda one: one[0])]) for key, parts in whole.items()
    }
    return weights, problems + found, (checked, unchecked), total


@pytest.mark.parametrize("world_size", [1, 3, 4, 7])
def test_ranks_of_any_number_read_every_byte_once_and_judge_every_record(folder, world_size):
    weights, problems, judged, total = read_by(folder, world_size)
    assert problems == [] and judged == (8, 0), "three tensors and a buffer of each old rank"
    opened = zero.open_checkpoint(folder)
    with OpenFiles() as files:
        for name, parameter in opened.parameters.items():
            key, first = repartition.key_of(name, parameter.shape)
            expected = np.empty(parameter.elements, np.float32)
            parameter.read_into(files, 0, expected)
            assert np.array_equal(weights[key][first : first + parameter.elements], expected)
    elements = sum(parameter.elements for parameter in opened.parameters.values())
    buffers = sum(tensor.bytes for tensor in opened.buffers.values())
    assert total == 12 * elements + max(world_size, stored.RANKS) * buffers


DAMAGES = {
    "a bit of the master weights": (lambda f: stored.flip(stored.optimizer(f, 0), -1), "rank_0_mp_rank_00_optim"),
    "a bit of the second moments": (lambda f: stored.flip(stored.optimizer(f, 1), -3), "rank_1_mp_rank_00_optim"),
    "a page of zeros": (lambda f: stored.lose_page(stored.optimizer(f, 0)), "rank_0_mp_rank_00_optim"),
    "a bit of a buffer that no rank needs": (lambda f: stored.flip(stored.model(f, 1), -1), "rank_1_mp_rank_00_model"),
    "files of two ranks exchanged": (
        lambda f: stored.exchange(stored.optimizer(f, 0), stored.optimizer(f, 1)),
        "is of another rank",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("world_size", [1, 3, 4])
def test_nothing_damaged_is_believed_by_other_ranks(folder, damage, world_size):
    harm, named = DAMAGES[damage]
    harm(folder)
    _, problems, _, _ = read_by(folder, world_size)
    assert problems and any(named in problem for problem in problems), problems


def test_a_bit_anywhere_in_what_is_read_is_found(folder):
    chance = random.Random(3)
    for _ in range(12):
        file, record, where = (
            stored.optimizer(folder, chance.randrange(2)),
            chance.choice((-1, -2, -3)),
            chance.random(),
        )
        stored.flip(file, record, where)
        assert file.name in "".join(read_by(folder, 3)[1])
        stored.flip(file, record, where)
    assert read_by(folder, 3)[1] == []
