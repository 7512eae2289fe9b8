"""The base model: the release's format, the tiny stand-in, checks of a folder, FP8 to BF16."""

import json
import os
import subprocess
import sys

import jinja2
import numpy as np
import pytest
import small_models
import tokenizers

from deepseek_sft import files
from deepseek_sft.convert import base_model, dequantize, tiny_model
from deepseek_sft.errors import BadInputError, CrashError
from deepseek_sft.families import deepseek_v3
from deepseek_sft.tensors import safetensors_files
from deepseek_sft.tensors.tensor_spec import SCALE_SUFFIX, TensorSpec

BEGIN, END = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return small_models.make_base(tmp_path_factory.mktemp("prepare") / "base")


@pytest.fixture
def copy(base, tmp_path):
    folder = tmp_path / "copy"
    folder.mkdir()
    for name, content in small_models.contents(base).items():
        (folder / name).write_bytes(content)
    return folder


def test_full_size_has_the_published_tensors_and_parameters():
    specs = deepseek_v3.tensor_specs(tiny_model.config_of(small_models.FULL_SIZE))
    assert len(specs) == 45_395
    assert sum(spec.elements for spec in specs.values()) == 671_026_419_200


def test_tiny_model_has_the_keys_that_vllm_and_training_need(base):
    config = json.loads((base / "config.json").read_text())
    expected = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "routed_scaling_factor": 2.5,
        "norm_topk_prob": True,
        "num_nextn_predict_layers": 0,
        "torch_dtype": "bfloat16",
    }
    assert expected.items() <= config.items()
    assert config["rope_scaling"]["type"] == "yarn" and config["rope_scaling"]["factor"] == 40
    assert "auto_map" not in config and "quantization_config" not in config


def test_tiny_model_starts_with_unit_norms_small_weights_and_spread_biases(base):
    tensors = small_models.read_tensors(base)
    assert (tensors["model.norm.weight"] == 1).all()
    assert (tensors["model.layers.0.self_attn.kv_a_layernorm.weight"] == 1).all()
    assert 0.045 < tensors["model.embed_tokens.weight"].std() < 0.055
    biases = [values for name, values in tensors.items() if name.endswith(deepseek_v3.CORRECTION_BIAS)]
    assert len(biases) == 2 and all(values.std() > 0 for values in biases)
    assert not np.array_equal(*biases)


def test_tiny_model_depends_on_the_seed_alone(tmp_path, base):
    assert small_models.contents(small_models.make_base(tmp_path / "same")) == small_models.contents(base)
    other = small_models.read_tensors(small_models.make_base(tmp_path / "other", seed=1))
    assert not np.array_equal(other["lm_head.weight"], small_models.read_tensors(base)["lm_head.weight"])


def test_tiny_model_never_replaces_a_foreign_folder(tmp_path):
    (tmp_path / "model").mkdir()
    with pytest.raises(BadInputError, match="not made by this program"):
        small_models.make_base(tmp_path / "model")


@pytest.mark.parametrize("change", [{"groups": 3}, {"hidden_size": 33}, {"experts_per_token": 9}, {"layers": 0}])
def test_impossible_tiny_shape_is_refused(tmp_path, change):
    with pytest.raises(BadInputError):
        small_models.make_base(tmp_path / "model", **change)
    assert not list(tmp_path.iterdir())


def render(base, messages, **options):
    config = json.loads((base / "tokenizer_config.json").read_text())
    template = jinja2.Environment().from_string(config["chat_template"])
    return template.render(messages=messages, bos_token=BEGIN, eos_token=END, **options)


def test_template_is_that_of_r1(base):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "<think>\nadd\n</think>\n\n2"},
        {"role": "user", "content": "2+2?"},
    ]
    history = f"{BEGIN}Be brief.\n\nBe kind.<｜User｜>1+1?<｜Assistant｜>\n\n2{END}<｜User｜>2+2?"
    assert render(base, messages) == history
    assert render(base, messages, add_generation_prompt=True) == history + "<｜Assistant｜>"


def test_tokenizer_knows_the_control_tokens(base):
    tokenizer = tokenizers.Tokenizer.from_file(str(base / "tokenizer.json"))
    assert tokenizer.encode(f"{BEGIN}<｜User｜>hi<｜Assistant｜><think>\n", add_special_tokens=False).ids == [
        *(0, 128803, 6366, 128804, 128798, 201)
    ]
    assert tokenizer.get_vocab_size() <= tiny_model.TinyShape().vocab_size


def test_complete_base_is_accepted_and_described(base):
    model = base_model.open_model(base)
    figures = base_model.figures(model)
    assert (figures["dtype"], figures["layers"], figures["moe_layers"], figures["experts"]) == ("bf16", 3, 2, 4)
    assert figures["tensors"] == len(model.tensors) and figures["tensors_of_untrained_mtp_layer"] == 0


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda f: (f / "config.json").unlink(), "no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "cannot be read"),
        (lambda f: edit(f / "config.json", lambda c: c.update(hidden_size=64)), r"has shape \(96, 32\)"),
        (lambda f: edit(f / "config.json", lambda c: c.update(num_hidden_layers=4)), "lacks tensors"),
        (lambda f: edit(f / "config.json", lambda c: c.update(n_routed_experts=2)), "does not know"),
        (lambda f: edit(f / "config.json", lambda c: c.pop("topk_method")), "topk_method must be 'noaux_tc'"),
        (lambda f: edit(f / "config.json", lambda c: c.update(architectures=["LlamaForCausalLM"])), "trains Deepseek"),
        (lambda f: edit(f / "config.json", lambda c: c.update(hidden_size="32")), "hidden_size must be"),
        (lambda f: edit(f / "config.json", lambda c: c.update(quantization_config={"quant_method": "gptq"})), "gptq"),
        (lambda f: min(f.glob("model-*")).unlink(), "files missing"),
        (lambda f: os.truncate(min(f.glob("model-*")), 5000), "header describes"),
        (lambda f: (f / "tokenizer.json").unlink(), "lacks tokenizer.json"),
        (lambda f: (f / "model.safetensors.index.json").unlink(), "holds neither"),
        (lambda f: edit(f / "model.safetensors.index.json", lambda c: c["weight_map"].popitem()), "disagree about"),
    ],
)
def test_damaged_base_is_refused_with_the_reason(copy, damage, message):
    damage(copy)
    with pytest.raises(BadInputError, match=message):
        base_model.open_model(copy)


def test_fingerprint_follows_config_and_weights(copy, base):
    first = base_model.open_model(copy).fingerprint
    assert first == base_model.open_model(base).fingerprint
    edit(copy / "config.json", lambda c: c.update(rms_norm_eps=1e-5))
    assert base_model.open_model(copy).fingerprint != first


@pytest.fixture
def fp8(tmp_path):
    """(folder, expected values) of a release whose matrices end inside their last blocks."""
    base = small_models.make_base(tmp_path / "bf16", hidden_size=160, intermediate_size=200, kv_lora_rank=160)
    return tmp_path / "fp8", small_models.make_fp8_release(base, tmp_path / "fp8")


def dequantized(folder, output, **options):
    options = {"largest_shard": 100_000, "workers": 2} | options
    return dequantize.dequantize(base_model.open_model(folder), output, dequantize.Options(**options))


def test_fp8_release_becomes_the_bf16_model_block_by_block(fp8, tmp_path):
    folder, expected = fp8
    model = base_model.open_model(folder)
    assert model.quantised and len(model.mtp) > 10
    dequantized(folder, tmp_path / "out")
    found = small_models.read_tensors(tmp_path / "out")
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], values) for name, values in expected.items())
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert "quantization_config" not in config and config["num_nextn_predict_layers"] == 0
    assert not base_model.open_model(tmp_path / "out").quantised


def test_layer_that_is_not_trained_is_kept_where_there_is_one(fp8, tmp_path, project):
    """What the workflow does, so that it can be served later."""
    script = project / "workflow/scripts/prepare_model.py"
    plain = small_models.make_base(tmp_path / "plain")
    for base, expected in ((fp8[0], True), (plain, False)):
        arguments = [f"--base={base}", f"--output={tmp_path / 'out'}", f"--receipt={tmp_path / 'r.json'}", "--mtp=keep"]
        subprocess.run([sys.executable, script, *arguments], check=True, capture_output=True)
        figures = json.loads((tmp_path / "r.json").read_text())["figures"]
        assert (figures["tensors_of_untrained_mtp_layer"] > 10) is expected


def test_dequantised_bytes_do_not_depend_on_the_work_items(fp8, tmp_path, monkeypatch):
    dequantized(fp8[0], tmp_path / "a")
    monkeypatch.setattr(dequantize.memory_bound, "LARGEST_CHUNK", 333)
    dequantized(fp8[0], tmp_path / "b", workers=3)
    assert small_models.contents(tmp_path / "a") == small_models.contents(tmp_path / "b")


def test_interrupted_dequantising_goes_on_to_the_same_bytes(fp8, tmp_path, monkeypatch):
    dequantized(fp8[0], tmp_path / "whole")
    replaced = os.replace
    names = []

    def replace(source, target):
        names.append(str(target))
        if sum(name.endswith(".safetensors") for name in names) == 3:
            raise OSError(28, "No space left on device")
        replaced(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(CrashError, match="No space left"):
        dequantized(fp8[0], tmp_path / "out")
    monkeypatch.undo()
    assert not (tmp_path / "out").exists()
    assert dequantized(fp8[0], tmp_path / "out").kept >= 2
    assert small_models.contents(tmp_path / "out") == small_models.contents(tmp_path / "whole")


def test_missing_scale_is_named(fp8):
    folder, _ = fp8
    path = folder / "model-00003-of-000003.safetensors"
    held = safetensors_files.read_header(path)
    name = next(n for n in held if "layers.0" in n)
    content = path.read_bytes().replace(name.encode(), name.replace("layers.0", "layers.7").encode())
    path.write_bytes(content)
    edit(folder / "model.safetensors.index.json", lambda c: c["weight_map"].pop(name))
    edit(
        folder / "model.safetensors.index.json",
        lambda c: c["weight_map"].update({name.replace("s.0", "s.7"): path.name}),
    )
    with pytest.raises(BadInputError, match=r"the scale of \S+ is missing"):
        base_model.open_model(folder)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4301234\n"


def retype(path, dtype):
    """Name another dtype for the first tensor of a file."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    next(entry for name, entry in header.items() if name != "__metadata__")["dtype"] = dtype
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda f: (f / "tokenizer.json").write_text(POINTER), "tokenizer.json is a git-lfs pointer"),
        (lambda f: (f / "config.json").write_text(POINTER), "config.json is a git-lfs pointer"),
        (lambda f: max(f.glob("model-*")).write_text(POINTER), "safetensors is a git-lfs pointer"),
        (lambda f: (f / "tokenizer_config.json").write_text('{"a": '), "tokenizer_config.json is cut or is no JSON"),
        (lambda f: retype(min(f.glob("model-*")), "F8_E8M0"), "is of dtype F8_E8M0, which this program does not read"),
        (lambda f: edit(f / "config.json", lambda c: c.pop("rope_theta")), "rope_theta missing"),
        (lambda f: edit(f / "config.json", lambda c: c.update(index_topk=8)), "unknown keys.*index_topk: 8"),
    ],
)
def test_one_message_says_what_the_file_is(copy, damage, message):
    damage(copy)
    with pytest.raises(BadInputError, match=message):
        base_model.open_model(copy)


def test_fp8_weights_without_their_configuration_are_named(fp8):
    edit(fp8[0] / "config.json", lambda c: c.pop("quantization_config"))
    with pytest.raises(BadInputError, match=r"holds FP8 weights .* no quantization_config") as error:
        base_model.open_model(fp8[0])
    assert "weight_block_size" in error.value.fix


def test_experts_in_one_tensor_are_named(copy):
    name = "model.layers.1.mlp.experts.gate_up_proj"
    (shard,) = safetensors_files.lay_out([(name, TensorSpec((2,), "BF16"))], 1 << 20)
    (copy / "model-extra.safetensors").write_bytes(shard.header + b"\0" * 4)
    edit(copy / "model.safetensors.index.json", lambda c: c["weight_map"].update({name: "model-extra.safetensors"}))
    with pytest.raises(BadInputError, match="all experts of a layer in one tensor") as error:
        base_model.open_model(copy)
    assert "save_original_format=True" in error.value.fix


def test_a_companion_that_cannot_be_read_is_found_first(copy, monkeypatch):
    def refuse(path, *args, **options):
        if str(path).endswith("generation_config.json"):
            raise PermissionError(13, "Permission denied")
        return open(path, *args, **options)

    monkeypatch.setattr(files, "open", refuse, raising=False)
    with pytest.raises(BadInputError, match=r"generation_config.json cannot be read: Permission denied"):
        base_model.open_model(copy)


def damage_scale(folder, value):
    """Overwrite the first factor of the first scale; returns its tensor's name."""
    model = base_model.open_model(folder)
    name = next(name for name in model.tensors if name.endswith(SCALE_SUFFIX) and ".layers.0." in name)
    with open(model.tensors[name].file, "r+b") as stream:
        stream.seek(model.tensors[name].offset)
        stream.write(np.float32(value).tobytes())
    return name.removesuffix(SCALE_SUFFIX)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38])
def test_a_damaged_scale_ends_dequantising_with_the_tensors_name(fp8, tmp_path, value):
    name = damage_scale(fp8[0], value)
    with pytest.raises(BadInputError, match=rf"infinite or not a number once dequantised: {name}"):
        dequantized(fp8[0], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_code_that_is_no_number_ends_dequantising_with_the_tensors_name(fp8, tmp_path):
    model = base_model.open_model(fp8[0])
    name, tensor = next((n, t) for n, t in model.tensors.items() if t.spec.dtype == "F8_E4M3" and ".layers.1." in n)
    with open(tensor.file, "r+b") as stream:
        stream.seek(tensor.offset + tensor.spec.elements - 1)
        stream.write(b"\x7f")
    with pytest.raises(BadInputError, match=rf"{name} \(1 values, {tensor.file.name}\)"):
        dequantized(fp8[0], tmp_path / "out")


def prepare(project, *arguments):
    script = project / "workflow/scripts/prepare_model.py"
    done = subprocess.run([sys.executable, script, *map(str, arguments)], capture_output=True, text=True)
    return done.returncode, done.stderr


def test_one_matrix_for_embedding_and_output_is_refused_before_training(base, tmp_path, project):
    tied = small_models.make_tied(base, tmp_path / "tied")
    code, said = prepare(project, f"--base={tied}", f"--output={tmp_path}/out", f"--receipt={tmp_path}/r.json")
    assert code == 2 and "tie_word_embeddings is true" in said


def test_unknown_keys_that_change_nothing_are_said(copy, tmp_path, project):
    edit(copy / "config.json", lambda c: c.update(sliding_window=None))
    code, said = prepare(project, f"--base={copy}", f"--output={tmp_path}/out", f"--receipt={tmp_path}/r.json")
    assert code == 0 and "sliding_window" in said


NOWHERE = "/proc/none/of/it"  # nobody can make a file there, root neither
SCRIPTS = {
    "prepare_model": ["--tiny", f"--output={NOWHERE}", "--receipt={tmp}/r.json"],
    "prepare_model (receipt)": ["--tiny", "--output={tmp}/model", f"--receipt={NOWHERE}"],
    "convert_checkpoint": ["--checkpoint={tmp}", "--base={tmp}", f"--output={NOWHERE}", "--receipt={tmp}/r.json"],
    "verify_model": ["--model={tmp}", "--base={tmp}", f"--receipt={NOWHERE}"],
    "prepare_data": ["--source={tmp}/x", f"--output={NOWHERE}", "--rejects={tmp}/r", "--receipt={tmp}/r.json"],
    "tokenize_data": [
        *("--input={tmp}/x", "--tokenizer={tmp}", f"--output={NOWHERE}", "--rejects={tmp}/r", "--receipt={tmp}/r.json"),
        *("--statistics={tmp}/s.json", "--template=deepseek-r1", "--max-length=128"),
    ],
    "build_report": ["{tmp}", f"--output={NOWHERE}"],
}


@pytest.mark.parametrize("case", SCRIPTS)
def test_what_cannot_be_written_ends_before_any_work(tmp_path, project, case):
    script = project / f"workflow/scripts/{case.split()[0]}.py"
    arguments = [word.replace("{tmp}", str(tmp_path)) for word in SCRIPTS[case]]
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert f"{NOWHERE} cannot be written: /proc" in done.stderr
    assert list(tmp_path.iterdir()) == []
