"""Checkpoints that stock DeepSpeed writes under other settings: read, or refused by what they are."""

import argparse
import collections
import datetime
import decimal
import fractions
import functools
import os
import pathlib
import pickle
import re
import struct
import types
import uuid
import zipfile

import numpy as np
import pytest
import small_models
import synthetic_zero3

from deepseek_sft.convert import base_model, convert, zero
from deepseek_sft.errors import BadInputError
from deepseek_sft.families import deepseek_v3
from deepseek_sft.tensors import torch_pickle

EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return small_models.make_base(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def trained(base):
    return small_models.train(small_models.read_tensors(base))


def write(folder, tensors, **options):
    biases = {name: values for name, values in tensors.items() if name.endswith(deepseek_v3.CORRECTION_BIAS)}
    parameters = {name: values for name, values in tensors.items() if name not in biases}
    return synthetic_zero3.write_checkpoint(folder, [parameters], 2, biases, **options)


def converted(checkpoint, base, output, **options):
    opened = zero.open_checkpoint(checkpoint), base_model.open_model(base)
    conversion = convert.prepare(*opened, output, convert.Options(workers=2, **options))
    return convert.run(conversion)[0]


def assert_equal(folder, tensors):
    found = small_models.read_tensors(folder)
    assert found.keys() == tensors.keys()
    for name, values in tensors.items():
        wanted = values if name.endswith(deepseek_v3.CORRECTION_BIAS) else small_models.rounded(values)
        assert np.array_equal(found[name], wanted), name


def without_checksums(path):
    """What ``torch.serialization.set_crc32_options(False)`` leaves: zeros where CRC-32 would stand."""
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        local, position = [entry.header_offset for entry in archive.infolist()], archive.start_dir
    for offset in local:
        struct.pack_into("<I", data, offset + 14, 0)
    for _ in local:
        struct.pack_into("<I", data, position + 16, 0)
        position += 46 + sum(struct.unpack_from("<HHH", data, position + 28))
    path.write_bytes(data)


def test_a_checkpoint_without_checksums_is_converted_and_its_records_counted(tmp_path, base, trained):
    folder = write(tmp_path / "step", trained)
    for path in folder.glob("*.pt"):
        without_checksums(path)
    progress = converted(folder, base, tmp_path / "model")
    assert_equal(tmp_path / "model", trained)
    assert progress.figures["records_checked"] == 0 and progress.figures["records_without_checksum"] > 0


def test_checkpoints_without_checksums_are_told_apart_by_their_content(tmp_path, trained):
    found = []
    for name, factor in (("a", 1), ("b", 2)):
        folder = write(tmp_path / name / "step", {key: values * factor for key, values in trained.items()})
        for path in folder.glob("*.pt"):
            without_checksums(path)
        found.append(zero.open_checkpoint(folder).fingerprint)
    assert found[0] != found[1]


def test_the_old_format_of_torch_save_is_named(tmp_path, base, trained):
    folder = write(tmp_path / "step", trained)
    path = folder / synthetic_zero3.rank_names(0)[0]
    path.write_bytes(torch_pickle.LEGACY_MAGIC + b".\x80\x02M\xe9\x03.")
    with pytest.raises(BadInputError, match=r"torch.save's old format") as error:
        zero.open_checkpoint(folder)
    assert str(path) in error.value.problem and "torch.save(torch.load(" in error.value.fix


STANDARD = {
    "namespace": argparse.Namespace(a=1),
    "simple namespace": types.SimpleNamespace(a=1),
    "timedelta": datetime.timedelta(1),
    "date": datetime.date(2026, 1, 2),
    "time with zone": datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC),
    "partial": functools.partial(int, "3"),
    "counter": collections.Counter("aab"),
    "default dictionary": collections.defaultdict(list, {1: [2]}),
    "deque": collections.deque([1], 3),
    "range": range(3),
    "uuid": uuid.UUID(int=7),
    "decimal": decimal.Decimal("1.5"),
    "fraction": fractions.Fraction(1, 2),
    "bytes": bytearray(b"a"),
    "pattern": re.compile("a", re.IGNORECASE),
    "path": pathlib.PurePosixPath("/x"),
    "complex": 1j,
    "type": int,
}


@pytest.mark.parametrize("kind", STANDARD)
def test_harmless_standard_types_in_client_state_are_read_over(tmp_path, base, trained, kind):
    folder = write(tmp_path / "step", trained)
    path = folder / synthetic_zero3.rank_names(0)[1]
    add_client_state(path, STANDARD[kind])
    assert zero.open_checkpoint(folder).parameters


def add_client_state(path, value):
    """Put a value into the state that a file holds."""
    with zipfile.ZipFile(path) as archive:
        content = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    name = next(name for name in content if name.endswith("/data.pkl"))
    state, extra = content[name], pickle.dumps({"client": value}, protocol=2)
    assert state.endswith(b".") and extra.startswith(b"\x80\x02")
    # The dictionary is on the stack: push key and value, and SETITEM them.
    key = pickle.dumps("client", protocol=2)[2:-1]
    content[name] = state[:-1] + key + extra[2:-1] + b"s."
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for entry, data in content.items():
            archive.writestr(entry, data)


def test_a_function_of_the_system_stays_refused_and_the_way_out_is_said(tmp_path, trained):
    folder = write(tmp_path / "step", trained)
    add_client_state(folder / synthetic_zero3.rank_names(0)[1], os.system)
    with pytest.raises(BadInputError, match=r"posix\.system") as error:
        zero.open_checkpoint(folder)
    assert "client_state" in error.value.fix


def fused_by_transformers5(tensors):
    """All experts of a layer in one parameter each, gate above up."""
    fused, experts = {}, {}
    for name, values in tensors.items():
        head, separator, rest = name.partition(".mlp.experts.")
        if separator:
            expert, part, _ = rest.split(".")
            experts.setdefault(head, {})[int(expert), part] = values
        else:
            fused[name] = values
    for head, parts in experts.items():
        numbers = sorted({expert for expert, _ in parts})
        both = [np.concatenate([parts[e, "gate_proj"], parts[e, "up_proj"]]) for e in numbers]
        fused[f"{head}.mlp.experts.gate_up_proj"] = np.stack(both)
        fused[f"{head}.mlp.experts.down_proj"] = np.stack([parts[e, "down_proj"] for e in numbers])
    return fused


def test_experts_fused_by_transformers_5_come_apart(tmp_path, base, trained):
    folder = write(tmp_path / "step", fused_by_transformers5(trained))
    converted(folder, base, tmp_path / "model")
    assert_equal(tmp_path / "model", trained)


def test_a_universal_checkpoint_is_named(tmp_path):
    folder = tmp_path / "global_step5_universal"
    (folder / "zero" / "model.norm.weight").mkdir(parents=True)
    (folder / "zero" / "model.norm.weight" / "fp32.pt").write_bytes(b"x")
    (folder / "mp_rank_00_model_states.pt").write_bytes(b"x")
    with pytest.raises(BadInputError, match="universal checkpoint") as error:
        zero.open_checkpoint(folder)
    assert "ZeRO checkpoint that it was made from" in error.value.fix


def test_model_states_alone_are_said_to_lack_the_weights(tmp_path):
    (tmp_path / "mp_rank_00_model_states.pt").write_bytes(b"x")
    with pytest.raises(BadInputError, match="holds model states, but no optimizer states"):
        zero.open_checkpoint(tmp_path)


def test_frozen_parameters_that_were_left_out_are_refused_and_taken_from_the_base_on_request(tmp_path, base, trained):
    folder = write(tmp_path / "step", {name: values for name, values in trained.items() if name != EMBEDDING})
    with pytest.raises(BadInputError, match=f"1 missing, first {EMBEDDING}") as error:
        converted(folder, base, tmp_path / "model")
    assert "exclude_frozen_parameters" in error.value.fix and "--missing-from-base" in error.value.fix
    converted(folder, base, tmp_path / "model", missing_from_base=True)
    assert_equal(tmp_path / "model", trained | {EMBEDDING: small_models.read_tensors(base)[EMBEDDING]})
