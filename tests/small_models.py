"""Small models of the DeepSeek-V3 architecture for tests: a base, a trained state of it, and an FP8 release of it."""

import json
import shutil
from pathlib import Path

import numpy as np

from deepseek_sft.convert import base_model, tiny_model
from deepseek_sft.families import deepseek_v3
from deepseek_sft.tensors import number_formats, safetensors_files
from deepseek_sft.tensors.tensor_spec import FP8_BLOCK, SCALE_SUFFIX, TensorSpec, scale_shape

SHAPE = tiny_model.TinyShape(
    hidden_size=32,
    layers=3,
    heads=2,
    routed_experts=4,
    groups=2,
    groups_used=1,
    moe_intermediate_size=16,
    intermediate_size=40,
    q_lora_rank=24,
    kv_lora_rank=32,
    qk_rope_head_dim=8,
    qk_nope_head_dim=8,
    v_head_dim=8,
    vocab_size=96,
)

FULL_SIZE = tiny_model.TinyShape(
    hidden_size=7168,
    layers=61,
    dense_layers=3,
    heads=128,
    routed_experts=256,
    groups=8,
    groups_used=4,
    experts_per_token=8,
    moe_intermediate_size=2048,
    intermediate_size=18432,
    q_lora_rank=1536,
    kv_lora_rank=512,
    qk_rope_head_dim=64,
    qk_nope_head_dim=128,
    v_head_dim=128,
    vocab_size=129280,
)  # DeepSeek-V3 and R1


def make_base(folder, seed=0, largest_shard=30_000, **changes):
    """A BF16 base model in several files."""
    shape = tiny_model.TinyShape(**{**SHAPE.__dict__, **changes})
    tiny_model.write_tiny(Path(folder), shape, seed, largest_shard)
    return Path(folder)


def make_tied(base, folder):
    """The same model with one matrix for embedding and head."""
    folder = Path(folder)
    folder.mkdir()
    for path in Path(base).iterdir():
        if path.suffix != ".safetensors" and not path.name.endswith(".index.json"):
            shutil.copy(path, folder)
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    stored = base_model.open_model(Path(base)).tensors
    specs = [(name, tensor.spec) for name, tensor in stored.items() if name != "lm_head.weight"]
    (shard,) = safetensors_files.lay_out(specs, 1 << 40)
    data = [stored[name].file.read_bytes()[stored[name].offset :][: stored[name].bytes] for name, _ in specs]
    (folder / shard.name).write_bytes(shard.header + b"".join(data))
    return folder


def read_tensors(folder):
    """All tensors of a model folder as float32, by name."""
    found = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        content = path.read_bytes()
        for name, tensor in safetensors_files.read_header(path).items():
            bits = np.frombuffer(content, number_formats.WIDTHS[tensor.spec.dtype], tensor.spec.elements, tensor.offset)
            values = bits.view(np.float32) if tensor.spec.dtype == "F32" else number_formats.bf16_to_float32(bits)
            found[name] = values.reshape(tensor.spec.shape)
    return found


def train(tensors, learning_rate=1e-3, seed=1):
    """Every trained tensor moved by up to the learning rate; router biases unchanged."""
    random = np.random.default_rng(seed)
    return {
        name: values
        if name.endswith(deepseek_v3.CORRECTION_BIAS)
        else values + learning_rate * random.uniform(-1, 1, values.shape).astype(np.float32)
        for name, values in tensors.items()
    }


def rounded(values):
    """float32 values as BF16 keeps them."""
    return number_formats.bf16_to_float32(number_formats.float32_to_bf16(values))


# Several blocks of 128 × 128 each way, the last ones cut.
BLOCKS_SHAPE = {
    "hidden_size": 288,
    "intermediate_size": 300,
    "moe_intermediate_size": 136,
    "kv_lora_rank": 160,
    "q_lora_rank": 130,
    "layers": 2,
}


def nearest_fp8(values):
    """E4M3 codes of the values nearest to ``values``; of two equally near the even code."""
    codes = np.argsort(number_formats.E4M3_VALUES[:0x7F]).astype(np.uint8)
    magnitudes = number_formats.E4M3_VALUES[codes]
    middle = (magnitudes[1:] + magnitudes[:-1]) / 2
    low, high = (codes[np.searchsorted(middle, np.abs(values), side)] for side in ("left", "right"))
    found = np.where(low % 2 == 0, low, high)  # they differ, by one, where a value lies in the middle of two
    return (found | np.where(np.signbit(values), 0x80, 0)).astype(np.uint8)


def block_factors(values):
    """One factor per block of 128 × 128 so that its largest value becomes 448."""
    block = FP8_BLOCK
    rows, columns = values.shape
    factors = np.empty(scale_shape(values.shape), np.float32)
    for i in range(factors.shape[0]):
        for j in range(factors.shape[1]):
            part = values[i * block : (i + 1) * block, j * block : (j + 1) * block]
            factors[i, j] = np.abs(part).max() / 448
    expanded = np.repeat(np.repeat(factors, block, 0), block, 1)[:rows, :columns]
    return factors, expanded


def make_fp8_release(base, folder):
    """The base in the release's FP8 format, with a multi-token-prediction layer; scales lie in files of their own.

    Returns:
        name → float32 values that a dequantised model must hold (after rounding to BF16).
    """
    base, folder = base_model.open_model(Path(base)), Path(folder)
    folder.mkdir()
    config = base.config | {
        "num_nextn_predict_layers": 1,
        "quantization_config": {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [128, 128],
        },
    }
    tensors = read_tensors(base.folder)
    last = base.config["num_hidden_layers"]
    extra = {n.replace(f".{last - 1}.", f".{last}.", 1): v for n, v in tensors.items() if f"layers.{last - 1}." in n}
    hidden = config["hidden_size"]
    extra |= {f"model.layers.{last}.{n}.weight": np.ones(hidden, np.float32) for n in ("enorm", "hnorm")}
    extra[f"model.layers.{last}.shared_head.norm.weight"] = np.ones(hidden, np.float32)
    extra[f"model.layers.{last}.eh_proj.weight"] = np.full((hidden, 2 * hidden), 0.01, np.float32)
    extra[f"model.layers.{last}.shared_head.head.weight"] = np.zeros((96, 32), np.float32)
    weights, scales, expected = {}, {}, {}
    for name, values in {**tensors, **extra}.items():
        if deepseek_v3.is_quantised(config, name) and values.ndim == 2:
            factors, expanded = block_factors(values)
            codes = nearest_fp8(values / expanded)
            weights[name] = ("F8_E4M3", codes)
            scales[name + SCALE_SUFFIX] = ("F32", factors)
            expected[name] = rounded(number_formats.E4M3_VALUES[codes] * expanded)
        elif name.endswith(deepseek_v3.CORRECTION_BIAS):
            weights[name], expected[name] = ("F32", values), values
        else:
            weights[name], expected[name] = ("BF16", number_formats.float32_to_bf16(values)), values
    names = sorted(weights)
    parts = [names[: len(names) // 2], names[len(names) // 2 :], sorted(scales)]
    weight_map = {}
    for i, part in enumerate(parts, 1):
        file = f"model-{i:05d}-of-000003.safetensors"
        held = {n: {**weights, **scales}[n] for n in part}
        specs = [(n, TensorSpec(v.shape, dtype)) for n, (dtype, v) in held.items()]
        (shard,) = safetensors_files.lay_out(specs, 1 << 40)
        (folder / file).write_bytes(
            shard.header + b"".join(np.ascontiguousarray(v).tobytes() for _, v in held.values())
        )
        weight_map |= dict.fromkeys(part, file)
    (folder / safetensors_files.INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(base.folder / name, folder / name)
    return {name: values for name, values in expected.items() if name in tensors}


def contents(folder):
    """File name → bytes of a folder."""
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir()) if path.is_file()}
