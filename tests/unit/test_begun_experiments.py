"""An update leaves experiments alone that were begun before it: params of rules, run ids and sbatch scripts stay."""

import contextlib
import dataclasses
import difflib
import importlib.util
import json
import shlex
import sys
from pathlib import Path

import pytest
import yaml

from deepseek_sft import config as configuration
from deepseek_sft.experiment import Experiment
from deepseek_sft.preflight import settings as preflight_settings
from deepseek_sft.serving import settings as serving_settings
from deepseek_sft.slurm import profile_values, snakemake_resources
from deepseek_sft.slurm.sbatch import Allocation
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
# Against which scripts the differences stand, so that a changed template renews those alone.
AGAINST = {
    "preflight": "preflight.slurm",
    "rehearse": "rehearse.slurm",
    "train": "train.slurm",
    "smoke_test": "smoke_test.bf16-4x8",
    "serve": "serve.bf16-4x8",
}
NODES_OF = {"preflight": "train", "rehearse": "train", "serve": "smoke_test"}


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


def overlay_of(name: str) -> dict:
    return OWN if name == "own" else yaml.safe_load((PROJECT / "config/experiments" / name).read_text())


def kept_params(name: str) -> dict:
    return json.loads((GOLDEN / f"{name.replace('/', '.').removesuffix('.yaml')}.json").read_text())


def tokens_made_unpacked(overlay: dict) -> None:
    """What an experiment has, begun before ``data.pack: auto``, in the current folder."""
    folder = Path("results", overlay["experiment"], "data/tokens")
    folder.mkdir(parents=True)
    (folder / "tokens.json").write_text('{"format": 1, "shards": [], "rows": 0, "packed": false}')


@pytest.mark.parametrize("name", [*EXPERIMENTS, "own"])
def test_params_and_run_id_of_a_begun_experiment_stay(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    overlay = overlay_of(name)
    tokens_made_unpacked(overlay)
    assert what_is_kept(experiment_of(overlay), tmp_path) == kept_params(name)


@pytest.mark.parametrize("name", [*EXPERIMENTS, "own"])
def test_a_new_experiment_packs_unless_it_says_otherwise(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    new, before = what_is_kept(experiment_of(overlay_of(name)), tmp_path), kept_params(name)
    if overlay_of(name).get("data", {}).get("pack") is False:
        assert new == before
        return
    assert new["tokenize_data"] == before["tokenize_data"] + " --pack"
    assert new["train"] == before["train"] | {"accumulate_by": "samples", "experts_per_shard": "auto"}
    assert new["run_id"] != before["run_id"]
    assert {rule for rule in new if new[rule] != before[rule]} == {
        *("tokenize_data", "plan", "refine_plan", "train", "run_id")
    }


@pytest.mark.parametrize(
    ("kept", "resolved"),
    [
        ({"settings": {"experts_per_shard": 4}}, 4),
        ({"settings": {"experts_per_shard": 16}, "stated": {"experts_per_shard": "auto"}}, "auto"),
        ({}, "auto"),
    ],
)
def test_a_begun_run_keeps_its_number_of_experts_a_shard(kept, resolved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = Path("results/own/train/runs/abc")
    run.mkdir(parents=True)
    (run / "settings.json").write_text(json.dumps(kept))
    found = experiment_of(OWN)
    assert json.loads(found.settings("train"))["experts_per_shard"] == resolved
    assert any("experts_per_shard" in note for note in found.notes) == (resolved != "auto")


@pytest.fixture(scope="module")
def render_sbatch():
    path = PROJECT / "workflow/scripts/render_sbatch.py"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(path.parent)
        spec = importlib.util.spec_from_file_location("render_sbatch", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


def allocation(name: str, stage: str) -> Allocation:
    """What the profile gives to a stage."""
    path = PROJECT / "profiles" / ("demo" if name == "demo.yaml" else "slurm") / "config.yaml"
    stated = yaml.safe_load(path.read_text())
    given = stated["set-resources"]
    found = stated["default-resources"] | given.get(NODES_OF.get(stage), {})
    if NODES_OF.get(stage) == "train":
        found |= {"runtime": 60, "slurm_extra": profile_values.with_option(found["slurm_extra"], "--signal", "")}
    found |= given.get(stage, {})
    return Allocation(**{snakemake_resources.FIELDS[key]: value for key, value in found.items()})


def scripts(name: str, overlay: dict, render_sbatch, folder: Path, stages=tuple(AGAINST)) -> dict[str, list[str]]:
    """Stage → lines of its script, of the profile that goes with the experiment ``name``."""
    experiment, found = experiment_of(overlay), {}
    for stage in stages:
        command = (
            f"{stage} --output {folder} {experiment.render_arguments(stage)} {allocation(name, stage).arguments()}"
        )
        settings = ["--settings", experiment.settings(stage), "--operational", experiment.operational(stage)]
        with pytest.MonkeyPatch.context() as patch, contextlib.chdir(folder):
            patch.setattr(render_sbatch, "PROJECT", Path("/shared/project with space"))
            patch.setattr(sys, "argv", ["render_sbatch.py", *shlex.split(command), *settings])
            render_sbatch.main()
        found[stage] = (folder / f"{stage}.sbatch").read_text().splitlines()
    return found


READERS = {
    "preflight": preflight_settings.read,
    "rehearse": settings.read,
    "train": settings.read,
    "smoke_test": serving_settings.read,
    "serve": serving_settings.read,
}


@pytest.mark.parametrize("stage", READERS)
def test_rendered_settings_are_those_that_the_stage_reads(stage, render_sbatch, tmp_path):
    """With every operational key away from its default that rendering must take out."""
    (tmp_path / "secrets").touch()
    train = {"spare_nodes": 2, "secrets_file": str(tmp_path / "secrets"), "environment": {"A": "b"}}
    scripts("own", configuration.merge(OWN, {"train": train}), render_sbatch, tmp_path, (stage,))
    READERS[stage](tmp_path / "settings.json")


def differences(name: str, render_sbatch, folder: Path) -> str:
    """Lines in which scripts differ: the own experiment's from golden ones, others from the own's of the same name."""
    if name == "own":
        reference = {stage: golden(stage) for stage in AGAINST}
        rendered = scripts(name, OWN, render_sbatch, folder)
    else:
        overlay = yaml.safe_load((PROJECT / "config/experiments" / name).read_text())
        reference = scripts("own", OWN | {"experiment": overlay["experiment"]}, render_sbatch, folder)
        rendered = scripts(name, overlay, render_sbatch, folder)
    found = []
    for stage, script in rendered.items():
        lines = list(difflib.unified_diff(reference[stage], script, n=0, lineterm=""))[2:]
        found += [f"==== {stage}", *(line for line in lines if not line.startswith("@@"))]
    return "\n".join(found) + "\n"


def golden(stage: str) -> list[str]:
    return (GOLDEN.parent / f"{AGAINST[stage]}.sbatch").read_text().splitlines()


def golden_file(name: str) -> Path:
    return GOLDEN.parent / "scripts" / f"{name.replace('/', '.').removesuffix('.yaml')}.diff"


@pytest.mark.parametrize("name", [*EXPERIMENTS, "own"])
def test_sbatch_scripts_of_a_begun_experiment_stay(name, render_sbatch, tmp_path):
    assert differences(name, render_sbatch, tmp_path) == golden_file(name).read_text()
