"""The engine of conversion: checksums joined from ranges, bounded descriptors, order of work, the measured plan."""

import ctypes
import errno
import itertools
import os
import zlib
from pathlib import Path

import numpy as np
import pytest
import small_models
from conversion_helpers import RANKS, convert_all, write_inputs
from hypothesis import given
from hypothesis import strategies as st

from deepseek_sft.convert import base_model, convert, disk_bandwidth, dry_run, zero
from deepseek_sft.errors import BadInputError, CrashError
from deepseek_sft.tensors import byte_ranges, checksums, shard_writer
from deepseek_sft.tensors.byte_ranges import OpenFiles


@given(st.binary(max_size=300), st.binary(max_size=300))
def test_checksum_of_two_ranges_is_that_of_their_bytes(first, second):
    assert checksums.combine(zlib.crc32(first), zlib.crc32(second), len(second)) == zlib.crc32(first + second)


@given(st.integers(0, 5000))
def test_checksum_of_a_hole_is_that_of_zeros(length):
    assert checksums.zeros(length) == zlib.crc32(bytes(length))


@given(st.binary(min_size=1, max_size=200), st.data())
def test_ranges_in_any_order_join_to_the_whole(content, data):
    cuts = sorted({0, len(content), *data.draw(st.lists(st.integers(0, len(content)), max_size=8))})
    ranges = [(a, b, zlib.crc32(content[a:b])) for a, b in itertools.pairwise(cuts)]
    shuffled = data.draw(st.permutations(ranges))
    assert checksums.join(shuffled) == [(0, len(content), zlib.crc32(content))]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("engine"))


def test_every_record_of_master_weights_is_checked_and_read_once(tmp_path, inputs):
    conversion, (progress, bytes_read, _) = convert_all(inputs, tmp_path / "model")
    groups = len({int(p.starts[0]) for p in conversion.checkpoint.parameters.values()})
    assert groups > 1
    biases = len(conversion.checkpoint.buffers)
    assert biases and progress.figures == {"records_checked": RANKS * groups + biases, "records_without_checksum": 0}
    assert bytes_read == conversion.bytes_to_read


def flip_bit(path, offset):
    with open(path, "r+b") as stream:
        stream.seek(offset)
        byte = stream.read(1)[0]
        stream.seek(offset)
        stream.write(bytes([byte ^ 1]))
    return path


def flip_bit_of_a_weight(checkpoint, rank):
    opened = zero.open_checkpoint(checkpoint)
    parameter = opened.parameters["llm.model.layers.1.mlp.experts.0.w2"]
    path, offset, _ = list(parameter.pieces(0, parameter.elements))[rank]
    return flip_bit(path, offset + 5)


@pytest.fixture
def damaged(tmp_path):
    """Inputs with one flipped bit; its file."""
    write_inputs(tmp_path / "damaged")
    return tmp_path / "damaged", flip_bit_of_a_weight(tmp_path / "damaged/step", 3)


def test_one_flipped_bit_in_a_weight_is_refused_with_the_file(tmp_path, damaged):
    folder, path = damaged
    with pytest.raises(BadInputError, match=f"{path.name}: the content of record .* checksum"):
        convert_all(folder, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_one_flipped_bit_in_a_router_bias_is_refused_with_the_file(tmp_path):
    write_inputs(tmp_path / "in")
    bias = next(iter(zero.open_checkpoint(tmp_path / "in/step").buffers.values()))
    path = flip_bit(bias.file, bias.offset)
    with pytest.raises(BadInputError, match=f"{path.name}: the content of record .* checksum"):
        convert_all(tmp_path / "in", tmp_path / "model")


def test_restored_file_is_converted_by_the_same_command(tmp_path, inputs, damaged):
    folder, _ = damaged
    with pytest.raises(BadInputError):
        convert_all(folder, tmp_path / "model")
    flip_bit_of_a_weight(folder / "step", 3)  # back
    _, (progress, _, _) = convert_all(folder, tmp_path / "model")
    assert 0 < progress.kept < len(progress.done)  # what was made from other records of that file stays
    convert_all(inputs, tmp_path / "whole")
    assert small_models.contents(tmp_path / "model") == small_models.contents(tmp_path / "whole")


def test_without_checksums_nothing_is_compared(tmp_path, damaged):
    _, (progress, _, _) = convert_all(damaged[0], tmp_path / "model", checksums=False)
    assert progress.figures == {}


def test_record_without_checksum_is_counted_not_refused(tmp_path, inputs, monkeypatch):
    without = {start: ("x", size, 0) for start, size in [(0, 4)]}
    monkeypatch.setattr(checksums, "_records", lambda path: without)
    with OpenFiles() as opened:
        verdict = checksums.check(opened, tmp_path / "any", [(0, 4, 123)], 0)
    assert (verdict.checked, verdict.unchecked, verdict.damaged) == (0, 1, [])


# ---- descriptors


def descriptors():
    return len(list(Path("/proc/self/fd").iterdir()))


def test_more_files_than_descriptors_are_read_all_the_same(tmp_path):
    paths = [tmp_path / str(number) for number in range(1200)]
    for number, path in enumerate(paths):
        path.write_bytes(np.uint32(number).tobytes())
    before = descriptors()
    with OpenFiles(limit=20) as opened:
        for _ in range(2):
            for number, path in enumerate(paths):
                assert opened.read(path, 0, np.uint32, 1)[0] == number
                assert len(opened) <= 20
        assert descriptors() <= before + 21
    assert descriptors() <= before


def test_file_in_use_is_not_closed(tmp_path):
    for name in "abc":
        (tmp_path / name).write_bytes(name.encode())
    with OpenFiles(limit=1) as opened, opened.descriptor(tmp_path / "a") as first:
        opened.read(tmp_path / "b", 0, np.uint8, 1)
        opened.read(tmp_path / "c", 0, np.uint8, 1)
        assert os.pread(first, 1, 0) == b"a"


def test_low_limit_of_open_files_is_kept_within(monkeypatch):
    monkeypatch.setattr(byte_ranges.resource, "getrlimit", lambda kind: (256, 256))
    set_to = []
    monkeypatch.setattr(byte_ranges.resource, "setrlimit", lambda kind, limits: set_to.append(limits))
    byte_ranges.allow_open_files(2048)
    assert set_to == []  # the hard limit allows no more
    assert byte_ranges.file_limit() == (256 - byte_ranges.RESERVE) // 2


# ---- order and memory of work


def test_work_is_announced_before_it_is_done(tmp_path, inputs, monkeypatch):
    announced, done = [], []
    real = shard_writer.OpenShard.work

    def work(self, produce, *item):
        assert item in announced
        done.append(item)
        return real(self, produce, *item)

    original = convert.write_model

    def watched(plan, produce):
        expect = plan.expect
        watching = convert.dataclasses.replace(plan, expect=lambda *item: (announced.append(item), expect(*item)))
        return original(watching, produce)

    monkeypatch.setattr(shard_writer.OpenShard, "work", work)
    monkeypatch.setattr(convert, "write_model", watched)
    convert_all(inputs, tmp_path / "model")
    assert sorted(done) == sorted(announced) and len(done) == len(set(done))


# ---- space


def fallocate_failing_with(code):
    def fallocate(*_):
        ctypes.set_errno(code)
        return -1

    return fallocate


def test_file_system_without_allocation_is_not_filled_block_by_block(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_writer, "_fallocate", fallocate_failing_with(errno.EOPNOTSUPP))
    with open(tmp_path / "a", "w+b") as stream:
        shard_writer.reserve(stream.fileno(), 1 << 24)
        found = os.fstat(stream.fileno())
    assert found.st_size == 1 << 24 and found.st_blocks * 512 < 1 << 20


def test_space_is_taken_at_once_or_said_to_be_missing(tmp_path):
    with open(tmp_path / "a", "w+b") as stream:
        shard_writer.reserve(stream.fileno(), 1 << 20)
        assert os.fstat(stream.fileno()).st_blocks * 512 >= 1 << 20
        with pytest.raises(OSError, match=r"No space left|File too large"):
            shard_writer.reserve(stream.fileno(), 1 << 62)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_lack_of_space_is_told_with_what_to_do(tmp_path, inputs, monkeypatch, code):
    monkeypatch.setattr(shard_writer, "_fallocate", fallocate_failing_with(code))
    with pytest.raises(CrashError, match=rf"failed: {os.strerror(code)}[\s\S]*free space"):
        convert_all(inputs, tmp_path / "model")


# ---- the plan


def test_time_range_follows_from_the_slowest_part_and_from_all_in_turn():
    speed = disk_bandwidth.Bandwidth(read=100.0, write=10.0, convert=1000.0)
    assert speed.seconds(1000, 500) == (50.0, 1.5 * (10 + 50 + 1))
    assert disk_bandwidth.Bandwidth(None, 10.0, 1000.0).seconds(1000, 500) is None


def test_plan_tells_sizes_and_shares_and_leaves_no_file(tmp_path, inputs):
    opened = zero.open_checkpoint(inputs / "step"), base_model.open_model(inputs / "base")
    conversion = convert.prepare(*opened, tmp_path / "model", convert.Options(largest_shard=20_000))
    plan = dry_run.describe(conversion, shares=3)
    assert plan["bytes_to_write"] == sum(plan["bytes_of_each_share"]) == sum(s.size for s in conversion.shards)
    assert plan["measured_bytes_per_second"]["write"] > 0
    assert "on 3 nodes" in dry_run.summary(plan | {"seconds": [10.0, 20.0]})
    assert list(tmp_path.iterdir()) == []
