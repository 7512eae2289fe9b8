"""An update leaves experiments alone that were begun before it: the params of their rules and their run ids stay."""

import dataclasses
import json
from pathlib import Path

import pytest
import yaml

from deepseek_sft import config as configuration
from deepseek_sft.experiment import Experiment
from deepseek_sft.training import settings

PROJECT = Path(__file__).resolve().parents[2]
GOLDEN = PROJECT / "tests/golden/params"
EXPERIMENTS = sorted(
    path.relative_to(PROJECT / "config/experiments").as_posix()
    for path in (PROJECT / "config/experiments").rglob("*.yaml")
)
OWN = {
    "experiment": "own",
    "data": {"sources": ["chats/*.jsonl", {"path": "more.parquet", "format": "openai", "weight": 2}]},
    "model": {"base": "/models/DeepSeek-R1"},
    "train": {"learning_rate": 2e-6, "max_steps": 500},
}


def experiment_of(overlay: dict) -> Experiment:
    config = yaml.safe_load((PROJECT / "config/config.yaml").read_text())
    return Experiment.from_config(configuration.merge(config, overlay))


def what_is_kept(experiment: Experiment, folder: Path) -> dict:
    """Params of every rule, and the run id for inputs that are always the same."""
    arguments = ("prepare_data", "tokenize_data", "prepare_model", "convert_checkpoint", "verify_model")
    with_settings = ("plan", "refine_plan", "preflight", "train", "smoke_test", "serve")
    params = {rule: experiment.arguments(rule) for rule in arguments}
    params |= {rule: json.loads(experiment.settings(rule)) for rule in with_settings}
    # As train.py is given them: rendering joins both kinds.
    file = folder / "settings.json"
    joined = json.loads(experiment.settings("train")) | json.loads(experiment.operational("train"))
    names = {field.name for field in dataclasses.fields(settings.Settings)}
    values = {"run_name": "golden"} | {key: value for key, value in joined.items() if key in names}
    file.write_text(json.dumps(values))
    receipt = {"rule": "made", "inputs": {}, "settings": {}, "figures": {}}
    return params | {"run_id": settings.run_id(settings.read(file), receipt, receipt)}


@pytest.mark.parametrize("name", [*EXPERIMENTS, "own"])
def test_params_and_run_id_of_a_begun_experiment_stay(name, tmp_path):
    overlay = OWN if name == "own" else yaml.safe_load((PROJECT / "config/experiments" / name).read_text())
    kept = json.loads((GOLDEN / f"{name.replace('/', '.').removesuffix('.yaml')}.json").read_text())
    assert what_is_kept(experiment_of(overlay), tmp_path) == kept
