"""Damaged, foreign and hostile checkpoints: one message that names the file, no crash, no model."""

import concurrent.futures
import os
import pickle
import resource
import shutil
import struct
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest
import small_models
import synthetic_zero3
import synthetic_zero12
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_sft.convert import zero
from deepseek_sft.errors import BadInputError, StoppedError
from deepseek_sft.families import deepseek_v3
from deepseek_sft.tensors import torch_pickle
from deepseek_sft.tensors.byte_ranges import OpenFiles

WORLD_SIZE = 3
OPTIMIZER, MODEL = synthetic_zero3.rank_names(1)


def write(folder, tensors, stage, step=7):
    biases = {n: v for n, v in tensors.items() if n.endswith(deepseek_v3.CORRECTION_BIAS)}
    weights = {n: v for n, v in tensors.items() if n not in biases}
    if stage == 3:
        groups = synthetic_zero3.split_groups(weights, 3000)
        return synthetic_zero3.write_checkpoint(folder, groups, WORLD_SIZE, biases, step=step)
    return synthetic_zero12.write_checkpoint(folder, [weights], WORLD_SIZE, stage, biases, step=step)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(base, {stage: checkpoint}, {stage: checkpoint of a later step})."""
    folder = tmp_path_factory.mktemp("damage")
    base = small_models.make_base(folder / "base")
    trained = small_models.train(small_models.read_tensors(base))
    later = small_models.train(trained, seed=9)
    checkpoints = {stage: write(folder / f"c{stage}", trained, stage) for stage in (2, 3)}
    return base, checkpoints, {stage: write(folder / f"l{stage}", later, stage, step=9) for stage in (2, 3)}


def cut(folder, _later):
    path = folder / OPTIMIZER
    os.truncate(path, path.stat().st_size * 2 // 3)
    return path.name


def empty(folder, _later):
    os.truncate(folder / OPTIMIZER, 0)
    return OPTIMIZER


def missing(folder, _later):
    (folder / OPTIMIZER).unlink()
    return r"zero_pp_rank_\[1\]_mp_rank_00_optim_states"


def swapped(folder, _later):
    other = folder / synthetic_zero3.rank_names(2)[0]
    (folder / OPTIMIZER).rename(folder / "x")
    other.rename(folder / OPTIMIZER)
    (folder / "x").rename(other)
    return f"{OPTIMIZER} was written as "


def extra(folder, _later):
    name = synthetic_zero3.rank_names(WORLD_SIZE)[0]
    shutil.copy(folder / OPTIMIZER, folder / name)
    return name


def of_another_step(folder, later):
    shutil.copy(later / OPTIMIZER, folder / OPTIMIZER)
    return f"{OPTIMIZER} is of step"


def all_optimizers_of_another_step(folder, later):
    for rank in range(WORLD_SIZE):
        name = synthetic_zero3.rank_names(rank)[0]
        shutil.copy(later / name, folder / name)
    return f"{synthetic_zero3.rank_names(0)[0]} is of step 9, the model state files are of step 7"


def hostile(folder, _later):
    synthetic_zero3.write_malicious(folder / OPTIMIZER, os.system, f"touch {folder / 'executed'}")
    return OPTIMIZER


def flipped_header(folder, _later):
    content = bytearray((folder / OPTIMIZER).read_bytes())
    content[content.index(b"PK\x03\x04", len(content) // 4) + 26] ^= 8  # the length of a record's name
    (folder / OPTIMIZER).write_bytes(content)
    return OPTIMIZER


def flipped_directory(folder, _later):
    content = bytearray((folder / OPTIMIZER).read_bytes())
    content[content.rindex(b"PK\x01\x02") + 42] ^= 64  # where a record lies
    (folder / OPTIMIZER).write_bytes(content)
    return OPTIMIZER


DAMAGES = [cut, empty, missing, swapped, extra, of_another_step, all_optimizers_of_another_step, hostile]
DAMAGES += [flipped_header, flipped_directory]


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_refused_with_the_name_of_the_file(tmp_path, made, damage, stage):
    folder = shutil.copytree(made[1][stage], tmp_path / "checkpoint")
    name = damage(folder, made[2][stage])
    with pytest.raises(BadInputError, match=name):
        zero.open_checkpoint(folder)
    assert not (folder / "executed").exists()


@pytest.mark.parametrize("damage", [cut, swapped, hostile])
def test_the_program_writes_no_model_from_a_damaged_checkpoint(tmp_path, project, made, damage):
    folder = shutil.copytree(made[1][3], tmp_path / "checkpoint")
    damage(folder, made[2][3])
    script = project / "workflow/scripts/convert_checkpoint.py"
    arguments = [f"--checkpoint={folder}", f"--base={made[0]}", f"--output={tmp_path / 'out'}"]
    found = subprocess.run(
        [sys.executable, script, *arguments, f"--receipt={tmp_path / 'r.json'}"], capture_output=True, text=True
    )
    assert found.returncode == 2 and "Traceback" not in found.stderr
    assert found.stderr.startswith("error: ") and OPTIMIZER in found.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize("stage", [2, 3])
def test_model_state_of_another_run_is_named(tmp_path, made, stage):
    folder = shutil.copytree(made[1][stage], tmp_path / "checkpoint")
    name = MODEL if stage == 3 else "mp_rank_00_model_states.pt"
    other = write(tmp_path / "other", {"model.norm.weight": np.zeros(50, np.float32)}, stage)
    shutil.copy(other / name, folder / name)
    with pytest.raises(BadInputError, match=r"other parameters than|elements, the parameters' shapes ask for"):
        zero.open_checkpoint(folder)


def test_optimizer_that_was_begun_anew_is_accepted_and_said_so(tmp_path, made, capsys):
    folder = shutil.copytree(made[1][3], tmp_path / "checkpoint")
    for rank in range(WORLD_SIZE):
        name = synthetic_zero3.rank_names(rank)[1]
        shutil.copy(made[2][3] / name, folder / name)
    assert zero.open_checkpoint(folder).step == 9
    assert "the optimizer made 7 steps, the model counts 9" in capsys.readouterr().err


def weights(folder):
    checkpoint = zero.open_checkpoint(folder)
    found = {}
    with OpenFiles() as files:
        for name, parameter in checkpoint.parameters.items():
            found[name] = np.empty(parameter.elements, np.float32)
            parameter.read_into(files, 0, found[name])
    return {name: values.tobytes() for name, values in found.items()}, checkpoint.step


def outside_the_data(path):
    """Byte positions of a file that do not hold tensors."""
    taken = set()
    for start, size in torch_pickle.open_archive(path).records.values():
        taken |= set(range(start, start + size))
    return [position for position in range(path.stat().st_size) if position not in taken]


@pytest.mark.parametrize("as_torch", [False, True])
def test_no_flipped_byte_outside_the_data_changes_a_weight(tmp_path, as_torch):
    tensors = {"llm.a": np.arange(40, dtype=np.float32), "llm.b": np.ones((3, 5), np.float32)}
    folder = synthetic_zero3.write_checkpoint(tmp_path / "c", [tensors], 2)
    path = folder / OPTIMIZER
    if as_torch:
        write_as_torch(path)
    expected, intact = weights(folder), path.read_bytes()
    refused = 0
    for position in outside_the_data(path)[:: 11 if as_torch else 9]:
        for bit in (1, 8, 64):
            content = bytearray(intact)
            content[position] ^= bit
            path.write_bytes(content)
            try:
                assert weights(folder) == expected
            except BadInputError as error:
                refused += 1
                assert OPTIMIZER in str(error)
    assert refused > 100


def write_as_torch(path):
    """The same archive as torch's writer lays it out: aligned data, each followed by a descriptor."""
    with zipfile.ZipFile(path) as archive:
        records = [(entry.filename, archive.read(entry), entry.CRC) for entry in archive.infolist()]
    body, directory = b"", b""
    for name, data, crc in records:
        offset, encoded = len(body), name.encode()
        padding = -(offset + 34 + len(encoded)) % 64
        extra_field = struct.pack("<HH", 0x4246, padding) + b"Z" * padding
        header = struct.pack("<IHHHHHIIIHH", 0x04034B50, 0, 0x808, 0, 0, 0, 0, 0, 0, len(encoded), len(extra_field))
        body += header + encoded + extra_field + data
        body += struct.pack("<IIII", 0x08074B50, crc, len(data), len(data)) if data else b""
        fields = (0x02014B50, 0, 0, 0x808, 0, 0, 0, crc, len(data), len(data), len(encoded), 0, 0, 0, 0, 0, offset)
        directory += struct.pack("<IHHHHHHIIIHHHHHII", *fields) + encoded
    end = struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, len(records), len(records), len(directory), len(body), 0)
    path.write_bytes(body + directory + end)


def test_hostile_sizes_end_in_an_error_and_not_in_gigabytes(tmp_path):
    path = tmp_path / "a.pt"
    synthetic_zero3.write_archive(path, b"\x80\x02Nr" + struct.pack("<I", 0xFFFFFFF0) + b".")
    with pytest.raises(BadInputError, match=r"a\.pt is cut or corrupt: its pickle cannot be read \(MemoryError"):
        torch_pickle.load(torch_pickle.open_archive(path))
    assert len(bytearray(1 << 20)) == 1 << 20  # the limit is lifted again


def test_bound_on_memory_is_lifted_again_when_several_threads_read(tmp_path, monkeypatch):
    synthetic_zero3.write_archive(tmp_path / "a.pt", pickle.dumps({}, 2))
    archive, before = torch_pickle.open_archive(tmp_path / "a.pt"), resource.getrlimit(resource.RLIMIT_AS)
    seconds = iter([0.1, 0.3])  # the second begins under the first's limit and ends after it
    monkeypatch.setattr(torch_pickle.DescriptorUnpickler, "load", lambda _: time.sleep(next(seconds)))
    with concurrent.futures.ThreadPoolExecutor(2) as executor:
        list(executor.map(torch_pickle.load, [archive] * 2))
    assert resource.getrlimit(resource.RLIMIT_AS) == before


def test_stop_while_a_state_is_read_stays_a_stop(tmp_path, monkeypatch):
    synthetic_zero3.write_archive(tmp_path / "a.pt", pickle.dumps({}, 2))

    def stopped(_):
        raise StoppedError("stopped by SIGTERM")

    monkeypatch.setattr(torch_pickle.DescriptorUnpickler, "load", stopped)
    with pytest.raises(StoppedError, match="SIGTERM"):
        torch_pickle.load(torch_pickle.open_archive(tmp_path / "a.pt"))


def test_two_records_of_one_name_are_refused(tmp_path):
    path = tmp_path / "a.pt"
    synthetic_zero3.write_archive(path, pickle.dumps({}, 2))
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(path, "a") as archive:
        archive.writestr("a/data.pkl", pickle.dumps({"other": 1}, 2))
    with pytest.raises(BadInputError, match=r"a\.pt is cut or corrupt: it holds two records of one name"):
        torch_pickle.open_archive(path)


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_no_damaged_checkpoint_pickle_raises_anything_but_the_error_for_bad_input(tmp_path_factory, data):
    """Random bytes replaced in a real state's pickle."""
    folder = tmp_path_factory.getbasetemp() / "fuzz"
    if not folder.exists():
        synthetic_zero3.write_checkpoint(folder, [{"llm.a": np.arange(40, dtype=np.float32)}], 1)
    name = data.draw(st.sampled_from(synthetic_zero3.rank_names(0)))
    content = bytearray(torch_pickle.open_archive(folder / name).pickle)
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    place = tmp_path_factory.getbasetemp() / "fuzzed"
    shutil.copytree(folder, place, dirs_exist_ok=True)
    arrays = {}
    with zipfile.ZipFile(folder / name) as archive:
        arrays = {e.filename: archive.read(e) for e in archive.infolist() if not e.filename.endswith("data.pkl")}
    with zipfile.ZipFile(place / name, "w") as archive:
        archive.writestr(f"{(place / name).stem}/data.pkl", bytes(content))
        for entry, values in arrays.items():
            archive.writestr(entry, values)
    try:
        zero.open_checkpoint(place)
    except BadInputError as error:
        assert str(place) in str(error)  # where two files contradict each other, either may be named
