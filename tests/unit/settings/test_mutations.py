"""What is accepted at start is accepted by the stage that reads it; what is refused is refused with the key's name.

Each shipped configuration is changed at random: SETTINGS_CASES changes of each (`make mutations`: 2,000).
"""

import argparse
import contextlib
import copy
import datetime
import functools
import importlib
import io
import json
import math
import os
import random
import shlex
import sys
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml

from deepseek_sft import config as configuration
from deepseek_sft.convert import output_tensors
from deepseek_sft.errors import BadInputError
from deepseek_sft.experiment import Experiment
from deepseek_sft.preflight import settings as preflight
from deepseek_sft.serving import settings as serving
from deepseek_sft.settings import field_types, reading
from deepseek_sft.settings.configuration import Configuration
from deepseek_sft.settings.plan import Plan
from deepseek_sft.tensors.sizes import parse_size
from deepseek_sft.training import settings as training

PROJECT = Path(__file__).resolve().parents[3]
CASES = int(os.environ.get("SETTINGS_CASES", "200"))
EXPERIMENTS = PROJECT / "config/experiments"
SHIPPED = ["", *sorted(str(path.relative_to(EXPERIMENTS)) for path in EXPERIMENTS.rglob("*.yaml"))]
DEEP: Any = functools.reduce(lambda inner, _: [inner], range(70), "x")
ANY: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 3, 16, 500.0, 0.5, 1e-300, 1e300, 10**30, 10**400, math.nan, math.inf, -math.inf),
    *("", " ", "auto", "none", "null", "2e-7", "1e3", "64GB", "0GB", "1.2.3GiB", "5 gb", "base", "nan", "inf", "~/x"),
    *("a=b", "é💣", "-x", "x" * 99, "true", [], [1], [0.9, 0.99], [None], {}, {"a": 1}, {"a": None}, {"a": [1]}),
    *({"port": 1}, {"tensor-parallel-size": 16}, {"VLLM_API_KEY": "x"}, {"HF_TOKEN": "x"}, {1: 2}, {"path": "x"}),
    *({"zero_optimization": {"stage": 2}}, {"zero_optimization": {"overlap_comm": True}}, {"mask": "loss"}, {True: 1}),
    *("a\0b", "\ud800", datetime.date(2026, 1, 2), b"x", {"a": {1: 2, "b": 3}}, {"a": 10**50}, {"a": DEEP}),
    *([{"path": "x", "weight": 0}], [{"path": "x", "format": "openai"}], [{"file": "x"}], ["all_reduce", "all_reduce"]),
]
REQUIRED = {  # what a rule gives its script beside the arguments of the configuration
    "prepare_data": "--receipt r",
    "tokenize_data": "--receipt r",
    "prepare_model": "--receipt r",
    "convert_checkpoint": "--receipt r --checkpoint c --base b",
    "verify_model": "--receipt r --model m --checkpoint c --base b",
}


def paths(kind: Any = Configuration, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], field_types.Key]]:
    found = []
    for name, key in field_types.keys(kind).items():
        found.append(((*path, name), key))
        found += paths(key.section, (*path, name)) if key.section else []
    return found


ALL = paths()


def near(key: field_types.Key) -> list[Any]:
    """Values at the edges of what a key may be."""
    marks = [mark for one in typing.get_args(key.hint) or (key.hint,) for mark in typing.get_args(one) or (one,)]
    marks += list(typing.get_args(key.hint))
    edges = [getattr(mark, name) for mark in marks for name in ("ge", "gt", "le", "lt") if hasattr(mark, name)]
    edges = [edge for edge in edges if isinstance(edge, (int, float))]
    return [*key.choices, key.default, *(edge + step for edge in edges for step in (-1, -0.5, 0, 0.5, 1))]


def changed(config: dict[str, Any], chance: random.Random) -> tuple[dict[str, Any], tuple[str, ...]]:
    """A configuration with one key set, renamed or removed, and the key's path."""
    config = copy.deepcopy(config)
    path, key = chance.choice(ALL)
    node = config
    for part in path[:-1]:
        if not isinstance(node.get(part), dict):
            node[part] = {"python": "/opt/bin/python"} if part in ("train", "serve") and path[0] == "envs" else {}
        node = node[part]
    how = chance.random()
    if how < 0.06:
        node.pop(path[-1], None)
    elif how < 0.12:
        at = chance.randrange(len(path[-1]))
        path = (*path[:-1], path[-1][:at] + path[-1][at + 1 :] or "x")
        node[path[-1]] = 1
    else:
        edges = [value for value in near(key) if value is not field_types.MISSING]
        node[path[-1]] = copy.deepcopy(chance.choice(edges if edges and how < 0.5 else ANY))
    return config, path


class Parsed(Exception):
    """What a script's parser made of its command line."""


@pytest.fixture(scope="module")
def parse(request):
    """Parses the command line of a script by its own parser, and does nothing more."""
    patch = pytest.MonkeyPatch()
    request.addfinalizer(patch.undo)
    patch.syspath_prepend(PROJECT / "workflow/scripts")
    original = argparse.ArgumentParser.parse_args

    def stop(parser, *given):
        raise Parsed(original(parser, *given))

    patch.setattr(argparse.ArgumentParser, "parse_args", stop)
    modules = {name: importlib.import_module(name) for name in REQUIRED}

    def parsed(script: str, words: str) -> argparse.Namespace:
        patch.setattr(sys, "argv", [script, *shlex.split(words)])
        told = io.StringIO()
        try:
            with contextlib.redirect_stderr(told):
                modules[script].main()
        except Parsed as done:
            return done.args[0]
        except SystemExit:
            raise BadInputError(told.getvalue()) from None
        raise AssertionError(f"{script} parses no command line")

    return parsed


def read_by_stages(experiment: Experiment, parse: Any, folder: Path, scripts: bool) -> None:
    """Every stage's own reader on what the workflow hands it; raises BadInputError where one refuses."""

    def joined(rule: str) -> dict[str, Any]:
        return json.loads(experiment.settings(rule)) | json.loads(experiment.operational(rule))

    train = joined("train")
    for key in ("environment", "secrets_file", "ranks_per_node", "spare_nodes"):
        train.pop(key, None)  # render_sbatch.py puts them into the script
    (folder / "s.json").write_text(json.dumps(train))
    training.read(folder / "s.json")
    serving.parse(joined("smoke_test"))
    (folder / "s.json").write_text(json.dumps(json.loads(experiment.settings("preflight"))))
    preflight.read(folder / "s.json")
    reading.parse(Plan, joined("plan")["plan"], "plan")
    for rule, more in REQUIRED.items() if scripts else ():
        words = experiment.arguments(rule)
        if rule in ("prepare_model", "convert_checkpoint", "verify_model"):
            words += f" {experiment.operational_arguments(rule)}"
        found = parse(rule, f"{words} {more}")
        if rule == "convert_checkpoint":
            output_tensors.shard_size(found.max_shard_size)
            assert found.memory == "auto" or parse_size(found.memory)


@pytest.mark.parametrize("name", SHIPPED)
def test_what_the_start_accepts_every_stage_accepts_and_the_rest_is_refused_by_name(name, parse, tmp_path):
    shipped = yaml.safe_load((PROJECT / "config/config.yaml").read_text())
    if name:
        shipped = configuration.merge(shipped, yaml.safe_load((EXPERIMENTS / name).read_text()))
    chance = random.Random(f"settings {name}")
    accepted = 0
    for _ in range(CASES):
        config, path = changed(shipped, chance)
        try:
            experiment = Experiment.from_config(config)
        except BadInputError as error:
            assert any(part in str(error) for part in path), (path, config, str(error))
            continue
        accepted += 1
        read_by_stages(experiment, parse, tmp_path, path[0] in ("data", "model", "convert", "results", "experiment"))
    assert CASES / 10 < accepted < CASES * 9 / 10
