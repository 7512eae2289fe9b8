"""Stages 1 and 2, several groups, frozen and shared parameters, buffers: every element is found where it lies."""

import dataclasses
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import small_models
import synthetic_zero3
import synthetic_zero12
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_sft.convert import base_model, convert, dry_run, zero, zero_files
from deepseek_sft.errors import BadInputError
from deepseek_sft.families import deepseek_v3
from deepseek_sft.tensors import torch_pickle
from deepseek_sft.tensors.byte_ranges import OpenFiles

SHAPES = st.lists(st.lists(st.integers(0, 7), min_size=0, max_size=3), min_size=0, max_size=5)


def arrays(groups, seed=0):
    random = np.random.default_rng(seed)
    return [
        {f"llm.g{i}.p{j}": random.standard_normal(shape).astype(np.float32) for j, shape in enumerate(shapes)}
        for i, shapes in enumerate(groups)
    ]


def read(parameter, start=0, count=None):
    target = np.empty(parameter.elements - start if count is None else count, np.float32)
    with OpenFiles() as files:
        parameter.read_into(files, start, target)
    return target


@settings(deadline=None, max_examples=80)
@given(
    st.lists(SHAPES, min_size=1, max_size=3),
    st.integers(1, 9),
    st.sampled_from([(1, 2, False), (2, 2, False), (None, 2, True), (2, 1, False), (2, 1, True), (1, 2, True)]),
    st.data(),
)
def test_any_range_is_read_at_stages_1_and_2_for_every_world_size_and_padding(groups, world_size, kind, data):
    stage, alignment, padded = kind
    groups = arrays(groups)
    with tempfile.TemporaryDirectory() as place:
        folder = synthetic_zero12.write_checkpoint(
            Path(place), groups, world_size, stage, alignment=alignment, padded=padded
        )
        checkpoint = zero.open_checkpoint(folder)
        assert (checkpoint.world_size, checkpoint.step, checkpoint.stage) == (world_size, 7, stage or 1)
        assert list(checkpoint.parameters) == [name for group in groups for name in group]
        for group in groups:
            for name, values in group.items():
                start = data.draw(st.integers(0, values.size))
                count = data.draw(st.integers(0, values.size - start))
                expected = values.reshape(-1)[start : start + count]
                assert np.array_equal(read(checkpoint.parameters[name], start, count), expected)


@settings(deadline=None, max_examples=30)
@given(st.lists(SHAPES, min_size=1, max_size=3), st.integers(1, 6), st.integers(1, 30))
def test_stage_3_reads_several_groups_each_cut_into_sub_groups(groups, world_size, largest):
    groups = arrays(groups)
    cut = [sub for group in groups for sub in synthetic_zero3.split_groups(group, largest)] or arrays([[(3,)]])
    with tempfile.TemporaryDirectory() as place:
        checkpoint = zero.open_checkpoint(synthetic_zero3.write_checkpoint(Path(place), cut, world_size))
        for name, values in {n: v for group in groups for n, v in group.items()}.items():
            assert np.array_equal(read(checkpoint.parameters[name]), values.reshape(-1))


@pytest.mark.parametrize("stage", [1, 2])
def test_frozen_parameters_come_from_the_model_state(tmp_path, stage):
    frozen = {"llm.f": np.arange(11, dtype=np.float32)}
    synthetic_zero12.write_checkpoint(tmp_path, arrays([[(4,)]]), 3, stage, frozen=frozen)
    assert np.array_equal(read(zero.open_checkpoint(tmp_path).parameters["llm.f"]), frozen["llm.f"])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """(base, trained tensors)."""
    base = small_models.make_base(tmp_path_factory.mktemp("stages") / "base")
    return base, small_models.train(small_models.read_tensors(base))


def convert_to(output, checkpoint, base):
    opened = zero.open_checkpoint(checkpoint), base_model.open_model(base)
    convert.run(convert.prepare(*opened, output, convert.Options(workers=2)))
    return small_models.read_tensors(output)


@pytest.mark.parametrize("stage", [1, 2, None])
def test_fused_experts_and_two_parameter_groups_convert_at_stages_1_and_2(tmp_path, model, stage):
    base, trained = model
    fused = synthetic_zero3.fuse(trained, 2)
    buffers = {n: v for n, v in fused.items() if n.endswith(deepseek_v3.CORRECTION_BIAS)}
    frozen_name = "llm.model.embed_tokens.weight"
    groups = [
        {n: v for n, v in fused.items() if n not in buffers and n != frozen_name and ("norm" in n) is decayed}
        for decayed in (False, True)
    ]
    synthetic_zero12.write_checkpoint(tmp_path / "c", groups, 3, stage, buffers, {frozen_name: fused[frozen_name]})
    found = convert_to(tmp_path / "model", tmp_path / "c", base)
    assert found.keys() == trained.keys()
    for name, values in trained.items():
        expected = values if name.endswith(deepseek_v3.CORRECTION_BIAS) else small_models.rounded(values)
        assert np.array_equal(found[name], expected), name


@pytest.mark.parametrize("stage", [1, 2])
def test_plan_measures_many_parameters_and_stays_within_their_bytes_at_stages_1_and_2(tmp_path, model, stage):
    base, trained = model
    buffers = {n: v for n, v in trained.items() if n.endswith(deepseek_v3.CORRECTION_BIAS)}
    weights = {n: v for n, v in trained.items() if n not in buffers}
    synthetic_zero12.write_checkpoint(tmp_path / "c", [weights], 3, stage, buffers)
    opened = zero.open_checkpoint(tmp_path / "c"), base_model.open_model(base)
    halves = {n: dataclasses.replace(p, dtype="BF16") for n, p in opened[0].parameters.items()}
    for dtype, parameters in ((4, opened[0].parameters), (2, halves)):
        checkpoint = dataclasses.replace(opened[0], parameters=parameters)
        conversion = convert.prepare(checkpoint, opened[1], tmp_path / "model", convert.Options())
        ranges = dry_run._probed_ranges(conversion)
        sizes = {dtype * length for p in parameters.values() for _, _, length in p.pieces(0, p.elements)}
        assert len(ranges) == min(dry_run.MOST_PROBED, len(parameters))
        assert {size for _, _, size in ranges} <= sizes


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("stored", ["model.embed_tokens.weight", "lm_head.weight"])
def test_tied_weights_are_written_under_the_names_the_base_has(tmp_path, model, stage, stored):
    base, trained = model
    alias = ({"model.embed_tokens.weight", "lm_head.weight"} - {stored}).pop()
    write = synthetic_zero3.write_checkpoint if stage == 3 else synthetic_zero12.write_checkpoint
    biases = {n: v for n, v in trained.items() if n.endswith(deepseek_v3.CORRECTION_BIAS)}
    weights = {n: v for n, v in trained.items() if n not in biases and n != alias}
    write(tmp_path / "c", [weights], 2, buffers=biases, shared={alias: stored})
    both = convert_to(tmp_path / "both", tmp_path / "c", base)
    assert np.array_equal(both[alias], small_models.rounded(trained[stored]))
    assert np.array_equal(both[stored], small_models.rounded(trained[stored]))

    tied = small_models.make_tied(base, tmp_path / "tied")
    found = convert_to(tmp_path / "one", tmp_path / "c", tied)
    assert found.keys() == trained.keys() - {"lm_head.weight"}
    assert np.array_equal(found["model.embed_tokens.weight"], small_models.rounded(trained[stored]))


def test_part_of_another_length_names_its_file(tmp_path):
    folder = synthetic_zero12.write_checkpoint(tmp_path / "a", arrays([[(40,)]]), 4)
    other = synthetic_zero12.write_checkpoint(tmp_path / "b", arrays([[(80,)]]), 4)
    name = synthetic_zero3.rank_names(2)[0]
    shutil.copy(other / name, folder / name)
    with pytest.raises(BadInputError, match=name):
        zero.open_checkpoint(folder)


def test_missing_model_state_is_named(tmp_path):
    folder = synthetic_zero12.write_checkpoint(tmp_path, arrays([[(40,)]]), 4)
    (folder / "mp_rank_00_model_states.pt").unlink()
    with pytest.raises(BadInputError, match=r"mp_rank_00_model_states\.pt is missing"):
        zero.open_checkpoint(folder)


def test_groups_over_different_numbers_of_ranks_are_refused(tmp_path):
    folder = synthetic_zero12.write_checkpoint(tmp_path, arrays([[(4,)], [(4,)]]), 2)
    name = synthetic_zero3.rank_names(0)[0]
    groups = [synthetic_zero3.Tensor(np.zeros(2, np.float32))] * 2
    state = {"zero_stage": 2, "partition_count": [2, 1], "single_partition_of_fp32_groups": groups}
    synthetic_zero3.save({"optimizer_state_dict": state}, folder / name)
    with pytest.raises(BadInputError, match=rf"{name}: its parameter groups are spread over \[2, 1\] ranks"):
        zero.open_checkpoint(folder)


def test_files_of_expert_parallelism_are_refused(tmp_path):
    folder = synthetic_zero12.write_checkpoint(tmp_path, arrays([[(4,)]]), 2)
    (folder / "layer_0_expert_1_mp_rank_00_model_states.pt").touch()
    with pytest.raises(BadInputError, match="expert parallelism"):
        zero.open_checkpoint(folder)


@pytest.mark.parametrize(
    "named, stage", [("optimizer_states", 1), ("gradients", 2), ("weights", 3), ("disabled", None)]
)
def test_a_stage_that_an_older_python_has_pickled_by_its_name_is_read(named, stage, tmp_path):
    """Python 3.11.2 pickles an enumeration's member as ``getattr(ZeroStageEnum, "weights")``."""
    enumeration = b"cdeepspeed.runtime.zero.config\nZeroStageEnum\n"
    content = b"cbuiltins\ngetattr\n(" + enumeration + f"V{named}\ntR.".encode()
    found = torch_pickle.load(torch_pickle.Archive(tmp_path, "x", {}, content, []))
    flat = zero_files.FLAT_GROUPS[stage or 3]
    state = {"zero_stage": found, flat: [], "partition_count": 2}
    read = lambda: zero_files.read_optimizer(tmp_path, lambda _: {"optimizer_state_dict": state})  # noqa: E731
    if stage is None:
        with pytest.raises(BadInputError, match="written by ZeRO stage"):
            read()
    else:
        assert read().stage == stage
