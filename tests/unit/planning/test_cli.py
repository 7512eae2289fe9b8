"""plan.py as a person uses it, and what the rules are given."""

import dataclasses
import json
import subprocess
import sys

import planning_models as models
import pytest
import yaml
from planning_plans import published

from deepseek_sft import config as configuration
from deepseek_sft.errors import GateError
from deepseek_sft.experiment import Experiment
from deepseek_sft.planning import plan as planning
from deepseek_sft.planning.advice import notes
from deepseek_sft.planning.checkpoint_cost import young_daly

RESOURCES = '{{"nodes": {}, "gres": "gpu:8", "mem_mb": 1900000, "runtime": 5760}}'
ROWS = {  # overlay → (nodes, fits)
    f"{n}n-sp{sp}-{strategy.replace('_', '-')}-mb{mb}": (n, fits) for n, sp, strategy, mb, fits in models.PUBLISHED
}


@pytest.fixture
def base(tmp_path):
    """An overlay that names a base with DeepSeek-V3's config.json and nothing else."""
    (tmp_path / "v3").mkdir()
    (tmp_path / "v3/config.json").write_text(json.dumps(models.DEEPSEEK_V3))
    (tmp_path / "base.yaml").write_text(yaml.safe_dump({"model": {"base": str(tmp_path / "v3")}}))
    return tmp_path / "base.yaml"


@pytest.fixture
def plan(project):
    def run(*arguments, overlays=()):
        files = [project / "config/config.yaml", *overlays]
        command = [sys.executable, project / "workflow/scripts/plan.py", "--config", *files, *arguments]
        return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)

    return run


@pytest.mark.parametrize("row", ROWS)
def test_overlay_of_a_published_row_gets_its_verdict_and_exit_code(project, plan, base, row):
    nodes, fits = ROWS[row]
    overlay = project / f"config/experiments/published/{row}.yaml"
    done = plan("--resources", RESOURCES.format(nodes), "--json", overlays=[overlay, base])
    assert done.returncode == (0 if fits else 3), done.stderr
    assert (json.loads(done.stdout)["verdict"] != "does not fit") == fits
    assert fits or "GPU memory per rank" in done.stderr
    assert "Traceback" not in done.stderr


def test_all_published_rows_share_one_plan_section(project):
    found = [yaml.safe_load(p.read_text())["plan"] for p in (project / "config/experiments/published").glob("*.yaml")]
    assert len(found) == 8
    assert all(section == found[0] for section in found)


def test_recommended_run_prints_as_its_golden_file(project, plan, base):
    """A wanted change: print it anew and read the difference."""
    estimate = ["--samples", "100000", "--mean-length", "8000"]
    overlay = base.with_name("disk.yaml")
    overlay.write_text("plan: {storage_tb: 100}")
    done = plan("--resources", RESOURCES.format(32), "--explain", *estimate, overlays=[base, overlay])
    assert done.returncode == 0, done.stderr
    assert done.stdout == (project / "tests/golden/plan.txt").read_text()


def test_sweep_recommends_the_published_run_and_marks_what_does_not_fit(plan, base):
    sweep = ["nodes=32", "sequence_parallel=1,4,8", "micro_batch=1,2", "strategy=zero3,zero3_offload"]
    overlay = base.with_name("disk.yaml")
    overlay.write_text("plan: {storage_tb: 100, mean_length: 8000, stock_experts: true}")
    done = plan("--resources", RESOURCES.format(32), "--sweep", *sweep, overlays=[base, overlay])
    assert done.returncode == 0, done.stderr
    (best,) = [line.split() for line in done.stdout.splitlines() if " * " in line]
    assert best[:4] == ["32", "4", "2", "zero3_offload"]
    assert done.stdout.count("does not fit") == 8


def test_a_sweep_over_expert_parallel_sizes_fits_the_shards_to_each_and_says_what_it_leaves_out(plan, base):
    overlay = base.with_name("stated.yaml")
    overlay.write_text("plan: {storage_tb: 100, mean_length: 8000}\ntrain: {experts_per_shard: 16}")
    words = ["--resources", RESOURCES.format(32), "--sweep", "expert_parallel=1,8,48,64"]
    done = plan(*words, overlays=[base, overlay])
    assert done.returncode == 0, done.stderr
    head, *rows = [line.split() for line in done.stdout.splitlines()]
    assert head[:2] == ["expert_parallel", "experts_per_shard"]
    assert [row[:2] for row in rows[:-1]] == [["1", "16"], ["8", "16"], ["64", "4"]]
    assert "left out: expert_parallel=48 experts_per_shard=16: train.expert_parallel_size 48 does not" in done.stderr


def test_fit_names_the_fewest_nodes(plan, base):
    overlay = base.with_name("disk.yaml")
    overlay.write_text("plan: {storage_tb: 100}")
    done = plan("--resources", RESOURCES.format(1), "--fit", "--json", overlays=[base, overlay])
    nodes = json.loads(done.stdout)["nodes"]
    assert done.returncode == 0 and f"fewest nodes: {nodes}" in done.stderr
    assert 8 <= nodes <= 16  # host memory of the optimizer


def test_profile_that_gives_too_little_memory_is_told_the_line_to_write(plan, base):
    overlay = base.with_name("disk.yaml")
    overlay.write_text("plan: {storage_tb: 100}")
    little = '{"nodes": 32, "gres": "gpu:8", "mem_mb": 200000}'
    done = plan("--resources", little, overlays=[base, overlay])
    assert done.returncode == 3
    assert "mem_mb: 539000" in done.stdout and "mem_mb: 539000" in done.stderr


def test_misfit_warns_where_the_configuration_says_so(project, plan, base):
    overlay = base.with_name("warn.yaml")
    overlay.write_text("plan: {on_misfit: warn, storage_tb: 100}\ntrain: {strategy: zero3}")
    done = plan("--resources", RESOURCES.format(32), overlays=[base, overlay])
    assert done.returncode == 0
    assert "warning: the plan does not fit: GPU memory per rank" in done.stderr
    assert "nearest that fits: train.strategy: zero3_offload" in done.stdout


def test_demo_fits_from_its_sizes_alone_and_leaves_a_receipt(project, plan, tmp_path):
    overlays = [project / "config/experiments/demo.yaml"]
    receipt = tmp_path / "receipts/plan.json"
    done = plan("--output", tmp_path / "plan", "--receipt", receipt, overlays=overlays)
    assert done.returncode == 0, done.stderr
    figures = json.loads(receipt.read_text())["figures"]
    assert figures["verdict"] == "fits"
    assert json.loads((tmp_path / "plan/plan.json").read_text()) == figures
    assert figures["checkpoint_bytes"] == pytest.approx(215_272_428, rel=0.01)  # as a run wrote it


def test_moonlight_overlay_fits_one_node(project, plan, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(models.MOONLIGHT_16B))
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text(yaml.safe_dump({"model": {"base": str(tmp_path)}, "plan": {"storage_tb": 10}}))
    done = plan(
        *("--resources", '{"nodes": 1, "gres": "gpu:8"}', "--json"),
        overlays=[project / "config/experiments/moonlight-16b.yaml", overlay],
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["gpu_hours"][0] > 0


def test_price_of_a_gpu_hour_gives_the_cost(project, plan, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(models.MOONLIGHT_16B))
    overlay = tmp_path / "overlay.yaml"
    priced = {"storage_tb": 10, "price_per_gpu_hour": 2.5}
    overlay.write_text(yaml.safe_dump({"model": {"base": str(tmp_path)}, "plan": priced}))
    overlays = [project / "config/experiments/moonlight-16b.yaml", overlay]
    arguments = ("--resources", '{"nodes": 1, "gres": "gpu:8"}')
    found = json.loads(plan(*arguments, "--json", overlays=overlays).stdout)
    assert found["cost"] == pytest.approx([hours * 2.5 for hours in found["gpu_hours"]], abs=1)
    assert " at 2.5 an hour" in plan(*arguments, overlays=overlays).stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--sweep", "nods=1"], "nods=1"),
        (["--sweep", "strategy=zero9"], "zero9 is not allowed"),
        (["--resources", "{"], "not the JSON object"),
        (["--resources", '{"node": 1}'], "unknown node"),
        (["--resources", "{}"], "number of GPUs per node is not known"),
    ],
)
def test_bad_input_is_told_in_one_message(plan, base, arguments, words):
    done = plan(*["--resources", '{"gres": "gpu:8"}'], *arguments, overlays=[base])
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_published_step_time_lies_in_the_planned_range():
    # Their rows were up to 32,768 tokens long, in the order of the data; the mean is not known.
    step = published(32, 4, "zero3_offload", 2, longest_row=32_768).duration.step
    assert step.fastest < 420 and step.slowest > 480
    assert step.slowest <= 2 * step.fastest


def test_cadence_is_youngs_for_short_saves_and_never_beyond_the_failures():
    assert young_daly(1, 1e6) == pytest.approx((2 * 1e6) ** 0.5, rel=0.01)
    assert young_daly(600, 8 * 86400) / 3600 == pytest.approx(8, rel=0.02)
    assert young_daly(300, 100) == 100


def test_cadence_is_noted_only_where_it_is_far_from_the_best():
    found = published(32, 4, "zero3_offload", 2)
    assert not [note for note in notes(found) if "loses the least time" in note]
    rare = dataclasses.replace(found.training, save_every_steps=10_000, epochs=9)
    assert [note for note in notes(with_training(found, rare)) if "loses the least time" in note]
    # What the minutes make of it counts.
    often = dataclasses.replace(rare, save_every_minutes=found.duration.cadence_s / 60)
    assert not [note for note in notes(with_training(found, often)) if "loses the least time" in note]
    assert with_training(found, often).duration.run.slowest > with_training(found, rare).duration.run.slowest


def with_training(plan, training):
    return planning.make(plan.model, training, plan.samples, plan.cluster)


def test_full_disk_is_not_answered_with_nodes_and_settings_of_training(plan, base):
    overlay = base.with_name("disk.yaml")
    overlay.write_text("plan: {storage_tb: 1}")
    for words in ([], ["--fit"], ["--sweep", "nodes=32,64"]):
        done = plan("--resources", RESOURCES.format(32), *words, overlays=[base, overlay])
        assert done.returncode == 3
        assert "lay `results` on a file system with" in done.stderr
        assert "zero3_offload" not in done.stderr


def test_operational_settings_and_learning_rate_do_not_reach_the_plans_params(project):
    def settings(**train):
        config = yaml.safe_load((project / "config/config.yaml").read_text())
        config["train"] |= train
        return Experiment.from_config(config).settings("plan")

    assert settings() == settings(learning_rate=1e-3, save_every_steps=7, keep_checkpoints=9)
    assert settings() != settings(micro_batch_size=1)


def test_whatever_makes_the_refined_plan_again_trains_again(project):
    experiment = Experiment.from_config(yaml.safe_load((project / "config/config.yaml").read_text()))
    refined = json.loads(experiment.settings("refine_plan"))
    assert refined.keys() == {"train"}
    assert refined["train"].items() <= json.loads(experiment.settings("train")).items()


@pytest.mark.parametrize("rule", ["plan", "refine_plan"])
def test_rules_and_a_person_get_the_same_plan(project, plan, rule):
    overlays = [project / "config/experiments/demo.yaml"]
    config = {}
    for path in (project / "config/config.yaml", *overlays):
        config = configuration.merge(config, yaml.safe_load(path.read_text()))
    experiment = Experiment.from_config(config)
    script = project / "workflow/scripts/plan.py"
    options = ["--settings", experiment.settings(rule), "--operational", experiment.operational(rule), "--json"]
    done = subprocess.run([sys.executable, script, *options], capture_output=True, text=True, check=True)
    by_hand = json.loads(plan("--json", overlays=overlays).stdout)
    assert json.loads(done.stdout) | {"limits": 0} == by_hand | {"limits": 0}  # free space may change


def test_a_misfit_is_refused_before_any_job(project, base):
    config = configuration.merge(
        yaml.safe_load((project / "config/config.yaml").read_text()), yaml.safe_load(base.read_text())
    )
    config |= {"plan": {"storage_tb": 100}}
    resources = json.loads(RESOURCES.format(32))
    Experiment.from_config(config).check_plan(resources, tokens_are_current=False)
    config["train"]["strategy"] = "zero3"
    with pytest.raises(GateError, match="does not fit: GPU memory per rank"):
        Experiment.from_config(config).check_plan(resources, tokens_are_current=False)
    config["plan"]["on_misfit"] = "warn"
    Experiment.from_config(config).check_plan(resources, tokens_are_current=False)
