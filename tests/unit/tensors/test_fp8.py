"""FP8 in the release's block format: rounding, factors, conversion to it and from it, and its verification."""

import json

import numpy as np
import pytest
import small_models
import synthetic_zero3
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_sft.convert import base_model, convert, dequantize, zero
from deepseek_sft.errors import BadInputError
from deepseek_sft.families import deepseek_v3
from deepseek_sft.tensors import fp8_blocks, safetensors_files
from deepseek_sft.tensors.number_formats import E4M3_VALUES, bf16_to_float32, float32_to_e4m3
from deepseek_sft.tensors.tensor_spec import SCALE_SUFFIX, scale_shape
from deepseek_sft.verify import verify
from deepseek_sft.verify.weight_checks import ChangeBound

LEARNING_RATE = 1e-3
FACTORS = SCALE_SUFFIX
MTP = "model.layers.2"


def as_stored(path):
    """name → array of a folder as it lies: FP8 as uint8, BF16 as float32."""
    found = {}
    for file in sorted(path.glob("*.safetensors")):
        content = file.read_bytes()
        for name, tensor in safetensors_files.read_header(file).items():
            width = {"F8_E4M3": np.uint8, "BF16": np.uint16, "F32": np.float32}[tensor.spec.dtype]
            values = np.frombuffer(content, width, tensor.spec.elements, tensor.offset).reshape(tensor.spec.shape)
            found[name] = bf16_to_float32(values) if width is np.uint16 else values
    return found


@given(st.floats(-448, 448, width=32))
def test_fp8_rounding_takes_the_nearest_and_the_even_of_two(value):
    code = int(float32_to_e4m3(np.array([value], np.float32))[0])
    magnitudes = E4M3_VALUES[:0x7F].astype(np.float64)
    distances = np.abs(magnitudes - abs(float(np.float32(value))))
    nearest = np.flatnonzero(distances == distances.min())
    assert code & 0x7F == (nearest[0] if len(nearest) == 1 else next(c for c in nearest if c % 2 == 0))
    assert bool(code & 0x80) == bool(np.signbit(np.float32(value)))


def test_every_fp8_value_survives_and_what_is_too_large_saturates():
    codes = np.delete(np.arange(256, dtype=np.uint8), [0x7F, 0xFF])
    assert np.array_equal(float32_to_e4m3(E4M3_VALUES[codes]), codes)
    odd = np.array([449, -1e9, np.inf, -np.inf, np.nan], np.float32)
    assert float32_to_e4m3(odd).tolist() == [0x7E, 0xFE, 0x7F, 0xFF, 0x7F]


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 1 << 30), st.integers(-40, 30))
def test_every_block_has_the_factor_of_its_largest_value(rows, columns, seed, exponent):
    values = np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32) * np.float32(2.0**exponent)
    found = fp8_blocks.quantize(values)
    factors, expanded = small_models.block_factors(values)
    assert np.array_equal(found.factors, factors) and found.non_finite == 0
    assert np.array_equal(found.codes, small_models.nearest_fp8(values / expanded))
    error = np.abs(fp8_blocks.dequantize(found.codes, found.factors) - values)
    assert (error <= 16.01 * expanded).all()


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 400), st.integers(1, 200), st.data())
def test_any_rows_are_dequantised_as_the_whole_matrix_is(rows, columns, data):
    random = np.random.default_rng(rows)
    codes = random.integers(0, 0x7F, (rows, columns), np.uint8)
    factors = random.random(scale_shape(codes.shape), np.float32)
    expanded = np.repeat(np.repeat(factors, 128, 0), 128, 1)[:rows, :columns]
    start = data.draw(st.integers(0, rows - 1))
    end = data.draw(st.integers(start + 1, rows))
    found = fp8_blocks.dequantize(codes[start:end], factors[start // 128 : -(-end // 128)], start % 128)
    assert np.array_equal(found, (E4M3_VALUES[codes] * expanded)[start:end])


def test_blocks_of_zeros_tiny_and_non_finite_values_keep_the_others_usable():
    values = np.zeros((256, 256), np.float32)
    values[:128, 128:] = np.float32(1e-44)
    values[128:, :128] = 2.0
    values[130, 5], values[131, 5] = np.inf, np.nan
    found = fp8_blocks.quantize(values)
    assert found.non_finite == 2 and np.isfinite(found.factors).all() and (found.factors > 0).all()
    again = fp8_blocks.dequantize(found.codes, found.factors)
    assert not np.isfinite(again[130:132, 5]).any()
    again[130:132, 5] = values[130:132, 5] = 0
    assert np.allclose(again, values, rtol=0.07, atol=1e-43)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(base, checkpoint, trained tensors) with several blocks in every matrix."""
    folder = tmp_path_factory.mktemp("fp8")
    base = small_models.make_base(folder / "base", **small_models.BLOCKS_SHAPE)
    trained = small_models.train(small_models.read_tensors(base), LEARNING_RATE)
    fused = synthetic_zero3.fuse(trained, 2)
    buffers = {n: v for n, v in fused.items() if n.endswith(deepseek_v3.CORRECTION_BIAS)}
    groups = synthetic_zero3.split_groups({n: v for n, v in fused.items() if n not in buffers}, 300_000)
    synthetic_zero3.write_checkpoint(folder / "step7", groups, 3, buffers)
    return base, folder / "step7", trained


@pytest.fixture(scope="module")
def release_fp8(made, tmp_path_factory):
    """(FP8 release with a multi-token-prediction layer, values of its trained tensors)."""
    folder = tmp_path_factory.mktemp("fp8") / "release"
    return folder, small_models.make_fp8_release(made[0], folder)


def run(made, output, base=None, **options):
    opened = zero.open_checkpoint(made[1]), base_model.open_model(base or made[0])
    options = convert.Options(**{"largest_shard": 400_000, "workers": 2} | options)
    convert.run(convert.prepare(*opened, output, options))
    return as_stored(output)


def check(made, model, base=None, full=True):
    limit = ChangeBound.of(LEARNING_RATE, 1, 0.1)
    result = verify.verify(
        model, base_model.open_model(base or made[0]), zero.open_checkpoint(made[1]), limit, full, workers=2
    )
    return result.figures, {name: found.failures for name, found in result.checks.items() if found.failures}


@pytest.fixture(scope="module")
def converted(made, tmp_path_factory):
    output = tmp_path_factory.mktemp("fp8") / "model"
    return output, run(made, output, dtype="fp8")


def test_fp8_model_holds_every_linear_layer_quantised_from_the_master_weights(made, converted):
    output, found = converted
    quantised = [name for name, values in found.items() if values.dtype == np.uint8]
    assert {n for n in made[2] if n.endswith(("_proj.weight", "_mqa.weight"))} == set(quantised)
    assert found.keys() == made[2].keys() | {name + FACTORS for name in quantised}
    for name, values in made[2].items():
        if name in quantised:
            expected = fp8_blocks.quantize(values)
            assert np.array_equal(found[name], expected.codes), name
            assert np.array_equal(found[name + FACTORS], expected.factors), name
        elif not name.endswith(deepseek_v3.CORRECTION_BIAS):
            assert np.array_equal(found[name], small_models.rounded(values)), name
    config = json.loads((output / "config.json").read_text())
    assert config["quantization_config"]["weight_block_size"] == [128, 128]
    assert config["torch_dtype"] == "bfloat16"


def test_fp8_model_passes_the_checks_of_a_base_and_of_verification(made, converted):
    assert base_model.open_model(converted[0]).quantised
    for full in (True, False):
        figures, failures = check(made, converted[0], full=full)
        assert failures == {}
        assert 0.01 < figures["largest_fp8_error"] < 0.036


def test_small_work_items_and_few_threads_give_the_same_fp8_bytes(made, converted, tmp_path, monkeypatch):
    monkeypatch.setattr(convert.memory_bound, "LARGEST_CHUNK", 1 << 16)
    run(made, tmp_path / "model", dtype="fp8", workers=1)
    assert small_models.contents(tmp_path / "model") == small_models.contents(converted[0])


def test_too_little_memory_for_a_band_of_blocks_is_refused(made, tmp_path, monkeypatch):
    monkeypatch.setattr(convert.memory_bound, "LARGEST_CHUNK", 1000)
    with pytest.raises(BadInputError, match="quantising needs"):
        run(made, tmp_path / "model", dtype="fp8")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name, text",
    [
        ("model.layers.1.mlp.experts.3.up_proj.weight", "1 of"),
        ("model.layers.0.self_attn.o_proj.weight" + FACTORS, "of a block's largest value"),
    ],
)
def test_one_changed_code_or_factor_is_found(made, tmp_path, name, text):
    run(made, tmp_path / "model", dtype="fp8")
    for path in (tmp_path / "model").glob("*.safetensors"):
        if tensor := safetensors_files.read_header(path).get(name):
            with open(path, "r+b") as stream:
                stream.seek(tensor.offset)
                old = np.frombuffer(stream.read(4), np.float32)[0]
                changed = np.float32(2 * old).tobytes() if name.endswith(FACTORS) else b"\x01"
                stream.seek(tensor.offset)
                stream.write(changed)
    _, failures = check(made, tmp_path / "model")
    assert any(name.removesuffix(FACTORS) in line and text in line for line in failures["checkpoint"])


def test_fp8_release_is_a_base_for_conversion_and_verification(made, release_fp8, tmp_path):
    base, values = release_fp8
    trained = small_models.train(values, LEARNING_RATE)
    fused = synthetic_zero3.fuse(trained, 4)
    synthetic_zero3.write_checkpoint(tmp_path / "step", [fused], 2)
    case = base, tmp_path / "step", trained
    for dtype in ("bf16", "fp8"):
        run(case, tmp_path / dtype, dtype=dtype)
        assert check(case, tmp_path / dtype)[1] == {}
    assert "quantization_config" not in json.loads((tmp_path / "bf16/config.json").read_text())


@pytest.mark.parametrize("dtype", ["bf16", "fp32", "fp8"])
def test_copied_prediction_layer_equals_the_base_and_is_verified(made, release_fp8, tmp_path, dtype):
    base, values = release_fp8
    fused = synthetic_zero3.fuse(small_models.train(values, LEARNING_RATE), 2)
    synthetic_zero3.write_checkpoint(tmp_path / "step", [fused], 2)
    case = base, tmp_path / "step", None
    found = run(case, tmp_path / "model", dtype=dtype, mtp="copy")
    stored = as_stored(base)
    extra = [n for n in stored if n.startswith(MTP) and not n.endswith(FACTORS)]
    assert extra and MTP + ".eh_proj.weight" in extra
    for name in extra:
        if stored[name].dtype == np.uint8 and dtype == "fp8":
            assert np.array_equal(found[name + FACTORS], stored[name + FACTORS])
        elif stored[name].dtype == np.uint8:
            expected = fp8_blocks.dequantize(stored[name], stored[name + FACTORS])
            stored[name] = expected if dtype == "fp32" else small_models.rounded(expected)
        assert np.array_equal(found[name], stored[name]), name
    assert json.loads((tmp_path / "model/config.json").read_text())["num_nextn_predict_layers"] == 1
    assert check(case, tmp_path / "model")[1] == {}

    (broken,) = [p for p in (tmp_path / "model").glob("*.safetensors") if extra[0] in safetensors_files.read_header(p)]
    tensor = safetensors_files.read_header(broken)[extra[0]]
    with open(broken, "r+b") as stream:
        stream.seek(tensor.offset)
        stream.write(b"\x01\x02\x03\x04")
    assert any(extra[0] in line for line in check(case, tmp_path / "model")[1]["untouched"])


def test_bf16_base_with_the_prediction_layer_gives_it_in_fp8_too(made, release_fp8, tmp_path):
    base = base_model.open_model(release_fp8[0])
    dequantize.dequantize(base, tmp_path / "bf16", dequantize.Options(mtp="copy", workers=2))
    prepared = base_model.open_model(tmp_path / "bf16")
    assert {n for n in base.mtp if not n.endswith(FACTORS)} == set(prepared.mtp)
    fused = synthetic_zero3.fuse(small_models.train(release_fp8[1], LEARNING_RATE), 2)
    synthetic_zero3.write_checkpoint(tmp_path / "step", [fused], 2)
    case = tmp_path / "bf16", tmp_path / "step", None
    found = run(case, tmp_path / "model", dtype="fp8", mtp="copy")
    assert found[MTP + ".self_attn.o_proj.weight"].dtype == np.uint8
    assert found[MTP + ".eh_proj.weight"].dtype == np.float32
    assert check(case, tmp_path / "model")[1] == {}


def test_prediction_layer_that_the_base_lacks_cannot_be_copied(made, tmp_path):
    with pytest.raises(BadInputError, match="holds no multi-token-prediction layer"):
        run(made, tmp_path / "model", mtp="copy")


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_output_can_have_the_files_of_the_base(made, tmp_path, dtype):
    run(made, tmp_path / "model", dtype=dtype, largest_shard=0)
    index = json.loads((made[0] / safetensors_files.INDEX_NAME).read_text())["weight_map"]
    found = json.loads((tmp_path / "model" / safetensors_files.INDEX_NAME).read_text())["weight_map"]
    assert {name: file for name, file in found.items() if not name.endswith(FACTORS)} == index
    assert all(file == index[name.removesuffix(FACTORS)] for name, file in found.items())
    assert base_model.open_model(tmp_path / "model").quantised == (dtype == "fp8")
