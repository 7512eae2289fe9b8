"""Which answers are right, and which expected answers are refused before anything runs."""

import pytest

from deepseek_sft.errors import BadInputError
from deepseek_sft.task_evaluation import judges

EXACT = {"judge": "exact", "pattern": None, "tolerance": 0}
NUMERIC = EXACT | {"judge": "numeric"}
REGEX = EXACT | {"judge": "regex"}
LETTER = REGEX | {"pattern": r"\(([A-D])\)"}


@pytest.mark.parametrize(
    "task, answer, expected, right",
    [
        (EXACT, " Paris.\n", "paris", True),
        (EXACT, "Paris, of course", "Paris", False),
        (EXACT, r"So \boxed{Paris} it is", "Paris", True),
        (EXACT, "", "", False),
        (NUMERIC, "That makes 1,234.50 in all.", "1234.5", True),
        (NUMERIC, "12 and 13 make 25", "25", True),
        (NUMERIC, "25 is 12 and 13", "25", False),
        (NUMERIC, "−7", "-7", True),
        (NUMERIC, r"It is \boxed{3}, of 4", "3", True),
        (NUMERIC, "none", "3", False),
        (NUMERIC, "1e400", "1e400", False),
        (NUMERIC | {"tolerance": 0.01}, "3.149", "3.14", True),
        (NUMERIC | {"tolerance": 0.01}, "3.16", "3.14", False),
        (REGEX, "we get x = 5", r"x\s*=\s*5\b", True),
        (REGEX, "we get x = 55", r"x\s*=\s*5\b", False),
        (LETTER, "not (A) but (B)", "B", True),
        (LETTER, "not (B) but (A)", "B", False),
        (LETTER, "B", "B", False),
    ],
)
def test_an_answer_is_right_or_wrong(task, answer, expected, right):
    assert judges.is_right(task, answer, expected) is right


@pytest.mark.parametrize("task, expected", [(NUMERIC, "none"), (REGEX, "("), (EXACT, " . ")])
def test_an_expected_answer_that_no_answer_can_be_is_refused(task, expected):
    with pytest.raises(BadInputError, match="item 7"):
        judges.check(task, expected, "item 7")
