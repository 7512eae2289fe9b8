"""An engine's row says what launch, checkpoints, conversion and plan read of it."""

import ast
import importlib.util
import re
from pathlib import Path

import pytest
from training_helpers import settings, write_checkpoint

from deepseek_sft import engines
from deepseek_sft.convert import marker
from deepseek_sft.planning import device_memory, host_memory
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


def test_the_plan_adds_up_the_engines_own_memory():
    assert device_memory.PROCESS is engines.XTUNER.memory
    assert engines.XTUNER.memory.cuda_host == host_memory.PROCESS


def test_the_loop_is_read_from_top_to_bottom():
    """A step, its saving and its metrics are called by one function of one file, without a runner and its hooks."""
    text = LOOP.read_text()
    run = next(n for n in ast.parse(text).body if isinstance(n, ast.FunctionDef) and n.name == "run")
    order = ["rows.of_step", "train_step(", "gates.check_health", "metrics.add", "saved.is_due", "saved.save"]
    body = ast.unparse(run)
    places = [body.index(call) for call in order]
    assert places == sorted(places)
    assert len(text.splitlines()) <= 250
    sources = {path.name: path.read_text() for path in LOOP.parent.glob("*.py")}
    assert not [name for name, source in sources.items() if re.search(r"mmengine\.(hooks|runner)|\brunner\.", source)]
