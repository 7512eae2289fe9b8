"""Gates: what passes, what fails, and that what cannot be judged does not pass."""

from pathlib import Path

import pytest

from deepseek_sft.task_evaluation import verdict
from deepseek_sft.task_evaluation.measured import Result

TASK = {"min": None, "max_drop": None}


def result(right: int, of: int = 100, truncated: int = 0) -> Result:
    scores = {f"i{number}": float(number < right) for number in range(of)}
    return Result(scores, of, truncated, "exact", Path("x"))


def judged(gate: dict[str, float], tuned: Result | None, base: Result | None = None) -> list[str]:
    found = verdict.judge({"sums": TASK | gate}, {"sums": tuned} if tuned else {}, {"sums": base} if base else {})
    return found.failed


def test_a_mean_at_the_gate_passes():
    assert judged({"min": 0.6}, result(60)) == []


def test_a_mean_below_the_gate_fails_with_its_interval_and_the_cut_answers():
    (sentence,) = judged({"min": 0.6}, result(59, truncated=3))
    assert sentence.startswith("sums.min: 0.590 (95 %: 0.492 to 0.681) is below 0.6; 3 of 100 answers were cut by max_")


def test_a_model_that_gained_does_not_drop():
    assert judged({"max_drop": 0}, result(60), result(20)) == []


def test_a_drop_beyond_the_gate_fails():
    (sentence,) = judged({"max_drop": 0.05}, result(60), result(90))
    assert "from the base's 0.900 it fell by 0.300" in sentence and "more than 0.05" in sentence


def test_equal_results_on_few_items_cannot_show_a_small_drop_and_do_not_pass():
    (sentence,) = judged({"max_drop": 0.01}, result(60), result(60))
    assert "100 items cannot show that it is at most 0.01" in sentence


def test_equal_results_on_enough_items_show_it():
    assert judged({"max_drop": 0.01}, result(600, 1000), result(600, 1000)) == []


@pytest.mark.parametrize("gate", [{"min": 0.1}, {"max_drop": 0.1}, {}], ids=["min", "max_drop", "no gate"])
def test_a_task_without_a_result_is_not_passed(gate):
    (sentence,) = judged(gate, None)
    assert "not judged, so not passed" in sentence


def test_a_drop_without_the_bases_result_is_not_passed():
    (sentence,) = judged({"max_drop": 0.1}, result(60))
    assert sentence == "sums.max_drop: the base has no result: not judged, so not passed"


def test_other_items_of_the_base_are_not_compared():
    (sentence,) = judged({"max_drop": 0.1}, result(60), result(60, of=99))
    assert "other items" in sentence
