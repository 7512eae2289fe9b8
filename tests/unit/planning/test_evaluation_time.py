"""What a plan says of an evaluation: time by items, answers, tokens and the deployment; GPU hours and their cost."""

import dataclasses
import json
import subprocess
import sys

import pytest
import yaml
from planning_plans import _counted, cluster

from deepseek_sft import config as configuration
from deepseek_sft.experiment import Experiment
from deepseek_sft.planning import deployment, evaluation_time
from deepseek_sft.planning.evaluation_time import FASTEST, SLOWEST
from deepseek_sft.planning.settings import GIB, Samples
from deepseek_sft.report import cost
from deepseek_sft.report.collect import Stage
from deepseek_sft.settings import reading
from deepseek_sft.settings.evaluate import Evaluate
from deepseek_sft.settings.serve import Serve

SAMPLES = Samples(100_000, 6_000, 16_384, "counted", per_row=3.0)  # 2,000 tokens each
V3, GPUS = _counted("DEEPSEEK_V3"), cluster(2, gpu="h200", gpu_bytes=139.7 * GIB)


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "items.jsonl"
    path.write_text('{"id": 1}\n\n' + '{"id": 2}\n' * 99)
    return str(path)


def served(dtype="fp8", **sizes) -> deployment.Deployment:
    chosen = reading.parse(Serve, {"tensor_parallel_size": 8, "pipeline_parallel_size": 1} | sizes, "serve")
    return deployment.plan(V3, chosen, dtype, 139.7 * GIB, 8)


def planned(tasks, where=GPUS, concurrency=32, **sizes):
    """Stages by rule."""
    evaluate = reading.parse(Evaluate, {"tasks": tasks, "concurrency": concurrency}, "evaluate")
    base = served(**{"pipeline_parallel_size": 2} | sizes)
    return {one.rule: one for one in evaluation_time.plan(V3, where, SAMPLES, evaluate, served(**sizes), base)}


def test_an_answer_is_between_a_samples_length_and_its_budget(data):
    (long,) = planned({"a": {"data": data, "max_tokens": 8192}})["evaluate"].asked
    assert (long.items, long.tokens) == (100, (2000, 8192))
    (short,) = planned({"a": {"data": data, "max_tokens": 512}})["evaluate"].asked
    assert short.tokens == (512, 512) and short.seconds[1] > short.seconds[0]


def test_time_is_items_by_answers_by_tokens_at_the_speed_of_decoding(data):
    task = {"data": data, "max_tokens": 2000, "samples": 4, "temperature": 0.6}
    (found,) = planned({"a": task})["evaluate"].asked
    for seconds, speed in zip(found.seconds, (FASTEST, SLOWEST), strict=True):
        step = evaluation_time.step_seconds(V3, GPUS, served(), 32, 2000, speed)
        assert seconds == pytest.approx(400 * 2000 / 32 * step)
    (one_each,) = planned({"a": task | {"samples": 1}})["evaluate"].asked
    assert found.seconds == pytest.approx([4 * seconds for seconds in one_each.seconds])


def test_what_is_asked_all_at_once_takes_as_long_as_one_answer(data):
    (found,) = planned({"a": {"data": data, "max_tokens": 2000}}, concurrency=1000)["evaluate"].asked
    assert found.seconds[0] == pytest.approx(
        2000 * evaluation_time.step_seconds(V3, GPUS, served(), 100, 2000, FASTEST)
    )


def test_contexts_that_the_cache_does_not_hold_wait(data):
    short_of_cache = dataclasses.replace(served(), gpu_bytes=100 * GIB)
    assert 0 < short_of_cache.cached_tokens < served().cached_tokens
    evaluate = reading.parse(Evaluate, {"tasks": {"a": {"data": data, "max_tokens": 65_536}}}, "evaluate")
    seconds = [
        evaluation_time.plan(V3, GPUS, SAMPLES, evaluate, one, one)[0].seconds[1] for one in (served(), short_of_cache)
    ]
    at_once = short_of_cache.cached_tokens // 65_536
    assert at_once < 32
    step = evaluation_time.step_seconds(V3, GPUS, short_of_cache, at_once, 65_536, SLOWEST)
    assert seconds[1] == pytest.approx(100 * 65_536 / at_once * step) and seconds[1] > seconds[0]


def test_a_step_reads_the_experts_that_its_tokens_choose_and_the_faster_memory_the_sooner():
    def step(at_once, gpu="h200"):
        where = dataclasses.replace(GPUS, gpu=gpu)
        return evaluation_time.step_seconds(V3, where, served(), at_once, 2000, FASTEST)

    assert step(1) < step(32) < 32 * step(1)
    assert step(32, "b200") < step(32) < step(32, "h100")


def test_the_base_is_planned_where_a_gate_compares_with_it_and_is_loaded_for_that(data):
    assert planned({"a": {"data": data}}).keys() == {"evaluate"}
    found = planned({"a": {"data": data, "max_drop": 0.1}})
    assert found["evaluate"].loading == 0, "the smoke test's job has it loaded"
    base = found["evaluate_base"]
    assert base.loading == pytest.approx(served(pipeline_parallel_size=2).node_reads * 2 / 20e9)
    assert base.seconds[0] == pytest.approx(base.loading + base.asked[0].seconds[0])
    assert base.gpu_hours[0] == pytest.approx(base.seconds[0] * 16 / 3600)
    assert planned({}) == {}


def test_items_that_lm_eval_alone_knows_are_told_apart_and_in_no_sum(data):
    tasks = {"mine": {"data": data}, "gsm8k": {"lm_eval": "gsm8k.yaml"}}
    both, alone = planned(tasks), planned({"mine": {"data": data}})
    assert both["evaluate"].seconds == alone["evaluate"].seconds
    text = "\n".join(evaluation_time.lines(tuple(both.values()), None))
    assert "mine: 100 items × an answer of 2,000 to 4,096 tokens" in text
    assert "gsm8k: items of lm-eval, not counted below: 1,000 × an answer" in text
    figures = evaluation_time.figures(tuple(both.values()))["evaluate"]["tasks"]
    assert figures["gsm8k"]["items"] is None and figures["gsm8k"]["seconds_of_1000"][0] > 0


def test_the_plan_of_an_experiment_tells_its_evaluation_and_the_cost(project, data, tmp_path):
    """By a person and by the rule alike; tasks make no other plan."""
    config = yaml.safe_load((project / "config/config.yaml").read_text())
    mine = {
        "experiment": "mine",
        "data": {"sources": ["chats.jsonl"]},
        "model": {"base": str(project / "resources/models/deepseek-r1")},
        "plan": {"samples": 100_000, "storage_tb": 100, "price_per_gpu_hour": 2},
        "evaluate": {"tasks": {"a": {"data": data, "max_drop": 0.1}}},
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(mine))
    script = project / "workflow/scripts/plan.py"
    resources = ["--resources", '{"nodes": 32, "gres": "gpu:8", "mem_mb": 1900000}']
    experiment = Experiment.from_config(configuration.merge(config, mine))
    by_rule = ["--settings", experiment.settings("plan"), "--operational", experiment.operational("plan")]
    by_hand = ["--config", project / "config/config.yaml", tmp_path / "mine.yaml"]

    def run(*arguments):
        command = [sys.executable, script, *resources, *arguments]
        return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True).stdout

    figures = json.loads(run(*by_rule, "--json"))["evaluation"]
    assert figures == json.loads(run(*by_hand, "--json"))["evaluation"]
    assert figures.keys() == {"evaluate", "evaluate_base"}
    low, high = figures["evaluate"]["gpu_hours"]
    assert 0 < low < high
    text = run(*by_hand)
    assert "a: 100 items × an answer of 4,096 tokens" in text
    assert f"in the smoke test's job: {low:,.1f} to {high:,.1f} GPU hours, {2 * low:,.0f} to" in text
    without = configuration.merge(config, mine | {"evaluate": {"tasks": {}}})
    assert Experiment.from_config(without).settings("plan") == experiment.settings("plan")
    assert Experiment.from_config(without).settings("refine_plan") == experiment.settings("refine_plan")


def test_status_and_report_tell_what_the_evaluation_was_planned_with():
    stages = {rule: Stage(rule, "not run") for rule in ("plan", "train", "evaluate", "evaluate_base")}
    of_rule = {"evaluate": {"gpu_hours": [20.0, 60.0]}, "evaluate_base": {"gpu_hours": [30.0, 90.0]}}
    stages["plan"].receipt = {"figures": {"ranks": 64, "gpu_hours": [900.0, 1300.0], "evaluation": of_rule}}
    costs = cost.of(stages, [], {"accelerator": "cuda"}, None)
    assert {one.rule: one.planned for one in costs} == {
        "train": (900, 1300),
        "evaluate_base": (30, 90),
        "evaluate": (20, 60),
    }
    said = "training planned with 900 to 1,300; evaluation planned with 50 to 150"
    assert cost.sentence(costs, None) == said
    assert cost.sentence(costs, 2) == f"{said}; 1,900 to 2,900 at 2 an hour"
    spent = [dataclasses.replace(costs[0], spent=1000.0, attempts=1), *costs[1:]]
    rows = {row[0]: row for row in cost.grid(spent, None)[2]}
    assert rows["evaluate_base"] == ["evaluate_base", "30 to 90", "0", "0", ""]
