"""Results of the tasks in report and summary."""

import pytest

from deepseek_sft.report import evaluation_section
from deepseek_sft.report.collect import Stage

TASK = {
    "metric": "numeric",
    "items": 100,
    "answers": 100,
    "truncated": 3,
    "score": {"mean": 0.61, "low": 0.512, "high": 0.7},
    "base": {"mean": 0.0, "low": 0.0, "high": 0.037},
    "drop": {"mean": -0.61, "low": -0.71, "high": -0.5},
    "min": 0.5,
    "max_drop": 0,
}


def test_a_task_has_a_row_with_its_interval_base_drop_and_gates():
    ((_, head, (row,)),) = evaluation_section.grids({"tasks": {"sums": TASK}})
    assert dict(zip(head, row, strict=True)) == {
        "task": "sums",
        "metric": "numeric",
        "items": "100",
        "score (95 %)": "0.61 (0.512 to 0.7)",
        "base": "0 (0 to 0.037)",
        "drop": "-0.61 (-0.71 to -0.5)",
        "gates": "min 0.5, max_drop 0",
        "cut answers": "3 of 100",
    }


def test_the_summary_says_scores_and_gates_in_a_line():
    checks = {"sums.min": {"passed": True, "detail": "x"}, "sums.max_drop": {"passed": False, "detail": "y"}}
    stage = Stage("evaluate", "complete", receipt={"figures": {"tasks": {"sums": TASK}, "checks": checks}})
    assert evaluation_section.line(stage) == "sums 0.61 (0.512 to 0.7) · 1 of 2 gates passed"


@pytest.mark.parametrize(
    "figures", [{}, {"tasks": None}, {"tasks": {"a": 3}}, {"tasks": {"a": {"score": {"mean": "x"}}}}]
)
def test_a_receipt_of_another_form_breaks_nothing(figures):
    assert isinstance(evaluation_section.grids(figures), list)
    assert isinstance(evaluation_section.line(Stage("evaluate", "complete", receipt={"figures": figures})), str)
