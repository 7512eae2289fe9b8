"""Promises of the configuration: defaults, errors to act on, and what re-runs what."""

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from deepseek_sft import config
from deepseek_sft.errors import BadInputError
from deepseek_sft.settings import document, field_types
from deepseek_sft.settings.configuration import Configuration

PROJECT = Path(__file__).resolve().parents[2]


@pytest.fixture
def production() -> dict[str, Any]:
    return yaml.safe_load((PROJECT / "config/config.yaml").read_text())


def merged_demo(production: dict[str, Any]) -> dict[str, Any]:
    demo = yaml.safe_load((PROJECT / "config/experiments/demo.yaml").read_text())
    for key, value in demo.items():
        if isinstance(value, dict):
            production[key].update(value)
        else:
            production[key] = value
    return production


def test_shipped_configurations_are_valid(production):
    assert config.resolve(production)["train"]["learning_rate"] == 2e-7
    assert config.resolve(merged_demo(production))["accelerator"] == "cpu"


def test_defaults_fill_sections_that_are_absent_or_empty(production):
    del production["smoke_test"]
    production["convert"] = None
    resolved = config.resolve(production)
    assert resolved["smoke_test"]["min_format_rate"] == 0.9
    assert resolved["convert"]["dtype"] == "bf16"


def test_resolving_does_not_change_its_argument(production):
    before = copy.deepcopy(production)
    config.resolve(production)
    assert production == before


def test_number_without_dot_is_read_as_a_number(production):
    production["train"]["learning_rate"] = yaml.safe_load("2e-7")
    assert config.resolve(production)["train"]["learning_rate"] == 2e-7


@pytest.mark.parametrize(
    ("section", "key", "value", "expected"),
    [
        ("train", "lerning_rate", 1e-5, ["train.lerning_rate", "`learning_rate`", "learning_rate: 1e-05"]),
        ("train", "max_length", 5, ["train.max_length", "belongs to `data:`"]),
        ("train", "strategy", "zero9", ["train.strategy", "'zero9'", "zero3, zero3_offload"]),
        ("train", "micro_batch_size", "two", ["train.micro_batch_size", "'two'", "integer"]),
        ("serve", "port", 70000, ["serve.port", "70000", "65535"]),
        ("train", "ranks_per_node", 8, ["train.ranks_per_node", "leave it null"]),
        ("train", "min_learning_rate", 1.0, ["train.min_learning_rate", "above learning_rate"]),
        ("smoke_test", "max_tokens", 99999, ["smoke_test.max_tokens", "max_model_len"]),
        ("model", "tiny", {}, ["exactly one of `base`", "`tiny`"]),
        ("data", "sources", [{"pat": "x"}], ["data.sources.0.pat: unknown key; did you mean `path`?"]),
        ("data", "sources", [{"format": "openai"}], ["data.sources.0: the key `path` is missing: File or glob"]),
        ("data", "sources", ["a", 5], ["data.sources.1: 5 is not allowed, expected text that is not empty or keys"]),
        ("data", "sources", [], ["data.sources: [] is not allowed, expected a list that is not empty: each"]),
        ("data", "fields", {"a": "los"}, ["data.fields.a: 'los' is not allowed, expected one of loss, not loss"]),
        ("envs", "train", {"activate": "x"}, ["envs.train: the key `python` is missing"]),
        ("train", "adam_betas", [0.9], ["train.adam_betas: [0.9] is not allowed, expected a list: 2 values, each"]),
    ],
)
def test_error_names_key_value_and_what_is_allowed(production, section, key, value, expected):
    production.setdefault(section, {})[key] = value
    with pytest.raises(BadInputError) as error:
        config.resolve(production)
    for words in expected:
        assert words in str(error.value)


def test_a_wrong_entry_is_told_and_not_its_list_as_well(production):
    production["data"]["sources"] = ["a", 5]
    with pytest.raises(BadInputError) as error:
        config.resolve(production)
    assert str(error.value).count("\n  - ") == 1


def test_all_problems_are_told_at_once(production):
    production["train"]["strategy"] = "zero9"
    production["serve"]["port"] = -1
    with pytest.raises(BadInputError) as error:
        config.resolve(production)
    assert "train.strategy" in str(error.value)
    assert "serve.port" in str(error.value)


def test_missing_section_says_what_it_is(production):
    del production["data"]["sources"]
    with pytest.raises(BadInputError, match=r"`sources` is missing.*JSONL"):
        config.resolve(production)


@pytest.mark.parametrize("changes", [{"strategy": "zero3"}, {"offload": "parameters"}])
def test_adam_on_the_host_needs_its_states_there(production, changes):
    production["train"] |= {"optimizer": "cpu_adam"}
    config.resolve(production)
    production["train"] |= changes
    with pytest.raises(BadInputError, match=r"train.optimizer: `cpu_adam` needs optimizer states in host memory"):
        config.resolve(production)


def test_sequence_parallel_size_must_divide_the_ranks_of_a_cpu_node(production):
    demo = merged_demo(production)
    demo["train"]["sequence_parallel_size"] = 4
    with pytest.raises(BadInputError, match=r"does not divide the 2 ranks.*allowed: 1, 2"):
        config.resolve(demo)


def test_replicas_that_share_experts_are_refused_on_cpus(production):
    with pytest.raises(BadInputError, match=r"serve\.data_parallel_size: replicas share experts on GPUs alone"):
        config.resolve(config.merge(merged_demo(production), {"serve": {"data_parallel_size": 2}}))


@pytest.mark.parametrize("change, text", [({"dtype": "fp8"}, "convert.dtype"), ({"mtp": "copy"}, "convert.mtp")])
def test_format_that_the_demo_cannot_make_or_serve_is_refused(production, change, text):
    with pytest.raises(BadInputError, match=text):
        config.resolve(config.merge(merged_demo(production), {"convert": change}))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_no_bound_would_notice_is_refused(production, value):
    production["train"]["learning_rate"] = value
    with pytest.raises(BadInputError, match=r"train.learning_rate: is infinite or not a number"):
        config.resolve(production)


def test_every_key_is_described():
    def described(kind, path=""):
        for name, key in field_types.keys(kind).items():
            assert key.meaning or (key.section and not path), f"{path}{name}"
            if key.section:
                described(key.section, f"{path}{name}.")

    described(Configuration)


def test_documentation_is_current():
    assert (PROJECT / "config/README.md").read_text() == document.documentation()
