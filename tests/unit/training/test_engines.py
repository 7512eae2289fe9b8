"""An engine's row says what launch, checkpoints, conversion and plan read of it."""

import ast
import dataclasses
import importlib.util
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from planning_models import DEEPSEEK_V3 as V3
from training_helpers import settings, write_checkpoint

from deepseek_sft import config, engines, rule_settings
from deepseek_sft.convert import marker
from deepseek_sft.planning.settings import Training
from deepseek_sft.preflight import software
from deepseek_sft.slurm import nodes
from deepseek_sft.training import checkpoints, launch

LOOP = Path(launch.__file__).parent / "xtuner_engine/loop.py"


def test_an_engines_row_names_its_modules_and_a_locked_environment(project):
    assert settings().engine in engines.ENGINES
    for engine in engines.ENGINES.values():
        assert importlib.util.find_spec(engine.worker)
        assert callable(engine.config.of)
        assert list((project / "envs").glob(f"{engine.environment}*.txt"))
        assert engine.checkpoint.experts in marker.EXPERT_LAYOUTS


def test_the_ranks_of_a_start_run_the_engines_worker(tmp_path):
    start = launch.Start(tmp_path, "cpu", {}, worker="another.engine")
    command = launch.command_of(nodes.detect("cpu", 1, {}), start)
    assert command[command.index("--module") + 1] == "another.engine"


def test_a_checkpoint_counts_only_with_every_kind_of_file_of_every_rank(tmp_path):
    folder = write_checkpoint(tmp_path, 3, world_size=11, commit=False)
    wanted = checkpoints.sizes(folder)
    assert len(checkpoints.files_of_rank(folder, 1)) == 2, "rank 1's alone, not rank 10's"
    told = {"engine": "xtuner", "run_id": "abc", "step": 3, "world_size": 11, "progress": {}}
    missing = folder / "zero_pp_rank_4_mp_rank_00_model_states.pt"
    content = missing.read_bytes()
    missing.unlink()
    with pytest.raises(RuntimeError, match="not complete: 10 of 11 ranks"):
        checkpoints.commit(folder, told, checkpoints.sizes(folder))
    missing.write_bytes(content)
    with pytest.raises(RuntimeError, match="not complete"):
        checkpoints.commit(folder, told | {"world_size": 10}, wanted)
    assert checkpoints.commit(folder, told, wanted).step == 3


@pytest.fixture
def resolved(project):
    return config.resolve(yaml.safe_load((project / "config/config.yaml").read_text()))


@pytest.fixture
def other(monkeypatch):
    """A second engine, of which nothing but its row is there."""
    memory = engines.ProcessMemory(cuda_host=1.0, cpu=2.0, cpu_later=3.0, cpu_kept=4.0)
    row = dataclasses.replace(engines.XTUNER, name="other", package="other_engine", memory=memory)
    monkeypatch.setitem(engines.ENGINES, "other", row)
    return row


def test_the_plan_adds_up_the_memory_of_the_engine_that_is_chosen(other, resolved):
    train, plan = resolved["train"], resolved["plan"]
    assert Training.from_config(train, plan, V3).process is engines.XTUNER.memory
    assert Training.from_config(train | {"engine": "other"}, plan, V3).process is other.memory


def test_the_nodes_try_the_imports_of_the_engine_that_is_chosen(other, tmp_path):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/tried\n')
    python.chmod(0o755)
    assert software.import_error([], str(python), tmp_path / "memory", engine="other") == ""
    assert (tmp_path / "tried").read_text() == "-m other_engine.imports cuda\n"


def test_plan_and_preflight_are_told_of_an_engine_only_if_it_is_another(other, resolved):
    experiment = SimpleNamespace(config=resolved)
    told = [rule_settings.SETTINGS["refine_plan"](experiment)[0]["train"], rule_settings.preflight(experiment)[0]]
    assert not [values for values in told if "engine" in values]
    experiment.config["train"]["engine"] = "other"
    told = [rule_settings.SETTINGS["refine_plan"](experiment)[0]["train"], rule_settings.preflight(experiment)[0]]
    assert [values["engine"] for values in told] == ["other", "other"]


def test_the_loop_is_read_from_top_to_bottom():
    """A step, its saving and its metrics are called by one function of one file, without a runner and its hooks."""
    text = LOOP.read_text()
    run = next(n for n in ast.parse(text).body if isinstance(n, ast.FunctionDef) and n.name == "run")
    order = ["rows.of_step", "train_step(", "gates.check_health", "metrics.add", "saved.due", "saved.save"]
    body = ast.unparse(run)
    places = [body.index(call) for call in order]
    assert places == sorted(places)
    assert len(text.splitlines()) <= 250
    sources = {path.name: path.read_text() for path in LOOP.parent.glob("*.py")}
    assert not [name for name, source in sources.items() if re.search(r"mmengine\.(hooks|runner)|\brunner\.", source)]
