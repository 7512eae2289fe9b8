"""GPU hours and money: what was planned, spent and lost, stage by stage, from what the stages' attempts left."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from deepseek_sft.report import cost, slurm_jobs, status
from deepseek_sft.report.collect import Stage
from deepseek_sft.report.cost import Attempt, Cost
from deepseek_sft.training import gpu_hours

PROJECT = Path(__file__).resolve().parents[3]
CONFIG = {"accelerator": "cuda", "serve": {"tensor_parallel_size": 8, "pipeline_parallel_size": 2}}
HOUR = 3600


def attempts_of(logs: Path, rule: str, *lines: str) -> None:
    folder = logs / rule
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "attempts.tsv").write_text("".join(line.replace(" ", "\t") + "\n" for line in lines))


def stages(train: dict | None = None, plan: dict | None = None) -> dict[str, Stage]:
    found = {rule: Stage(rule, "not run") for rule in ("plan", "prepare_model", "train", "smoke_test")}
    found["plan"].receipt = {"figures": {"ranks": 64, "gpu_hours": [900.0, 1300.0]} if plan is None else plan}
    if train:
        found["train"].receipt = train
    return found


def steps(count: int, seconds: float) -> list[dict]:
    return [{"step": step, "seconds": seconds} for step in range(1, count + 1)]


def one(costs: list[Cost], rule: str) -> Cost:
    return next(found for found in costs if found.rule == rule)


def test_all_attempts_count_and_those_without_an_end_last_as_long_as_their_log(tmp_path):
    attempts_of(
        *(tmp_path, "train"),
        *("begin 7-1.log 1000 8 8", "begin 7-2.log 9000 8 8", "end 7-2.log 12600 0"),
    )
    (tmp_path / "train/7-1.log").write_text("killed")
    os.utime(tmp_path / "train/7-1.log", (8200, 8200))
    assert cost.attempts(tmp_path, "train") == [Attempt(7200, 64, None, False), Attempt(3600, 64, 0, True)]


@pytest.mark.parametrize("line", ["", "begin", "begin x y z 8", "end 7-1.log soon 0", "\x00", "begin 7-1.log 1000 8"])
def test_torn_line_is_passed_over(tmp_path, line):
    attempts_of(tmp_path, "train", "begin 7-9.log 1000 2 8", line, "end 7-9.log 4600 0")
    assert cost.attempts(tmp_path, "train") == [Attempt(3600, 16, 0, True)]


def test_training_loses_all_but_the_steps_that_count(tmp_path):
    attempts_of(
        tmp_path, "train", "begin 7-1.log 0 8 8", "end 7-1.log 7200 1", "begin 7-2.log 9000 8 8", "end 7-2.log 12600 0"
    )
    found = one(cost.of(stages({"figures": {"world_size": 64}}), steps(100, 90), CONFIG, tmp_path), "train")
    assert found == Cost("train", (900.0, 1300.0), 3 * 64, pytest.approx(3 * 64 - 2.5 * 64), 2)


def test_steps_between_logged_ones_count(tmp_path):
    attempts_of(tmp_path, "train", "begin 7-1.log 0 8 8", "end 7-1.log 3600 0")
    logged = [line for line in steps(100, 27) if line["step"] % 10 == 0]
    found = one(cost.of(stages({"figures": {"world_size": 64}}), logged, CONFIG, tmp_path), "train")
    assert found.lost == pytest.approx(64 - 100 * 27 * 64 / HOUR)


def test_lost_is_told_by_one_rule_in_cost_in_hours_and_in_status(tmp_path, monkeypatch):
    """Two starts on 64 GPUs: two hours of steps that count, half an hour trained again, half an hour of starting."""
    results, logs = tmp_path / "results/demo", tmp_path / "logs/demo"
    run = results / "train/runs/abc"
    run.mkdir(parents=True)
    before = {"ended": 5400, "steps": 1, "seconds": 1800.0, "seconds_save": 0.0, "kept_save": 0.0}
    starts = [
        {"attempt": "7", "ranks": 64, "began": 100, "first_step": 1000, "resumed_step": 0, "before": None},
        {"attempt": "7", "ranks": 64, "began": 8100, "first_step": 9000, "resumed_step": 2, "before": before},
    ]
    (run / "starts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in starts))
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in steps(4, 1800)))
    (run / "settings.json").write_text("{}")
    (results / "config.yaml").write_text(json.dumps(CONFIG))
    attempts_of(
        *(logs, "train", "begin 7-1.log 0 8 8", "end 7-1.log 7200 1"),
        *("begin 7-2.log 8000 8 8", "end 7-2.log 15200 0"),
    )
    monkeypatch.setattr(slurm_jobs, "jobs", lambda: None)
    spent, trained = 4 * 64, 2 * 64
    hours = gpu_hours.read(run)
    assert (hours.trained, gpu_hours.lost(spent, hours.trained)) == (trained, spent - trained)
    found = one(cost.of(stages(), steps(4, 1800), CONFIG, logs, hours), "train")
    assert (found.spent, found.lost) == (spent, spent - trained)
    assert dict(hours.rows(spent))["lost"].startswith("128.00,")
    parts = (hours.saved, hours.again, hours.starting, spent - hours.held)
    assert sum(parts) == pytest.approx(spent - trained) and min(parts[1:]) > 0
    screen = status.screen(results, logs)
    assert "128.00 trained (50.0% of those spent), 128.00 lost:" in screen
    assert "256 GPU hours spent, 128 of them lost (50%)" in screen


def test_elsewhere_failed_attempts_are_lost(tmp_path):
    attempts_of(
        *(tmp_path, "smoke_test", "begin 8-1.log 0 2 8", "end 8-1.log 1800 1"),
        *("begin 8-2.log 3600 2 8", "end 8-2.log 7200 0"),
    )
    assert one(cost.of(stages(), [], CONFIG, tmp_path), "smoke_test") == Cost("smoke_test", None, 24, 8, 2)


def test_where_slurm_does_not_say_the_gpus_plan_and_configuration_do(tmp_path):
    attempts_of(tmp_path, "smoke_test", "begin local-8-1.log 0 1 ", "end local-8-1.log 3600 0")
    attempts_of(tmp_path, "train", "begin local-9-1.log 0 1 ", "end local-9-1.log 3600 0")
    found = cost.of(stages(), [], CONFIG, tmp_path)
    assert (one(found, "train").spent, one(found, "smoke_test").spent) == (64, 16)


def test_of_a_run_before_attempts_were_noted_the_receipt_tells_the_last(tmp_path):
    receipt = {"seconds": 4000, "figures": {"world_size": 64, "wall_seconds": 3600}}
    found = one(cost.of(stages(receipt), steps(90, 36), CONFIG, tmp_path), "train")
    assert (found.spent, found.attempts) == (64, None)
    assert found.lost == pytest.approx(64 * 0.1)


def test_on_cpus_nothing_is_told(tmp_path):
    attempts_of(tmp_path, "train", "begin 7-1.log 0 8 ", "end 7-1.log 7200 0")
    assert cost.of(stages(), steps(3, 1), CONFIG | {"accelerator": "cpu"}, tmp_path) == []


COSTS = [Cost("train", (900, 1300), 1000, 50, 3), Cost("smoke_test", None, 24, 8, 2)]


def test_sentence_tells_hours_and_with_a_price_money():
    hours = "1,024 GPU hours spent, 58 of them lost (6%); training planned with 900 to 1,300"
    assert cost.sentence(COSTS, None) == hours
    assert cost.sentence(COSTS, 2.5) == hours + "; 2,560 at 2.5 an hour, 145 lost"


def test_before_anything_has_begun_the_plan_is_told():
    planned = [Cost("train", (900, 1300), 0, 0, None)]
    assert cost.sentence(planned, 2) == "training planned with 900 to 1,300; 1,800 to 2,600 at 2 an hour"
    assert cost.grid(planned, 2) is None


def test_table_has_a_row_for_each_stage_and_money_only_with_a_price():
    title, head, rows = cost.grid(COSTS, 2)
    assert (title, head[-1]) == ("GPU hours by stage", "cost lost")
    assert rows[0] == ["train", "900 to 1,300", "1,000", "50", "3", "2,000", "100"]
    assert cost.grid(COSTS, None)[2][1] == ["smoke_test", "", "24", "8", "2"]


def test_stage_notes_when_each_attempt_began_and_ended(tmp_path):
    """What stage.sh writes is what is read here."""
    log = tmp_path / "logs/mine/train.log"
    environment = os.environ | {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "8", "SLURM_GPUS_ON_NODE": "8"}
    for attempt, word in enumerate(("false", "true"), 1):
        command = [PROJECT / "workflow/scripts/stage.sh", log, str(attempt), word]
        subprocess.run(command, env=environment, check=False, capture_output=True)
    found = cost.attempts(tmp_path / "logs/mine", "train")
    assert [(one.gpus, one.code, one.last) for one in found] == [(64, 1, False), (64, 0, True)]
    assert all(0 <= one.seconds < 600 for one in found)
