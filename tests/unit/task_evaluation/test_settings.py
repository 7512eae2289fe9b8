"""Section `evaluate`: what the documentation shows is taken, what could not run is refused at the start."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from docs_pages import blocks

from deepseek_sft import known_at_start
from deepseek_sft.errors import BadInputError
from deepseek_sft.experiment import Experiment
from deepseek_sft.settings import reading
from deepseek_sft.settings.evaluate import Evaluate
from deepseek_sft.task_evaluation import items

PROJECT = Path(__file__).resolve().parents[3]
SHOWN = [block.text for block in blocks(PROJECT / "docs/evaluation.md") if block.language in ("yaml", "json")]


def experiment(**evaluate: Any) -> Experiment:
    config = yaml.safe_load((PROJECT / "config/config.yaml").read_text())
    return Experiment.from_config(config | {"experiment": "x", "evaluate": evaluate})


def test_the_documented_configuration_is_taken():
    assert set(reading.parse(Evaluate, yaml.safe_load(SHOWN[0])["evaluate"], "page").tasks) == {"sums", "gsm8k"}


def test_the_documented_item_and_task_file_are_taken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("items.jsonl").write_text(SHOWN[1])
    data = Path(yaml.safe_load(SHOWN[2])["dataset_kwargs"]["data_files"]["test"])
    data.parent.mkdir(parents=True)
    data.write_bytes(b"")
    Path("task.yaml").write_text(SHOWN[2])
    tasks = {"own": {"data": "items.jsonl", "judge": "numeric"}, "file": {"lm_eval": "task.yaml"}}
    assert items.check(experiment(tasks=tasks).config["evaluate"]["tasks"]) == {"own": 1, "file": None}


def test_without_tasks_nothing_is_evaluated_and_no_stage_differs():
    plain = experiment()
    assert not plain.evaluated() and "evaluation" not in json.loads(plain.operational("smoke_test"))


def test_tasks_change_no_params_of_the_smoke_test_so_that_none_runs_again():
    tasks = {"sums": {"data": "x.jsonl"}}
    assert experiment(tasks=tasks).settings("smoke_test") == experiment().settings("smoke_test")
    assert "evaluation" in json.loads(experiment(tasks=tasks).operational("smoke_test"))


def test_gates_are_params_of_evaluate_and_not_of_its_base():
    one, two = ({"sums": {"data": "x.jsonl", "min": least}} for least in (0.1, 0.2))
    assert experiment(tasks=one).settings("evaluate") != experiment(tasks=two).settings("evaluate")
    assert experiment(tasks=one).settings("evaluate_base") == experiment(tasks=two).settings("evaluate_base")


@pytest.mark.parametrize(
    "evaluate, word",
    [
        ({"tasks": {"a b": {"data": "x"}}}, "a name has letters"),
        ({"tasks": {"sums": {"data": "x", "max_tokens": 32768}}}, "leaves no room for a prompt"),
        ({"tasks": {"sums": {"data": "x", "judge": "vibes"}}}, "evaluate.tasks.sums.judge"),
        ({"tasks": {"sums": {"data": "x", "mim": 0.5}}}, "mim"),
        ({"tasks": {"sums": {"data": "x", "samples": 4}}}, "evaluate.tasks.sums.samples: greedy answers"),
        ({"tasks": {"sums": {"data": "~/x"}}}, "begins with ~"),
    ],
)
def test_a_section_that_cannot_be_meant_is_refused_by_its_key(evaluate, word):
    with pytest.raises(BadInputError, match=word):
        experiment(**evaluate)


@pytest.mark.parametrize("rule", ["smoke_test", "evaluate", "evaluate_base"])
def test_a_missing_file_is_refused_before_any_job(rule):
    wanted = experiment(tasks={"sums": {"data": "/nowhere/x.jsonl"}})
    with pytest.raises(BadInputError, match=r"evaluate.tasks.sums.data: /nowhere/x.jsonl does not exist"):
        wanted.check_external_paths({rule})


def test_an_item_that_no_judge_can_judge_is_refused_before_any_job_and_warned_of_in_a_dry_run(tmp_path):
    file = tmp_path / "items.jsonl"
    file.write_text('{"id": "a", "messages": [{"role": "user", "content": "?"}], "answer": "none"}\n')
    wanted = experiment(tasks={"sums": {"data": str(file), "judge": "numeric"}})
    with pytest.raises(BadInputError, match="holds no number"):
        known_at_start.check_tasks(wanted)
    assert any("holds no number" in text for text in known_at_start.gate_warnings(wanted))
    known_at_start.check_tasks(wanted, {"train"})
