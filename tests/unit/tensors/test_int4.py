"""INT4 of compressed-tensors becomes BF16: values, bounded memory, what is refused."""

import json
import shutil

import numpy as np
import pytest
import small_models
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from deepseek_sft.convert import base_model, cut_base, dequantize
from deepseek_sft.errors import BadInputError
from deepseek_sft.tensors import int4_groups, number_formats, safetensors_files
from deepseek_sft.tensors.tensor_spec import TensorSpec

FORMAT = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "input_activations": None,
            "weights": {
                "num_bits": 4,
                "type": "int",
                "strategy": "group",
                "group_size": 32,
                "symmetric": True,
                "actorder": None,
                "dynamic": False,
                "observer": "minmax",
            },
        }
    },
    "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*"],
}


def packed(codes: np.ndarray) -> np.ndarray:
    """Codes of -8 to 7 as words, by the format's description: value by value, the lowest bits first."""
    words = np.zeros((codes.shape[0], codes.shape[1] // 8), np.uint32)
    for row in range(codes.shape[0]):
        for column in range(codes.shape[1]):
            words[row, column // 8] |= np.uint32((int(codes[row, column]) + 8) << (4 * (column % 8)))
    return words


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """A small base whose routed experts are INT4, and the values that each must become."""
    plain = small_models.make_base(tmp_path_factory.mktemp("int4") / "plain", moe_intermediate_size=32)
    folder = plain.parent / "int4"
    folder.mkdir()
    chance, held, expected = np.random.default_rng(5), {}, {}
    base = base_model.open_model(plain)
    for name, values in small_models.read_tensors(plain).items():
        if ".mlp.experts." not in name:
            bits = values if base.tensors[name].spec.dtype == "F32" else number_formats.float32_to_bf16(values)
            held[name], expected[name] = (base.tensors[name].spec.dtype, bits), values
            continue
        codes = chance.integers(-8, 8, values.shape)
        scales = number_formats.float32_to_bf16(
            chance.uniform(1e-3, 1, (values.shape[0], values.shape[1] // 32)).astype(np.float32)
        )
        held[f"{name}_packed"] = ("I32", packed(codes))
        held[f"{name}_scale"] = ("BF16", scales)
        held[f"{name}_shape"] = ("I32", np.array(values.shape, np.int32))
        exact = codes * number_formats.bf16_to_float32(scales).astype(np.float64).repeat(32, axis=1)
        expected[name] = small_models.rounded(exact.astype(np.float32))
    specs = [(name, TensorSpec(values.shape, dtype)) for name, (dtype, values) in held.items()]
    (shard,) = safetensors_files.lay_out(specs, 1 << 40)
    content = b"".join(np.ascontiguousarray(values).tobytes() for _, values in held.values())
    (folder / "model.safetensors").write_bytes(shard.header + content)
    (folder / "config.json").write_text(json.dumps(base.config | {"quantization_config": FORMAT}))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(plain / name, folder)
    return folder, expected


@pytest.mark.parametrize("chunk", [None, 1])
def test_experts_become_the_formats_values_whatever_the_work_items(release, tmp_path, monkeypatch, chunk):
    folder, expected = release
    if chunk:
        plan = dequantize.Plan
        monkeypatch.setattr(dequantize, "Plan", lambda **given: plan(**given | {"chunk": chunk}))
    base = base_model.open_model(folder)
    assert base_model.figures(base)["dtype"] == "int4"
    dequantize.dequantize(base, tmp_path / "bf16", dequantize.Options())
    found = small_models.read_tensors(tmp_path / "bf16")
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in expected)
    assert "quantization_config" not in json.loads((tmp_path / "bf16/config.json").read_text())


def test_a_cut_of_it_holds_the_same_experts(release, tmp_path):
    folder, expected = release
    base = cut_base.cut_base(base_model.open_model(folder), 2)
    dequantize.dequantize(base, tmp_path / "cut", dequantize.Options())
    found = small_models.read_tensors(tmp_path / "cut")
    experts = [name for name in found if ".mlp.experts." in name]
    assert experts
    for name in experts:
        assert any(np.array_equal(found[name], values) for values in expected.values())


@settings(max_examples=50, deadline=None)
@given(
    codes=arrays.arrays(np.int8, (3, 64), elements=st.integers(-8, 7)),
    scales=arrays.arrays(np.float32, (3, 2), elements=st.floats(2**-30, 2**30, width=32)),
)
def test_every_code_times_its_scale_rounded_once(codes, scales):
    bits = number_formats.float32_to_bf16(scales)
    exact = codes * number_formats.bf16_to_float32(bits).astype(np.float64).repeat(32, axis=1)
    found = int4_groups.dequantize(packed(codes), bits)
    assert np.array_equal(found, small_models.rounded(exact.astype(np.float32)))


@pytest.mark.parametrize(
    ("key", "value"),
    [("group_size", 128), ("num_bits", 8), ("symmetric", False), ("actorder", "group"), ("strategy", "channel")],
)
def test_other_ways_to_quantise_are_refused(release, tmp_path, key, value):
    config = json.loads((release[0] / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"][key] = value
    with pytest.raises(BadInputError, match="can be dequantised"):
        base_model.is_quantised(config, tmp_path)


def test_scales_of_another_group_are_named(release):
    tensors = safetensors_files.read_header(release[0] / "model.safetensors")
    name = next(name for name in tensors if name.endswith("_scale"))
    wrong = safetensors_files.StoredTensor(tensors[name].file, tensors[name].offset, TensorSpec((3, 3), "BF16"))
    with pytest.raises(BadInputError, match="one for 32 values"):
        int4_groups.fold(tensors | {name: wrong})
