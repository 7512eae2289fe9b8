"""Number formats, safetensors headers, sizes and the memory bound."""

import json
import struct

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_sft.errors import BadInputError
from deepseek_sft.tensors import memory_bound, number_formats, safetensors_files
from deepseek_sft.tensors.sizes import parse_size
from deepseek_sft.tensors.tensor_spec import TensorSpec

ALL_BF16 = np.arange(1 << 16).astype(np.uint16)


@settings(max_examples=300)
@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_rounding_to_bf16_takes_the_nearest_and_the_even_of_two(value):
    single = np.array([value], np.float32)
    found = int(number_formats.float32_to_bf16(single)[0])
    below = int(single.view(np.uint32)[0] >> 16)
    candidates = [below, below + 1]  # the two neighbours in magnitude
    values = [_value_of(bits) for bits in candidates]
    distances = [abs(float(value) - v) for v in values]
    if distances[0] == distances[1]:
        assert found == next(bits for bits in candidates if bits % 2 == 0)
    else:
        assert found == candidates[distances.index(min(distances))]


def _value_of(bits):
    """Value of a BF16 pattern in double precision; the first beyond the largest finite one continues the scale."""
    sign, magnitude = (-1 if bits & 0x8000 else 1), bits & 0x7FFF
    exponent, mantissa = magnitude >> 7, magnitude & 0x7F
    return sign * (mantissa * 2.0**-133 if exponent == 0 else (128 + mantissa) * 2.0 ** (exponent - 134))


def test_every_bf16_value_survives_widening_and_rounding():
    widened = number_formats.bf16_to_float32(ALL_BF16)
    back = number_formats.float32_to_bf16(widened)
    nan = np.isnan(widened)
    assert np.array_equal(back[~nan], ALL_BF16[~nan])
    assert (back[nan] == number_formats.BF16_NAN).all()


def test_every_nan_stays_a_nan():
    patterns = np.array([0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF, 0xFF800001], np.uint32).view(np.float32)
    assert np.isnan(number_formats.bf16_to_float32(number_formats.float32_to_bf16(patterns))).all()


def test_non_finite_values_are_counted_after_rounding():
    largest = np.finfo(np.float32).max  # rounds up to infinity in BF16
    values = np.array([1, np.nan, np.inf, -np.inf, largest, 0], np.float32)
    assert number_formats.convert(values, "F32", "BF16")[1] == 4
    assert number_formats.convert(values, "F32", "F32")[1] == 3


def test_fp8_values_are_those_of_e4m3():
    values = number_formats.E4M3_VALUES
    assert values[0x7E] == 448 and values[0x08] == 2.0**-6 and values[0x01] == 2.0**-9 and values[0x38] == 1
    assert np.isnan(values[[0x7F, 0xFF]]).all()
    assert (np.diff(values[:0x7F]) > 0).all()
    assert np.array_equal(values[0x80:0xFF], -values[:0x7F])


def test_layout_is_what_the_safetensors_library_reads(tmp_path):
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.zeros(0, np.float32), "c": np.float32([5])}
    specs = [(name, TensorSpec(values.shape, "F32")) for name, values in arrays.items()]
    (shard,) = safetensors_files.lay_out(specs, 1000)
    path = tmp_path / shard.name
    path.write_bytes(shard.header + b"".join(values.tobytes() for values in arrays.values()))
    assert path.stat().st_size == shard.size
    found = safetensors.numpy.load_file(path)
    assert all(np.array_equal(found[name], values) for name, values in arrays.items())
    assert [t.offset for t in safetensors_files.read_header(path).values()] == [
        t.offset for t in shard.tensors.values()
    ]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=20), st.integers(1, 60))
def test_every_tensor_lies_in_one_shard_in_order_and_shards_keep_their_limit(sizes, largest):
    specs = [(f"t{i}", TensorSpec((size,), "BF16")) for i, size in enumerate(sizes)]
    shards = safetensors_files.lay_out(specs, 2 * largest)
    assert [name for shard in shards for name in shard.tensors] == [name for name, _ in specs]
    assert all(len(s.tensors) == 1 or sum(t.bytes for t in s.tensors.values()) <= 2 * largest for s in shards)
    assert safetensors_files.index_of(shards)["metadata"]["total_size"] == 2 * sum(sizes)


def header_file(path, entries, data=b"\0" * 8):
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


@pytest.mark.parametrize(
    "entries",
    [
        b"not json",
        b"[]",
        {"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}},
        {"a": {"shape": [2], "data_offsets": [0, 8]}},
        {"a": 3},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}},
    ],
)
def test_malformed_safetensors_header_is_refused_by_name(tmp_path, entries):
    path = header_file(tmp_path / "bad.safetensors", entries)
    with pytest.raises(BadInputError, match=r"bad\.safetensors"):
        safetensors_files.read_header(path)


def test_cut_safetensors_file_is_refused_at_every_length(tmp_path):
    path = header_file(tmp_path / "cut.safetensors", {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}})
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(BadInputError, match=r"cut\.safetensors"):
            safetensors_files.read_header(path)


@pytest.mark.parametrize("text, size", [("5GB", 5 * 10**9), ("1.5KiB", 1536), ("7", 7), (" 2 M ", 2_000_000)])
def test_sizes_are_read_as_written(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "5XB", "-1GB", "GB", "1e9"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(BadInputError):
        parse_size(text)


@given(st.integers(1, 64), st.integers(30, 40))
def test_buffers_never_exceed_the_bound(workers, exponent):
    found = memory_bound.Memory(1 << 42, 0, None, None)
    buffers = memory_bound.plan_buffers(str(1 << exponent), workers, 8, found)
    assert buffers.size <= 1 << exponent and buffers.chunk >= memory_bound.SMALLEST_CHUNK


def test_automatic_bound_respects_the_control_group():
    tight = memory_bound.Memory(1 << 40, 0, 400 << 20, 400 << 20)
    assert memory_bound.plan_buffers("auto", 4, 8, tight).size <= 100 << 20


@pytest.mark.parametrize("option", ["1MB", "900GB"])
def test_impossible_bound_is_refused(option):
    with pytest.raises(BadInputError, match="--memory"):
        memory_bound.plan_buffers(option, 4, 8, memory_bound.Memory(1 << 34, 0, None, None))


@pytest.mark.parametrize("version", [1, 2])
def test_tightest_control_group_on_the_way_up_counts(tmp_path, version):
    proc = tmp_path / "proc"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 100 kB\nMemAvailable: 50 kB\nSwapFree: 7 kB\n")
    root = tmp_path / "cgroup"
    start = root if version == 2 else root / "memory"
    limit, usage = (
        ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    )
    (start / "job/step").mkdir(parents=True)
    (start / "job" / limit).write_text("1000\n")
    (start / "job" / usage).write_text("600\n")
    (start / "job/memory.stat").write_text("inactive_file 100\nactive_file 50\n")
    (start / "job/step" / limit).write_text("max\n" if version == 2 else f"{1 << 62}\n")
    (start / "job/step" / usage).write_text("600\n")
    (proc / "self/cgroup").write_text("0::/job/step\n" if version == 2 else "5:cpu,memory:/job/step\n")
    found = memory_bound.measure(proc, root)
    assert (found.available, found.swap_free, found.group_limit, found.group_free) == (51200, 7168, 1000, 550)
    assert found.usable == 550
