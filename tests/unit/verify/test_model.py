"""Every check of a converted model passes on a good one and names what is wrong in a bad one."""

import dataclasses
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import large_zero3
import numpy as np
import pytest
import small_models
import synthetic_zero3

from deepseek_sft.convert import base_model, convert, output_tensors, zero
from deepseek_sft.errors import BadInputError, GateError
from deepseek_sft.families import deepseek_v3
from deepseek_sft.tensors import byte_ranges, safetensors_files
from deepseek_sft.tensors.number_formats import float32_to_bf16
from deepseek_sft.verify import verify, weight_checks
from deepseek_sft.verify.weight_checks import ChangeBound, adamw_ratio

LEARNING_RATE, STEPS = 1e-3, 1
EXPERT = "model.layers.1.mlp.experts.2"


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """(base, checkpoint, model)."""
    folder = tmp_path_factory.mktemp("verify")
    base = small_models.make_base(folder / "base")
    trained = small_models.train(small_models.read_tensors(base), LEARNING_RATE)
    fused = synthetic_zero3.fuse(trained, 2)
    buffers = {n: v for n, v in fused.items() if n.endswith(deepseek_v3.CORRECTION_BIAS)}
    parameters = {n: v for n, v in fused.items() if n not in buffers}
    synthetic_zero3.write_checkpoint(folder / "step7", [parameters], 2, buffers)
    opened = zero.open_checkpoint(folder / "step7"), base_model.open_model(base)
    convert.run(convert.prepare(*opened, folder / "model", convert.Options(largest_shard=20_000)))
    return base, folder / "step7", folder / "model"


@pytest.fixture
def model(made, tmp_path):
    """A copy that may be damaged."""
    return shutil.copytree(made[2], tmp_path / "model")


def check(made, model, bound=True, with_checkpoint=True, speed=0.0, **options):
    checkpoint = zero.open_checkpoint(made[1]) if with_checkpoint else None
    limit = ChangeBound.of(LEARNING_RATE, STEPS, 0.1, balance_bias_speed=speed) if bound else None
    return verify.verify(model, base_model.open_model(made[0]), checkpoint, limit, full=True, **options)


def failures(result):
    return {name: found.failures for name, found in result.checks.items() if found.failures}


def overwrite(model, name, values):
    """Replace a tensor's values in its file."""
    for path in model.glob("*.safetensors"):
        tensor = safetensors_files.read_header(path).get(name)
        if tensor:
            data = values if tensor.spec.dtype == "F32" else float32_to_bf16(values)
            with open(path, "r+b") as stream:
                stream.seek(tensor.offset)
                stream.write(np.ascontiguousarray(data).tobytes())
            return
    raise KeyError(name)


def test_good_model_passes_every_check_and_all_files_are_hashed(made, model):
    result = check(made, model)
    assert failures(result) == {}
    assert set(result.checks) >= {"config", "tokenizer", "files", "names", "shapes", "dtypes", "finite", "untouched"}
    assert set(result.figures["sha256"]) == set(small_models.contents(model))
    norms = sum("norm" in name for name in small_models.read_tensors(model))  # 1.001 is 1 in BF16
    assert result.figures["unchanged_tensors"] == norms + 2  # router biases
    result.require(model)


@pytest.mark.parametrize("dtype", ["fp32", "fp8"])
def test_model_of_another_format_than_configured_is_found(made, model, dtype):
    found = failures(check(made, model, with_checkpoint=False, wanted=verify.Kind(dtype, "drop")))
    assert found["config"] and any("is BF16, not " in line for line in found["dtypes"])
    assert failures(check(made, model, wanted=verify.Kind("bf16", "drop"))) == {}


def test_hashes_are_those_of_sha256sum(made, model):
    found = check(made, model).figures["sha256"]
    output = subprocess.run(["sha256sum", *sorted(found)], cwd=model, capture_output=True, text=True, check=True).stdout
    assert dict(reversed(line.split()) for line in output.splitlines()) == found


def test_one_wrong_bit_is_found_by_the_full_comparison(made, model):
    name = f"{EXPERT}.down_proj.weight"
    values = small_models.read_tensors(model)[name].copy()
    values[3, 3] *= 1 + 2.0**-7
    overwrite(model, name, values)
    assert failures(check(made, model)) == {"checkpoint": [f"{name}: 1 of {values.size} values"]}


def test_gate_and_up_swapped_are_found_without_the_checkpoint(made, model):
    tensors = small_models.read_tensors(model)
    overwrite(model, f"{EXPERT}.gate_proj.weight", tensors[f"{EXPERT}.up_proj.weight"])
    overwrite(model, f"{EXPERT}.up_proj.weight", tensors[f"{EXPERT}.gate_proj.weight"])
    for bound in (True, False):
        found = failures(check(made, model, bound, with_checkpoint=False))
        assert list(found) == ["change"]
        assert [text.split(":")[0] for text in found["change"]] == [
            f"{EXPERT}.gate_proj.weight",
            f"{EXPERT}.up_proj.weight",
        ]


def test_values_that_are_not_finite_are_found(made, model):
    values = small_models.read_tensors(model)["model.norm.weight"].copy()
    values[:2] = np.nan, np.inf
    overwrite(model, "model.norm.weight", values)
    assert failures(check(made, model, with_checkpoint=False)) == {"finite": ["model.norm.weight: 2 values"]}


def test_changed_router_bias_is_found(made, model):
    name = f"model.layers.2.{deepseek_v3.CORRECTION_BIAS}"
    overwrite(model, name, np.nextafter(small_models.read_tensors(model)[name], np.float32(9)))
    assert failures(check(made, model, with_checkpoint=False)) == {"untouched": [f"{name}: 4 values differ"]}


@pytest.mark.parametrize("moves, found", [([1, -1, 0, 1], None), ([1, -1, 0, 1.1], "a bias moved by 0.0011")])
def test_router_bias_may_move_as_far_as_the_balance_rule_moves_it(made, model, moves, found):
    name, speed = f"model.layers.2.{deepseek_v3.CORRECTION_BIAS}", 1e-3
    overwrite(model, name, small_models.read_tensors(model)[name] + np.float32(speed * STEPS) * np.float32(moves))
    result = failures(check(made, model, with_checkpoint=False, speed=speed))
    assert result == ({"change": [f"{name}: {found}"]} if found else {})
    assert list(failures(check(made, model, with_checkpoint=False))) == ["untouched"]
    assert list(failures(check(made, model, bound=False, with_checkpoint=False))) == ["untouched"]


def test_element_moved_further_than_adamw_can_is_found(made, model):
    name = "model.layers.0.self_attn.o_proj.weight"
    base = small_models.read_tensors(made[0])[name]
    values = base.copy()
    values[0, 0] += LEARNING_RATE * STEPS * adamw_ratio(0.9, 0.999) * 1.5 + abs(values[0, 0]) / 100
    overwrite(model, name, values)
    assert list(failures(check(made, model, with_checkpoint=False))) == ["change"]
    assert failures(check(made, model, bound=False, with_checkpoint=False)) == {}


@pytest.mark.parametrize("beta1, beta2", [(0.9, 0.999), (0.9, 0.95)])
def test_adamw_never_exceeds_its_ratio(beta1, beta2):
    random = np.random.default_rng(0)
    worst = 0.0
    for growth in (1.0, 1.05, 1.11, 1.2, 2.0):  # growing gradients drive the ratio up
        first = second = 0.0
        for step in range(1, 400):
            gradient = growth ** min(step, 300) * random.uniform(0.9, 1)
            first, second = beta1 * first + (1 - beta1) * gradient, beta2 * second + (1 - beta2) * gradient**2
            ratio = (first / (1 - beta1**step)) / np.sqrt(second / (1 - beta2**step))
            worst = max(worst, ratio)
    assert 1 < worst <= adamw_ratio(beta1, beta2)


def test_lost_and_cut_files_are_named(made, model):
    first, second, *_ = sorted(model.glob("*.safetensors"))
    first.unlink()
    second.write_bytes(second.read_bytes()[:-1])
    found = failures(check(made, model, with_checkpoint=False))
    assert any(first.name in text for text in found["files"])
    assert any(second.name in text for text in found["files"])
    assert any("is missing" in text for text in found["names"])


@pytest.mark.parametrize(
    "change, text",
    [
        ({"rope_scaling": None}, "rope_scaling is None"),
        ({"routed_scaling_factor": 1.0}, "routed_scaling_factor is 1.0, must be 2.5"),
        ({"num_nextn_predict_layers": 1}, "num_nextn_predict_layers is 1, must be 0"),
        ({"torch_dtype": "float16"}, "torch_dtype is 'float16'"),
    ],
)
def test_config_that_differs_is_named(made, model, change, text):
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    found = failures(check(made, model, with_checkpoint=False))
    assert list(found) == ["config"] and text in found["config"][0]


def test_other_tokenizer_is_named(made, model):
    (model / "tokenizer_config.json").write_text("{}")
    assert failures(check(made, model, with_checkpoint=False)) == {"tokenizer": ["tokenizer_config.json differs"]}


def test_all_failures_reach_the_message_of_the_gate(made, model):
    (model / "tokenizer.json").unlink()
    overwrite(model, "model.norm.weight", np.full(32, np.nan, np.float32))
    with pytest.raises(GateError, match=r"failed 3 of 11") as error:
        check(made, model).require(model)
    for text in ("tokenizer.json is missing", "model.norm.weight: 32 values", "model.norm.weight: 32 of 32"):
        assert text in str(error.value)


def test_script_exits_3_without_a_receipt_and_0_with_one(made, model, tmp_path, project):
    command = [sys.executable, project / "workflow/scripts/verify_model.py", f"--model={model}", f"--base={made[0]}"]
    command += [f"--checkpoint={made[1]}", f"--receipt={tmp_path / 'r.json'}", "--learning-rate=1e-3", "--steps=1"]
    command += ["--dtype=bf16", "--mtp=drop"]
    subprocess.run(command, check=True, capture_output=True)
    receipt = json.loads((tmp_path / "r.json").read_text())
    assert all(entry["passed"] for entry in receipt["figures"]["checks"].values())
    (tmp_path / "r.json").unlink()
    overwrite(model, "model.norm.weight", np.zeros(32, np.float32))
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 3 and "model.norm.weight" in found.stderr and "Traceback" not in found.stderr
    assert not (tmp_path / "r.json").exists()


def test_first_error_ends_the_verification_without_reading_the_other_files(made, model, monkeypatch):
    begun = []

    def measure_file(opened, path, *_):
        begun.append(path)
        time.sleep(0.01)
        raise BadInputError(f"{path} cannot be read")

    monkeypatch.setattr(verify, "measure_file", measure_file)
    with pytest.raises(BadInputError, match="cannot be read"):
        check(made, model, workers=1)
    assert len(begun) < len(list(model.glob("*.safetensors")))


def test_many_ranks_are_compared_with_few_descriptors_for_all_threads_together(tmp_path, monkeypatch):
    specs = large_zero3.write_base(tmp_path / "base", small_models.SHAPE)
    large_zero3.write_checkpoint(tmp_path / "step", specs, world_size=60, experts_per_shard=2)
    checkpoint, base = zero.open_checkpoint(tmp_path / "step"), base_model.open_model(tmp_path / "base")
    convert.run(convert.prepare(checkpoint, base, tmp_path / "model", convert.Options(largest_shard=8_000)))

    descriptors = [len(list(Path("/proc/self/fd").iterdir()))]
    real = byte_ranges.OpenFiles.read_into

    def read_into(self, *arguments):
        real(self, *arguments)
        time.sleep(1e-4)  # lets the other threads come as far
        descriptors.append(len(list(Path("/proc/self/fd").iterdir())))

    monkeypatch.setattr(byte_ranges.OpenFiles, "read_into", read_into)
    monkeypatch.setattr(byte_ranges.resource, "getrlimit", lambda kind: (84, 84))
    monkeypatch.setattr(byte_ranges.resource, "setrlimit", lambda kind, limits: None)
    threads, kept = 12, byte_ranges.file_limit()
    result = verify.verify(tmp_path / "model", base, checkpoint, full=True, workers=threads)
    assert result.checks["checkpoint"].failures == []
    assert max(descriptors) - descriptors[0] <= kept + 2 * threads  # each thread uses a file, and lists descriptors


def test_failed_verification_leaves_its_checks_for_the_report(made, model, tmp_path, project):
    values = small_models.read_tensors(model)["model.norm.weight"].copy()
    values[0] = np.nan
    overwrite(model, "model.norm.weight", values)
    receipt = tmp_path / "receipts/verify_model.json"
    command = [sys.executable, project / "workflow/scripts/verify_model.py", f"--model={model}", f"--base={made[0]}"]
    done = subprocess.run([*command, f"--receipt={receipt}"], capture_output=True, text=True, check=False)
    assert done.returncode == 3 and not receipt.exists()
    checks = json.loads((tmp_path / "failed/verify_model.json").read_text())["figures"]["checks"]
    assert [name for name, check in checks.items() if not check["passed"]] == ["finite"]
    assert "model.norm.weight" in checks["finite"]["detail"]


def damaged_base(made, folder, name, value):
    """A copy of the base with one value of a tensor replaced."""
    base = shutil.copytree(made[0], folder)
    tensor = base_model.open_model(base).tensors[name]
    with open(tensor.file, "r+b") as stream:
        stream.seek(tensor.offset)
        stream.write(float32_to_bf16(np.array([value], np.float32)).tobytes())
    return base


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("bound", [True, False])
def test_a_value_of_the_base_that_is_no_number_switches_no_bound_off(made, model, tmp_path, value, bound):
    name = "model.layers.0.mlp.up_proj.weight"
    base = damaged_base(made, tmp_path / "base", name, value)
    overwrite(model, name, np.full((40, 32), 1000, np.float32))
    found = failures(check((base, *made[1:]), model, bound, with_checkpoint=False))["change"]
    assert any(line.startswith(f"{name}: 1 values of the base are infinite or not numbers") for line in found)
    assert any(line.startswith((f"{name}: an element moved by", f"{name}: relative change")) for line in found)


def test_no_bound_is_kept_by_what_is_not_a_number():
    measured = {
        "a": weight_checks.Measured(largest_excess=np.nan, squared_change=np.nan, squared_base=1, fp8_error=np.nan)
    }
    for bound in (ChangeBound(1.0, 0.0), ChangeBound(np.nan, 0.0), None):
        found = verify.check_values(
            measured, bound, set(), with_checkpoint=True, correction_bias=deepseek_v3.CORRECTION_BIAS
        )
        assert found["change"].failures and found["checkpoint"].failures
    assert np.isnan(weight_checks.larger(0.0, np.nan)) and np.isnan(weight_checks.larger(np.nan, 0.0))


@pytest.fixture(scope="module")
def partly():
    """Makes (base, checkpoint, model) of a run that left the named tensors at the base's values."""

    def make(folder, untouched):
        base = small_models.make_base(folder / "base")
        before = small_models.read_tensors(base)
        after = small_models.train(before, LEARNING_RATE)
        tensors = {name: before[name] if untouched(name) else values for name, values in after.items()}
        buffers = {n: v for n, v in tensors.items() if n.endswith(deepseek_v3.CORRECTION_BIAS)}
        parameters = {n: v for n, v in tensors.items() if n not in buffers}
        synthetic_zero3.write_checkpoint(folder / "step7", [parameters], 2, buffers)
        opened = zero.open_checkpoint(folder / "step7"), base_model.open_model(base)
        convert.run(convert.prepare(*opened, folder / "model", convert.Options(largest_shard=20_000)))
        return base, folder / "step7", folder / "model"

    return make


def stepped(case, bound):
    checkpoint = zero.open_checkpoint(case[1])
    return verify.verify(case[2], base_model.open_model(case[0]), checkpoint, bound).checks["stepped"]


def test_tensors_that_were_never_stepped_are_named(partly, tmp_path):
    case = partly(tmp_path, lambda name: ".layers.1.self_attn." in name)
    found = stepped(case, ChangeBound.of(LEARNING_RATE, STEPS, 0.1))
    names = [name for name in small_models.read_tensors(case[0]) if ".layers.1.self_attn." in name]
    assert found.failures == [f"{name} equals the base bit for bit: it was never stepped" for name in sorted(names)]


@pytest.mark.parametrize(("weight_decay", "passes"), [(0.0, True), (0.1, False)])
def test_an_expert_without_tokens_may_stay_as_it_was_where_no_weight_decay_moves_it(
    partly, tmp_path, weight_decay, passes
):
    case = partly(tmp_path, lambda name: f"{EXPERT}." in name)
    found = stepped(case, ChangeBound.of(LEARNING_RATE, STEPS, weight_decay))
    assert (not found.failures) is passes
    if passes:
        assert f"no token was routed to {EXPERT}.down_proj.weight" in found.scope


def test_a_learning_rate_that_moves_nothing_is_said_and_not_blamed(partly, tmp_path):
    case = partly(tmp_path, lambda name: True)
    assert stepped(case, ChangeBound.of(0.0, STEPS)).failures == []
    assert "move nothing" in stepped(case, ChangeBound.of(0.0, STEPS)).scope
    assert len(stepped(case, ChangeBound.of(LEARNING_RATE, STEPS)).failures) > 20


def test_values_too_large_for_the_learning_rate_are_said_and_not_blamed(partly, tmp_path):
    """Norms of 1 with a rate below half of FP32's step there."""
    case = partly(tmp_path, lambda name: name == "model.norm.weight")
    found = stepped(case, ChangeBound.of(4e-8, 100))
    assert not found.failures and "too large for FP32 to resolve one step of 4e-08: model.norm.weight" in found.scope
    assert stepped(case, ChangeBound.of(2e-7, 100)).failures


def test_frozen_parameters_are_named_and_not_blamed(made, tmp_path):
    trained = small_models.train(small_models.read_tensors(made[0]), LEARNING_RATE)
    name = "model.embed_tokens.weight"
    frozen = {name: float32_to_bf16(small_models.read_tensors(made[0])[name])}
    buffers = {n: v for n, v in trained.items() if n.endswith(deepseek_v3.CORRECTION_BIAS)}
    parameters = {n: v for n, v in trained.items() if n not in buffers and n != name}
    synthetic_zero3.write_checkpoint(tmp_path / "step", [parameters], 2, buffers, frozen)
    opened = zero.open_checkpoint(tmp_path / "step"), base_model.open_model(made[0])
    convert.run(convert.prepare(*opened, tmp_path / "model", convert.Options()))
    found = stepped((made[0], tmp_path / "step", tmp_path / "model"), ChangeBound.of(LEARNING_RATE, STEPS))
    assert not found.failures and f"not trained: {name}" in found.scope


def test_files_of_another_quantisation_neither_travel_nor_pass(made, model, tmp_path):
    base = shutil.copytree(made[0], tmp_path / "base")
    (base / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}')
    opened = zero.open_checkpoint(made[1]), base_model.open_model(base)
    convert.run(convert.prepare(*opened, tmp_path / "made", convert.Options(largest_shard=20_000)))
    assert not (tmp_path / "made/hf_quant_config.json").exists()
    shutil.copy(base / "hf_quant_config.json", model)
    found = failures(check(made, model, with_checkpoint=False))
    assert found == {"files": ["hf_quant_config.json describes another quantisation; vLLM reads it"]}


def test_code_that_the_base_lacks_is_not_named_by_the_model(made, tmp_path):
    base = shutil.copytree(made[0], tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}
    (base / "config.json").write_text(json.dumps(config))
    assert "auto_map" not in output_tensors.output_config(base_model.open_model(base), "bf16", "drop")
    (base / "configuration_deepseek.py").write_text("")
    assert "auto_map" in output_tensors.output_config(base_model.open_model(base), "bf16", "drop")


@pytest.mark.parametrize("said", [0, 2, None])
def test_the_number_of_copied_prediction_layers_is_written_whatever_the_base_says(made, tmp_path, said):
    base = tmp_path / "fp8"
    small_models.make_fp8_release(made[0], base)
    config = json.loads((base / "config.json").read_text()) | {"num_nextn_predict_layers": said}
    (base / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    opened = base_model.open_model(base)
    assert output_tensors.output_config(opened, "bf16", "copy")["num_nextn_predict_layers"] == 1
    assert output_tensors.output_config(opened, "bf16", "drop")["num_nextn_predict_layers"] == 0


def test_a_prediction_layer_that_is_not_whole_is_not_copied(made, tmp_path):
    small_models.make_fp8_release(made[0], tmp_path / "fp8")
    opened = base_model.open_model(tmp_path / "fp8")
    cut = dataclasses.replace(opened, mtp=[name for name in opened.mtp if not name.endswith(".enorm.weight")])
    with pytest.raises(BadInputError, match=r"cannot be copied: layer 3 lacks model.layers.3.enorm.weight"):
        output_tensors.output_config(cut, "bf16", "copy")


def test_a_bound_that_is_not_a_number_is_refused(made, tmp_path, project):
    script = project / "workflow/scripts/verify_model.py"
    arguments = [f"--model={made[2]}", f"--base={made[0]}", "--learning-rate=nan", "--steps=1"]
    done = subprocess.run(
        [sys.executable, script, *arguments, f"--receipt={tmp_path / 'r.json'}"], capture_output=True, text=True
    )
    assert done.returncode == 2 and "--learning-rate nan is no bound" in done.stderr


def frozen_run(made, folder, moved=0.0):
    """Base, checkpoint and model of a run that left the routers as they were, but for one element that moved so far."""
    base = made[0]
    before = small_models.read_tensors(base)
    trained = small_models.train(before, LEARNING_RATE)
    routers = [name for name in trained if name.endswith(verify.ROUTER)]
    trained |= {name: before[name].copy() for name in routers}
    trained[routers[-1]].flat[-1] += moved
    fused = synthetic_zero3.fuse(trained, 2)
    buffers = {n: v for n, v in fused.items() if n.endswith(deepseek_v3.CORRECTION_BIAS)}
    synthetic_zero3.write_checkpoint(
        folder / "step7", [{n: v for n, v in fused.items() if n not in buffers}], 2, buffers
    )
    opened = zero.open_checkpoint(folder / "step7"), base_model.open_model(base)
    convert.run(convert.prepare(*opened, folder / "model", convert.Options(largest_shard=20_000)))
    return (base, folder / "step7", folder / "model"), routers


def test_a_frozen_router_is_proven_to_be_the_base_s(made, tmp_path):
    found, routers = frozen_run(made, tmp_path)
    result = check(found, found[2], freeze=["router"])
    assert failures(result) == {}
    assert result.checks["frozen"].detail == f"{len(routers)} tensors of train.freeze [router] equal the base's"
    assert failures(check(found, found[2])).keys() == {"stepped"}, "nobody says that it was frozen"


def test_a_frozen_router_that_moved_by_less_than_bf16_shows_is_named(made, tmp_path):
    found, routers = frozen_run(made, tmp_path, moved=1e-6)
    assert failures(check(found, found[2], freeze=["router"])) == {
        "frozen": [f"{routers[-1]} moved, and the run froze it"]
    }


def test_a_model_without_a_checkpoint_shows_a_frozen_router_that_moved(made, model):
    assert failures(check(made, model, with_checkpoint=False, freeze=["router"])).keys() == {"frozen"}
