"""Promises of settings wherever they are read: YAML, a stage's JSON, a command line."""

import argparse
import dataclasses
import random

import pytest
from training_helpers import SETTINGS, receipt, settings, write_settings

from deepseek_sft.errors import BadInputError
from deepseek_sft.settings import field_types, options, reading
from deepseek_sft.settings.configuration import Configuration
from deepseek_sft.settings.convert import Convert
from deepseek_sft.settings.serve import Serve
from deepseek_sft.settings.smoke_settings import SmokeSettings
from deepseek_sft.settings.train import Train
from deepseek_sft.training import settings as training

NEEDED = {"sources": ["x"], "base": "b"}  # without which a section says nothing
TOPOLOGY = {
    *("strategy", "offload", "sequence_parallel_size", "micro_batch_size", "gradient_accumulation_steps"),
    *("experts_per_shard", "ranks_per_node", "accumulate_by", "deal_rows", "zero_thresholds"),
    "expert_parallel_size",
}


@pytest.mark.parametrize(
    ("kind", "key", "given", "read"),
    [
        (Train, "max_steps", 500.0, 500),
        (Serve, "pipeline_parallel_size", 4.0, 4),
        (Train, "max_hours", "2e-1", 0.2),
        (Train, "learning_rate", "2e-7", 2e-7),
        (Train, "epochs", 1, 1),
        (Convert, "memory", "1.5 GiB", "1.5 GiB"),
    ],
)
def test_a_value_is_read_as_it_is_meant(kind, key, given, read):
    found = getattr(reading.parse(kind, {key: given}, "here"), key)
    assert (found, type(found)) == (read, type(read))


@pytest.mark.parametrize(
    ("kind", "key", "given", "said"),
    [
        (Train, "max_steps", True, "True is not allowed, expected an integer of at least 1 or null"),
        (Train, "max_steps", 500.5, "500.5 is not allowed, expected an integer"),
        (Train, "pack", 1, "unknown key"),
        (Train, "activation_checkpointing", 1, "1 is not allowed, expected true or false"),
        (Train, "max_grad_norm", float("inf"), "is infinite or not a number"),
        (Convert, "memory", "1.2.3GiB", "expected `auto` or a size like 5GB or 512MiB"),
        (Convert, "max_shard_size", "0GB", "expected `base` or a size like 5GB or 512MiB"),
        (Convert, "checkpoint", "step_2\n", "expected `newest`, or a step like step_200"),
        (Serve, "engine_args", {"tensor-parallel-size": 16}, "engine_args.tensor-parallel-size: is decided by"),
        (Serve, "engine_args", {"a_b": 1, "a-b": 2}, "the same flag stands there twice"),
        (Serve, "engine_args", {"a": {1: 2, "b": 3}}, "engine_args.a.1: is no text as a key"),
        (Serve, "engine_args", {"a": 10**50}, "engine_args.a: is a number of more than 40 digits"),
        (Serve, "environment", {"A": None}, "environment.A: None is not allowed, expected text or a number"),
    ],
)
def test_a_value_that_cannot_be_meant_is_refused_with_what_is(kind, key, given, said):
    with pytest.raises(BadInputError) as error:
        reading.parse(kind, {key: given}, "x")
    assert key in error.value.problem
    assert said in error.value.problem


def test_settings_of_a_run_begun_before_later_keys_existed_read_with_the_defaults_it_was_begun_under(tmp_path):
    later = field_types.marked(training.Settings, "later")
    assert not later & SETTINGS.keys()  # which are those of d6e85d6
    read = training.read(write_settings(tmp_path / "settings.json"))
    known = field_types.keys(training.Settings)
    assert {key: field_types.plain(getattr(read, key)) for key in later} == {key: known[key].default for key in later}
    assert not later & read.shaping().keys()


def test_a_later_key_that_is_set_makes_another_run():
    made = receipt("made")
    ids = {training.run_id(one, made, made) for one in (settings(), settings(gradient_communication_dtype="bfloat16"))}
    assert len(ids) == 2


def test_keys_of_topology_are_those_that_say_how_work_is_spread():
    assert field_types.marked(Train, "topology") == TOPOLOGY


@pytest.mark.parametrize("section", [key.section for key in field_types.keys(Configuration).values() if key.section])
def test_a_section_without_keys_of_its_own_is_its_defaults(section):
    needed = {name: value for name, value in NEEDED.items() if name in field_types.keys(section)}
    found = field_types.plain(reading.parse(section, needed, "x"))
    for name, key in field_types.keys(section).items():
        assert found[name] == needed.get(name, key.default)


def test_a_command_line_gives_back_the_settings_it_was_made_from():
    chance = random.Random(1)
    parser = argparse.ArgumentParser()
    options.add(parser, SmokeSettings)
    for _ in range(50):
        made = SmokeSettings(
            prompts=chance.choice([None, "a b", "x=y"]),
            min_format_rate=chance.choice([None, 0, 0.5, 1]),
            max_loss=chance.choice([None, -1.5, 2]),
            benchmark=chance.choice([True, False]),
            benchmark_concurrency=tuple(chance.randint(1, 9) for _ in range(chance.randint(1, 3))),
            concurrency=chance.randint(1, 99),
            template=chance.choice([None, "deepseek-r1"]),
        )
        assert options.chosen(SmokeSettings, parser.parse_args(options.words(made))) == made


@pytest.mark.parametrize("words", [["--concurrency", "0"], ["--min-format-rate", "2"], ["--max-loss", "inf"]])
def test_an_option_out_of_its_bounds_is_refused_with_them(words, capsys):
    parser = argparse.ArgumentParser()
    options.add(parser, SmokeSettings)
    with pytest.raises(SystemExit):
        parser.parse_args(words)
    assert f"argument {words[0]}: '{words[1]}' is not allowed, expected" in capsys.readouterr().err


def test_replaced_settings_are_checked_too():
    with pytest.raises(ValueError, match="micro_batch_size"):
        dataclasses.replace(settings(), micro_batch_size=0)


@pytest.mark.parametrize("moving", [{"weight_decay": 0.1}, {"balance_bias_speed": 0.001}])
def test_what_is_frozen_and_would_move_all_the_same_is_refused(moving):
    assert list(Train(freeze=("router",)).problems()) == []
    (problem,) = Train(freeze=("router",), **moving).problems()
    assert problem.startswith("freeze: ")
