"""What the rules are given, and which change of the configuration changes it."""

import shlex
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from deepseek_sft import rule_settings
from deepseek_sft.errors import BadInputError, GateError
from deepseek_sft.experiment import Experiment
from deepseek_sft.slurm.sbatch import Allocation

PROJECT = Path(__file__).resolve().parents[2]


def demo(**changes) -> Experiment:
    """The demo experiment with changes given as section={key: value}."""
    config = yaml.safe_load((PROJECT / "config/config.yaml").read_text())
    overlays = [yaml.safe_load((PROJECT / "config/experiments/demo.yaml").read_text()), changes]
    for overlay in overlays:
        for key, value in overlay.items():
            if isinstance(value, dict):
                config[key] = config.get(key, {}) | value
            else:
                config[key] = value
    return Experiment.from_config(config)


def what_rules_see(experiment: Experiment) -> dict[str, str]:
    rules = ("prepare_data", "tokenize_data", "prepare_model", "convert_checkpoint", "verify_model")
    return {rule: experiment.arguments(rule) for rule in rules} | {
        rule: experiment.settings(rule) for rule in ("train", "smoke_test")
    }


def changed(**changes) -> set[str]:
    before, after = what_rules_see(demo()), what_rules_see(demo(**changes))
    return {rule for rule in before if before[rule] != after[rule]}


def test_learning_rate_changes_train_alone():
    assert changed(train={"learning_rate": 1e-4}) == {"train"}


def test_an_early_end_trains_on_when_it_moves():
    assert changed(train={"max_hours": 3}) == {"train"}


def test_smoke_test_settings_change_smoke_test_alone():
    assert changed(smoke_test={"min_format_rate": 0.5}) == {"smoke_test"}


def test_max_length_changes_tokenize_data_alone():
    assert changed(data={"max_length": 64}) == {"tokenize_data"}


def test_packing_changes_tokenize_data_and_what_accumulation_counts():
    assert changed(data={"pack": True}) == {"tokenize_data", "train"}
    assert changed(data={"pack": True}, train=demo().config["train"] | {"accumulate_by": "rows"}) == {"tokenize_data"}
    assert demo(data={"pack": True}).settings("plan") != demo().settings("plan")
    # Of unpacked rows each is a sample.
    assert changed(train=demo().config["train"] | {"accumulate_by": "rows"}) == set()


@pytest.mark.parametrize(
    ("change", "rules"),
    [
        ({"dtype": "fp32"}, {"convert_checkpoint", "verify_model"}),
        ({"dtype": "fp8"}, {"convert_checkpoint", "verify_model"}),
        ({"mtp": "copy"}, {"convert_checkpoint", "verify_model"}),
        ({"max_shard_size": "base"}, {"convert_checkpoint"}),
    ],
)
def test_format_of_the_served_model_changes_conversion_and_its_check_and_trains_nothing_again(change, rules):
    official = {"accelerator": "cuda", "model": {"base": "base", "tiny": None}, "train": {"ranks_per_node": None}}
    before, after = what_rules_see(demo(**official)), what_rules_see(demo(**official, convert=change))
    assert {rule for rule in before if before[rule] != after[rule]} == rules


def test_conversion_and_its_check_are_given_the_same_format():
    experiment = demo(convert={"dtype": "fp32"})
    wanted = experiment.arguments("verify_model")
    assert wanted == "--dtype fp32 --mtp drop"
    assert wanted in experiment.arguments("convert_checkpoint")


def test_bandwidth_floor_follows_from_the_planned_network_on_gpus_alone():
    cuda = {"accelerator": "cuda", "train": {"ranks_per_node": None}, "plan": {"node_gb_per_second": 200}}
    plain = rule_settings.preflight(demo(**cuda))[0]
    assert plain["all_reduce_min_gb_per_second"] == 80
    stated = rule_settings.preflight(demo(**cuda, preflight={"all_reduce_min_gb_per_second": 7}))[0]
    assert stated["all_reduce_min_gb_per_second"] == 7
    assert rule_settings.preflight(demo())[0]["all_reduce_min_gb_per_second"] is None


def test_preflight_is_a_step_of_training_unless_switched_off():
    assert "--preflight" in demo().render_arguments("train")
    assert "--preflight" not in demo(preflight={"in_training": False}).render_arguments("train")


@pytest.mark.parametrize(
    ("section", "change"),
    [
        ("train", {"save_every_steps": 7, "keep_checkpoints": 5, "log_every_steps": 3, "first_loss_max": None}),
        ("train", {"environment": {"NCCL_DEBUG": "INFO"}}),
        ("train", {"save_every_minutes": 30, "on_not_finite": "skip", "spike_factor": 5, "on_spike": "stop"}),
        ("train", {"hang_minutes": {"step": 5}}),
        ("preflight", {"skip": ["clock"], "in_training": False}),
        ("convert", {"memory": "2GB", "swap": True, "workers": 1, "full_check": True}),
        ("serve", {"ready_timeout_s": 5, "stop_grace_s": 1}),
    ],
)
def test_operational_keys_change_nothing(section, change):
    assert changed(**{section: change}) == set()


def test_key_order_changes_nothing():
    first = demo(train={"learning_rate": 1e-3, "seed": 3})
    second = demo(train={"seed": 3, "learning_rate": 1e-3})
    assert what_rules_see(first) == what_rules_see(second)


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=20))
def test_a_path_of_any_characters_stays_one_argument(name):
    import shlex

    arguments = shlex.split(demo(data={"sources": [f"folder/{name}"]}).arguments("prepare_data"))
    assert f"folder/{name}" in arguments


def test_written_configuration_resolves_to_itself(tmp_path):
    experiment = demo(results=str(tmp_path))
    experiment.write_config()
    written = yaml.safe_load((tmp_path / "demo" / "config.yaml").read_text())
    assert Experiment.from_config(written) == experiment


def test_missing_source_is_named_with_its_nearest_neighbour():
    with pytest.raises(BadInputError) as error:
        demo(data={"sources": ["config/confg.yaml"]}).check_external_paths(["prepare_data"])
    assert "data.sources[0]: config/confg.yaml does not exist" in str(error.value)
    assert "did you mean config/config.yaml" in str(error.value)


def test_missing_path_of_a_rule_that_does_not_run_is_no_error():
    demo(data={"sources": ["nowhere.jsonl"]}).check_external_paths(["smoke_test"])


def test_format_prefix_is_not_part_of_a_source_path():
    experiment = demo(data={"sources": ["openai=config/config.yaml"]})
    assert experiment.missing_paths(["prepare_data"]) == []
    assert experiment.state_of_sources()[0].startswith("config/config.yaml: ")


def test_meanings_of_fields_reach_prepare_data_where_they_are_not_the_default():
    data = {"fields": {"mask": "not loss", "a b": "ignore"}, "unused_fields": "fail", "on_empty_source": "fail"}
    words = shlex.split(demo(data=data).arguments("prepare_data"))
    assert words[words.index("--fields") :] == [
        "--fields", "mask=not loss", "a b=ignore", "--unused-fields", "fail", "--on-empty-source", "fail",
    ]  # fmt: skip
    plain = shlex.split(demo().arguments("prepare_data"))
    assert not {"--fields", "--unused-fields", "--on-empty-source"} & set(plain)
    with pytest.raises(BadInputError, match=r"data\.fields\.mask: 'no' is not allowed"):
        demo(data={"fields": {"mask": "no"}})


def test_path_with_an_equals_sign_is_looked_for_as_it_stands():
    missing = demo(data={"sources": ["split=train/a.jsonl"]}).missing_paths(["prepare_data"])
    assert missing[0].startswith("data.sources[0]: split=train/a.jsonl does not exist")


def test_source_with_format_and_weight_reaches_prepare_data():
    sources = ["a.jsonl", {"path": "b.jsonl", "format": "s1k-1.1", "weight": 2.5}, {"path": "c=d.jsonl"}]
    experiment = demo(data={"sources": sources})
    words = experiment.arguments("prepare_data").split()
    assert words[:8] == [
        "--source", "a.jsonl", "s1k-1.1=b.jsonl", "auto=c=d.jsonl", "--weights", "1", "2.5", "1",
    ]  # fmt: skip
    assert [state.partition(":")[0] for state in experiment.missing_paths(["prepare_data"])] == [
        "data.sources[0]", "data.sources[1]", "data.sources[2]",
    ]  # fmt: skip
    assert "b.jsonl" in experiment.missing_paths(["prepare_data"])[1]


def test_sources_without_weights_give_the_arguments_of_plain_ones():
    plain, mapped = demo(data={"sources": ["auto=a.jsonl"]}), demo(data={"sources": [{"path": "a.jsonl", "weight": 1}]})
    assert plain.arguments("prepare_data") == mapped.arguments("prepare_data")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ({"path": "a.jsonl", "weight": 0}, "weight"),
        ({"path": "a.jsonl", "wieght": 2}, "did you mean `weight`"),
        ({"weight": 2}, "`path` is missing"),
        (7, "sources.0"),
    ],
)
def test_wrong_source_is_refused_with_the_key(source, words):
    with pytest.raises(BadInputError, match=words):
        demo(data={"sources": [source]})


def test_configured_environment_replaces_the_locked_one():
    experiment = demo(envs={"train": {"python": "/opt/site/bin/python", "activate": "module load cuda"}})
    assert experiment.environment("train").python == "/opt/site/bin/python"
    assert experiment.environment("train").activate == "module load cuda"
    assert experiment.environment("train").built == []
    assert experiment.environment("serve").built == [".envs/serve-cpu.json"]


def production(**serve) -> Experiment:
    config = yaml.safe_load((PROJECT / "config/config.yaml").read_text())
    config["serve"] |= serve
    return Experiment.from_config(config)


def test_published_shape_fits():
    shapes = {"train": Allocation(nodes=32, gres="gpu:8"), "smoke_test": Allocation(nodes=4, gres="gpu:h100:8")}
    production().check_shapes(shapes)


@pytest.mark.parametrize(
    ("train", "serve", "words"),
    [
        (Allocation(nodes=32, gres="gpu:6"), Allocation(nodes=4, gres="gpu:8"), "does not divide the 6 GPUs"),
        (Allocation(nodes=32, gres="gpu:8"), Allocation(nodes=3, gres="gpu:8"), "spread evenly over the 3 nodes"),
        (Allocation(nodes=32, gres="gpu:8"), Allocation(nodes=2, gres="gpu:8"), "needs 16 GPUs on each of 2 nodes"),
    ],
)
def test_shape_that_cannot_work_is_refused(train, serve, words):
    with pytest.raises(BadInputError, match=words):
        production().check_shapes({"train": train, "smoke_test": serve})


def test_replicas_are_spread_over_the_nodes_of_the_profile():
    replicas = production(pipeline_parallel_size=1, data_parallel_size=4, expert_parallel=True)
    replicas.check_shapes({"smoke_test": Allocation(nodes=4, gres="gpu:8")})
    with pytest.raises(BadInputError, match=r"data_parallel_size 4 = 32 cannot be spread evenly over the 3 nodes"):
        replicas.check_shapes({"smoke_test": Allocation(nodes=3, gres="gpu:8")})
    with pytest.raises(BadInputError, match=r"smoke_test: nodes: 4 in the profile"):
        replicas.check_shapes({"smoke_test": Allocation(nodes=2, gres="gpu:8")})
    with pytest.raises(BadInputError, match="with whole replicas of 8 on a node or whole nodes for each"):
        production(pipeline_parallel_size=1, data_parallel_size=3).check_shapes(
            {"smoke_test": Allocation(nodes=2, gres="gpu:16")}
        )


def test_a_deployment_that_the_gpus_cannot_hold_is_refused_before_training():
    def deployed(**serve) -> Experiment:
        experiment = production(**serve)
        experiment.config["plan"]["model"] = "deepseek-r1"
        return experiment

    deployed().check_deployment(Allocation(nodes=4, gres="gpu:8"))
    small = deployed(pipeline_parallel_size=2)
    with pytest.raises(GateError, match="and vLLM may use"):
        small.check_deployment(Allocation(nodes=2, gres="gpu:8"))
    small.config["plan"]["on_misfit"] = "warn"
    small.check_deployment(Allocation(nodes=2, gres="gpu:8"))


def test_a_preflight_job_that_ends_before_its_measurement_is_refused_with_the_minutes_it_needs():
    production().check_shapes({"preflight": Allocation(nodes=32, gres="gpu:8", runtime=60)})
    with pytest.raises(BadInputError, match=r"256 ranks may take 14 to import torch[^\n]*\n.*runtime: 22 in"):
        production().check_shapes({"preflight": Allocation(nodes=32, gres="gpu:8", runtime=10)})


def test_spare_nodes_need_preflight_to_choose_them():
    with pytest.raises(BadInputError, match="spare_nodes: preflight chooses among the nodes"):
        demo(train={"spare_nodes": 2}, preflight={"in_training": False})
    assert changed(train={"spare_nodes": 2, "slow_rank_percent": 5}) == set()


@pytest.mark.parametrize(
    ("rule", "section"), [("train", "train"), ("rehearse", "train"), ("smoke_test", "serve"), ("serve", "serve")]
)
def test_a_missing_secrets_file_is_named_before_the_stage_that_reads_it_starts(rule, section, tmp_path):
    with pytest.raises(BadInputError, match="absent"):
        demo(**{section: {"secrets_file": str(tmp_path / "absent")}}).check_external_paths([rule])
