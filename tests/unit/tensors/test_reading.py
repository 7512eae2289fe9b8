"""Reading ZeRO-3 checkpoints: the layout, and what damaged, foreign or hostile files get."""

import builtins
import os
import pickle
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import synthetic_zero3
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_sft.convert import zero
from deepseek_sft.errors import BadInputError
from deepseek_sft.tensors import torch_pickle
from deepseek_sft.tensors.byte_ranges import OpenFiles

SHAPES = st.lists(st.lists(st.integers(1, 7), min_size=0, max_size=3), min_size=1, max_size=6)


def arrays_of(shapes, seed=0):
    random = np.random.default_rng(seed)
    return {f"llm.p{i}": random.standard_normal(shape).astype(np.float32) for i, shape in enumerate(shapes)}


def read(parameter, start, count):
    target = np.empty(count, np.float32)
    with OpenFiles() as files:
        parameter.read_into(files, start, target)
    return target


@pytest.fixture
def folder(tmp_path):
    tensors = arrays_of([(5, 3), (8,), (2, 2, 2)])
    return synthetic_zero3.write_checkpoint(tmp_path / "step7", [tensors], 3)


@settings(deadline=None, max_examples=60)
@given(SHAPES, st.integers(1, 7), st.integers(1, 40), st.data())
def test_any_range_of_any_parameter_is_read_for_every_world_size_and_grouping(shapes, world_size, largest, data):
    tensors = arrays_of(shapes)
    groups = synthetic_zero3.split_groups(tensors, largest)
    with tempfile.TemporaryDirectory() as place:
        checkpoint = zero.open_checkpoint(synthetic_zero3.write_checkpoint(Path(place), groups, world_size))
        assert checkpoint.world_size == world_size and checkpoint.step == 7
        assert list(checkpoint.parameters) == list(tensors)
        for name, values in tensors.items():
            start = data.draw(st.integers(0, values.size))
            count = data.draw(st.integers(0, values.size - start))
            found = read(checkpoint.parameters[name], start, count)
            assert np.array_equal(found, values.reshape(-1)[start : start + count])


def test_frozen_parameters_are_read_from_the_model_states(tmp_path):
    frozen = {"llm.f": np.arange(11, dtype=np.float32)}
    synthetic_zero3.write_checkpoint(tmp_path, [arrays_of([(4,)])], 3, frozen=frozen)
    checkpoint = zero.open_checkpoint(tmp_path)
    assert np.array_equal(read(checkpoint.parameters["llm.f"], 0, 11), frozen["llm.f"])


def test_fingerprint_changes_with_any_weight(tmp_path):
    tensors = arrays_of([(5, 3)])
    first = zero.open_checkpoint(synthetic_zero3.write_checkpoint(tmp_path / "a", [tensors], 2)).fingerprint
    again = zero.open_checkpoint(synthetic_zero3.write_checkpoint(tmp_path / "b", [tensors], 2)).fingerprint
    tensors["llm.p0"][4, 2] += 1
    other = zero.open_checkpoint(synthetic_zero3.write_checkpoint(tmp_path / "c", [tensors], 2)).fingerprint
    assert first == again != other


@pytest.mark.parametrize("kind", [0, 1])
def test_missing_rank_is_named(folder, kind):
    name = synthetic_zero3.rank_names(1)[kind]
    (folder / name).unlink()
    with pytest.raises(BadInputError, match=r"the (optim|model)_states file of 1 is missing: zero_pp_rank_\[1\]"):
        zero.open_checkpoint(folder)


@pytest.mark.parametrize("kind", [0, 1])
def test_truncated_rank_file_is_named_whatever_is_cut(folder, kind):
    path = folder / synthetic_zero3.rank_names(2)[kind]
    content = path.read_bytes()
    for length in range(0, len(content), max(1, len(content) // 50)):
        path.write_bytes(content[:length])
        with pytest.raises(BadInputError) as error:
            zero.open_checkpoint(folder)
        assert path.name in str(error.value)


def test_damaged_pickle_is_named(folder):
    path = folder / synthetic_zero3.rank_names(0)[1]
    content = bytearray(path.read_bytes())
    content[content.index(b"param_shapes")] ^= 1
    path.write_bytes(content)
    with pytest.raises(BadInputError, match=path.name):
        zero.open_checkpoint(folder)


def test_file_of_another_step_is_named(folder, tmp_path):
    other = synthetic_zero3.write_checkpoint(tmp_path / "other", [arrays_of([(5, 3), (8,), (2, 2, 2)])], 3, step=9)
    name = synthetic_zero3.rank_names(1)[0]
    shutil.copy(other / name, folder / name)
    with pytest.raises(BadInputError, match=name):
        zero.open_checkpoint(folder)


def test_file_of_another_world_size_is_refused(folder, tmp_path):
    other = synthetic_zero3.write_checkpoint(tmp_path / "other", [arrays_of([(5, 3), (8,), (2, 2, 2)])], 4)
    name = synthetic_zero3.rank_names(1)[0]
    shutil.copy(other / name, folder / name)
    with pytest.raises(BadInputError, match="4 ranks"):
        zero.open_checkpoint(folder)


def test_left_over_rank_is_refused(folder):
    name = synthetic_zero3.rank_names(0)[0]
    shutil.copy(folder / name, folder / synthetic_zero3.rank_names(3)[0])
    with pytest.raises(BadInputError, match="more than the 3 ranks of bf16_zero_pp_rank_0"):
        zero.open_checkpoint(folder)


def test_parent_of_checkpoints_gets_their_names_as_the_fix(folder):
    with pytest.raises(BadInputError, match="step7"):
        zero.open_checkpoint(folder.parent)


def test_marker_with_another_size_names_the_file(folder):
    synthetic_zero3.write_marker(folder, 3)
    assert zero.open_checkpoint(folder).marker.run_id == "0123456789ab"
    marker = folder / "committed.json"
    size = (folder / synthetic_zero3.rank_names(2)[0]).stat().st_size
    marker.write_text(marker.read_text().replace(str(size), str(size + 1), 1))
    with pytest.raises(BadInputError, match=r"had \d+ bytes when the checkpoint was committed"):
        zero.open_checkpoint(folder)


@pytest.mark.parametrize("change", [{"format": 2}, {"experts": {}}, {"files": []}, {"zero_stage": 1}, {"step": None}])
def test_malformed_marker_is_refused(folder, change):
    synthetic_zero3.write_marker(folder, 3, **change)
    with pytest.raises(BadInputError, match=r"committed\.json"):
        zero.open_checkpoint(folder)


@pytest.mark.parametrize(
    "function, arguments",
    [(os.system, ("touch {}",)), (builtins.eval, ("open('{}', 'w')",)), (builtins.exec, ("open('{}', 'w')",))],
)
def test_hostile_pickle_is_refused_and_nothing_runs(folder, tmp_path, function, arguments):
    trace = tmp_path / "executed"
    path = folder / synthetic_zero3.rank_names(1)[0]
    synthetic_zero3.write_malicious(path, function, *(text.format(trace) for text in arguments))
    with pytest.raises(BadInputError, match=r"refused: it asks for (posix|builtins)\.\w+") as error:
        zero.open_checkpoint(folder)
    assert path.name in str(error.value)
    assert not trace.exists()


def test_objects_of_known_frameworks_stay_inert():
    # getattr(HistoryBuffer, "x")(…) is how mmengine's bound methods are pickled; here it reaches nothing.
    content = b"cbuiltins\ngetattr\n(cmmengine.logging.history_buffer\nHistoryBuffer\nVx\ntRI1\n\x85R."
    result = torch_pickle.load(torch_pickle.Archive(Path("x"), "x", {}, content, []))
    assert isinstance(result, torch_pickle.Inert) and result.args == (1,)


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=60))
def test_no_pickle_raises_anything_but_the_error_for_bad_input(content):
    # Memo indices are left out: the unpickler would allocate for them.
    content = content.translate(None, b"qrp")
    try:
        torch_pickle.load(torch_pickle.Archive(Path("x"), "x", {}, content, []))
    except BadInputError as error:
        assert "x" in str(error)


def test_tensor_beyond_its_storage_is_refused(tmp_path):
    path = tmp_path / "a.pt"
    synthetic_zero3.save({"t": synthetic_zero3.Tensor(np.zeros(4, np.float32), (5,))}, path)
    with pytest.raises(BadInputError, match="exceeds its storage"):
        torch_pickle.load(torch_pickle.open_archive(path))


def test_plain_pickle_is_no_archive(tmp_path):
    path = tmp_path / "a.pt"
    path.write_bytes(pickle.dumps({}))
    with pytest.raises(BadInputError, match=r"a\.pt is cut or corrupt"):
        torch_pickle.open_archive(path)
