"""config.json: old and new names mean the same, what is not known is refused, and the numbers follow from it."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import small_models

from deepseek_sft import families
from deepseek_sft.convert import base_model, output_tensors, tiny_model
from deepseek_sft.errors import BadInputError
from deepseek_sft.families import config_file, deepseek_v3, implied_numbers
from deepseek_sft.planning import counting

PLACE = Path("config.json")
OLD = tiny_model.config_of(tiny_model.TinyShape())
YARN = OLD["rope_scaling"]
PARAMETERS = {key: value for key, value in YARN.items() if key != "type"} | {"rope_type": "yarn", "rope_theta": 10000}


def without(*keys, **changes):
    return {key: value for key, value in OLD.items() if key not in keys} | changes


# As save_pretrained of transformers 5.24 writes it.
NEW = without(
    *("rope_scaling", "rope_theta", "torch_dtype"),
    dtype="bfloat16",
    head_dim=64,
    output_router_logits=False,
    pad_token_id=None,
    pretraining_tp=1,
    qk_head_dim=128,
    rope_interleave=True,
    rope_parameters=PARAMETERS,
    transformers_version="5.24.0",
)
SAME = {
    "transformers 5": NEW,
    "type beside rope_type": NEW | {"rope_parameters": PARAMETERS | {"type": "yarn"}},
    "nested by kind of layer": NEW | {"rope_parameters": {"full_attention": PARAMETERS}},
    "period outside": NEW
    | {"rope_parameters": {k: v for k, v in PARAMETERS.items() if k != "rope_theta"}, "rope_theta": 10000},
    "both forms": NEW | {"rope_scaling": YARN, "rope_theta": 10000, "torch_dtype": "torch.bfloat16"},
    "transformers 4.57": without("torch_dtype", dtype="bfloat16", rope_scaling=YARN | {"rope_type": "yarn"}),
    "other names of counts": {
        **{k: v for k, v in NEW.items() if k not in ("n_routed_experts", "num_nextn_predict_layers")},
        "num_local_experts": OLD["n_routed_experts"],
        "num_mtp_layers": 0,
    },
}


def test_a_release_is_read_and_written_as_it_lies():
    assert families.checked(OLD, PLACE) == OLD
    assert config_file.to_serve(OLD, PLACE) == OLD


@pytest.mark.parametrize("form", SAME)
def test_every_form_means_what_the_release_says(form):
    found, wanted = (implied_numbers.numbers(families.checked(config, PLACE)) for config in (SAME[form], OLD))
    assert np.array_equal(found.frequencies, wanted.frequencies)
    assert (found.softmax_scale, found.attention_factor) == (wanted.softmax_scale, wanted.attention_factor)
    config = families.checked(SAME[form], PLACE)
    assert config["n_routed_experts"] == OLD["n_routed_experts"] and config["num_nextn_predict_layers"] == 0
    assert deepseek_v3.tensor_specs(config) == deepseek_v3.tensor_specs(OLD)


@pytest.mark.parametrize("form", SAME)
def test_what_is_written_has_the_keys_of_old_and_new_readers(form):
    written = config_file.to_serve(SAME[form], PLACE)
    assert (written["rope_theta"], config_file.yarn(written)) == (10000, config_file.yarn(OLD))
    assert implied_numbers.numbers(families.checked(written, PLACE)).softmax_scale == pytest.approx(
        128**-0.5 * 1.3689**2, 1e-4
    )
    if "rope_parameters" in SAME[form]:
        assert written["rope_parameters"]["rope_type"] == "yarn"
        assert written["rope_parameters"]["rope_theta"] == 10000


def test_a_model_without_scaling_is_read_from_the_default_type():
    new = NEW | {"rope_parameters": {"rope_type": "default", "rope_theta": 50000.0}}
    config = families.checked(new, PLACE)
    assert (config["rope_scaling"], config["rope_theta"]) == (None, 50000.0)
    assert implied_numbers.numbers(config).softmax_scale == 128**-0.5
    assert implied_numbers.numbers(config).frequencies[1] == pytest.approx(50000 ** (-2 / 64))


def test_numbers_are_those_of_the_published_formulas():
    found = implied_numbers.numbers(OLD)
    scale = 0.1 * math.log(40) + 1
    assert found.softmax_scale == pytest.approx(128**-0.5 * scale**2)
    assert found.attention_factor == 1
    assert found.frequencies[[0, 31]] == pytest.approx([1, 10000 ** (-62 / 64) / 40])
    assert 10000 ** (-40 / 64) / 40 < found.frequencies[16] < 10000 ** (-32 / 64)  # in the ramp


REFUSED = {
    "two periods": (NEW | {"rope_theta": 50000}, "two values"),
    "two scalings": (NEW | {"rope_scaling": YARN | {"factor": 4}}, "two rotary scalings"),
    "two dtypes": (OLD | {"dtype": "float16"}, "two names of one thing"),
    "two counts": (OLD | {"num_local_experts": 3}, "two names of one thing"),
    "unknown dtype": (OLD | {"torch_dtype": "float8"}, "known are bfloat16"),
    "other scaling": (OLD | {"rope_scaling": {"type": "linear", "factor": 4}}, "known are yarn and default"),
    "types that differ": (OLD | {"rope_scaling": YARN | {"rope_type": "linear"}}, "of type linear and yarn"),
    "kinds of layers": (NEW | {"rope_parameters": {"full_attention": PARAMETERS, "sliding_attention": {}}}, "by kind"),
    "unknown rotary key": (OLD | {"rope_scaling": YARN | {"short_factor": [1.0]}}, "unknown keys: short_factor"),
    "attention factor": (OLD | {"rope_scaling": YARN | {"attention_factor": 1.0}}, "read differently"),
    "uneven magnitudes": (
        OLD | {"rope_scaling": {k: v for k, v in YARN.items() if k != "mscale_all_dim"} | {"mscale": 0.7}},
        "transformers scales angles",
    ),
    "no original length": (OLD | {"rope_scaling": {"type": "yarn", "factor": 40}}, "original_max_position_embeddings"),
    "factor is NaN": (OLD | {"rope_scaling": YARN | {"factor": math.nan}}, "factor must be a positive number"),
    "epsilon is NaN": (OLD | {"rms_norm_eps": math.nan}, "rms_norm_eps must be a positive number"),
    "half of each head": (NEW | {"rope_interleave": False}, "rope_interleave must be"),
    "partial rotation": (OLD | {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    "other activation": (OLD | {"hidden_act": "gelu"}, "hidden_act must be 'silu'"),
    "dropout": (OLD | {"attention_dropout": 0.1}, "attention_dropout"),
    "fewer key heads": (OLD | {"num_key_value_heads": 1}, "num_key_value_heads is 1"),
    "another head size": (NEW | {"head_dim": 128}, "head_dim is 128"),
    "sliding layers": (OLD | {"layer_types": ["sliding_attention"] * 3}, "layer_types"),
    "dense layers elsewhere": (OLD | {"mlp_layer_types": ["sparse", "dense", "sparse"]}, "mlp_layer_types"),
    "every second layer": (OLD | {"moe_layer_freq": 2}, "moe_layer_freq"),
    "sparse attention": (OLD | {"index_topk": 2048}, "unknown keys, which may change .* index_topk: 2048"),
    "window": (OLD | {"sliding_window": 4096}, "sliding_window"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_would_be_computed_otherwise_is_refused_by_name(what):
    config, message = REFUSED[what]
    with pytest.raises(BadInputError, match=message):
        families.checked(config, PLACE)


@pytest.mark.parametrize("key", config_file.COMPUTED)
def test_a_key_that_readers_would_fill_in_differently_must_be_there(key):
    with pytest.raises(BadInputError, match=rf"{key} missing"):
        families.checked(without(key), PLACE)


def test_unknown_keys_that_switch_nothing_on_are_let_through_and_named():
    idle = {"sliding_window": None, "use_sliding_window": False, "trained_by_version": "3", "_remark": 1}
    families.checked(OLD | idle, PLACE)
    assert config_file.unknown_keys(OLD | idle) == ([], list(idle))


def test_a_plan_counts_the_same_model_from_either_form():
    old, new = (counting.count(families.checked(config, PLACE)) for config in (OLD, NEW))
    assert old.figures() == new.figures() and old.forward_flops(100) == new.forward_flops(100)


def test_numbers_that_are_not_numbers_differ_from_everything():
    assert (
        implied_numbers.differ(math.nan, 1.0)
        and implied_numbers.differ(1.0, math.nan)
        and implied_numbers.differ(math.nan, math.nan)
    )
    assert implied_numbers.differ([1.0, 2.0], [1.0]) and not implied_numbers.differ([1.0 + 1e-7], [1.0])


def test_the_fingerprint_of_a_base_in_the_old_form_is_that_of_earlier_versions(tmp_path):
    """It is part of run ids: this value was computed at commit d6e85d6."""
    found = base_model.open_model(small_models.make_base(tmp_path / "base")).fingerprint
    assert found == "model:76ecb25f96175d9804ae2e6c15ea0636721f3aca80108ac9de2c87728ffa9de8"


def in_new_form(folder):
    """The config of a base as transformers 5 would have saved it."""
    config = json.loads((folder / "config.json").read_text())
    parameters = config.pop("rope_scaling") | {"rope_type": "yarn", "rope_theta": config.pop("rope_theta")}
    config |= {"rope_parameters": parameters, "dtype": config.pop("torch_dtype")}
    (folder / "config.json").write_text(json.dumps(config))


def test_a_model_made_from_the_new_form_carries_both(tmp_path):
    base = small_models.make_base(tmp_path / "base")
    in_new_form(base)
    opened = base_model.open_model(base)
    config = output_tensors.output_config(opened, "fp32", "drop")
    assert (config["torch_dtype"], config["dtype"]) == ("float32", "float32")
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10000
    assert config["rope_scaling"]["factor"] == config["rope_parameters"]["factor"] == 40
    assert output_tensors.identity_of_config(opened, config, "fp32", "drop")


def test_folders_that_earlier_versions_made_of_an_old_form_stay_finished(tmp_path):
    opened = base_model.open_model(small_models.make_base(tmp_path / "base"))
    config = output_tensors.output_config(opened, "bf16", "drop")
    assert config == opened.published | {"num_nextn_predict_layers": 0}
    assert output_tensors.identity_of_config(opened, config, "bf16", "drop") == {}
