"""What runs the stages of one kind is said in one place."""

import sys

import pytest
import yaml

from deepseek_sft import config, environments, stages
from deepseek_sft.settings.envs import Envs
from deepseek_sft.settings.field_types import keys


@pytest.fixture
def resolved(project):
    return config.resolve(yaml.safe_load((project / "config/config.yaml").read_text()))


def test_every_stage_runs_in_a_kind_that_a_user_may_name_or_in_the_workflows_own():
    assert {stage.environment for stage in stages.ROWS} == {"workflow", *environments.CHOSEN}
    assert set(environments.CHOSEN) <= set(keys(Envs))


@pytest.mark.parametrize(
    "kind, accelerator, locked",
    [
        ("train", "cpu", "train"),
        ("train", "cuda", "train-cuda"),
        ("serve", "cpu", "serve-cpu"),
        ("serve", "cuda", "serve-cuda"),
        ("evaluate", "cpu", "evaluate"),
        ("evaluate", "cuda", "evaluate"),
    ],
)
def test_the_accelerator_chooses_the_locked_environment_which_is_built_before_jobs_start(
    kind, accelerator, locked, resolved, project
):
    found = environments.of(kind, resolved | {"accelerator": accelerator})
    assert found.python == f".envs/{locked}/bin/python"
    assert found.files == [f".envs/{locked}.json"]
    assert (project / "envs" / f"{locked}.txt").exists()


def test_an_environment_of_the_users_is_activated_and_nothing_is_built_for_it(resolved):
    own = {"python": "/site/python", "activate": "module load cuda", "cuda_compat": "/compat"}
    resolved["envs"]["train"] = own
    found = environments.of("train", resolved)
    assert (found.python, found.files) == ("/site/python", [])
    assert found.activate == "module load cuda && export LD_LIBRARY_PATH=/compat${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"


def test_what_runs_from_the_nodes_disks_needs_its_archive_too(resolved):
    resolved["envs"]["local"] |= {"train": "tar", "folder": "/scratch"}
    found = environments.of("train", resolved)
    assert found.files == [f".envs/{found.locked}.json", f".envs/{found.locked}.tar"]
    assert found.python.startswith("/scratch/") and "--archive" in found.words()


def test_the_workflows_own_is_the_python_that_runs():
    assert environments.of("workflow", {}).python == sys.executable
