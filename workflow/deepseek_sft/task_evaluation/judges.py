r"""Whether an answer to an item of one's own is right: exact match, the last number, a regular expression.

All look at the answer after the reasoning; ``exact`` and ``numeric`` into its last ``\boxed{…}``, where it has one.
"""

import math
import re
from typing import Any

from ..errors import BadInputError
from ..evaluation.final_answers import BOXED, normalised

NUMBER = re.compile(r"[-+−]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?|[-+−]?\.\d+")


def is_right(task: dict[str, Any], answer: str, expected: str) -> bool:
    """Judge one answer.

    Args:
        task: settings of the task: ``judge``, ``pattern``, ``tolerance``.
        answer: without reasoning; empty is never right.
        expected: the item's answer, or its regular expression.
    """
    if not answer.strip():
        return False
    if task["judge"] == "regex":
        return _found(task["pattern"], answer, expected)
    given = (BOXED.findall(answer) or [answer])[-1]
    if task["judge"] == "numeric":
        value, wanted = last_number(given), last_number(expected)
        return value is not None and wanted is not None and abs(value - wanted) <= task["tolerance"]
    return normalised(given) == normalised((BOXED.findall(expected) or [expected])[-1])


def _found(pattern: str | None, answer: str, expected: str) -> bool:
    if pattern is None:
        return re.search(expected, answer) is not None
    found = list(re.finditer(pattern, answer))
    if not found:
        return False
    last = found[-1]
    text = last[1] if last.re.groups else last[0]
    return text is not None and normalised(text) == normalised(expected)


def last_number(text: str) -> float | None:
    """The last number in a text; commas may group thousands. None where there is none that is finite."""
    found = NUMBER.findall(text)
    value = float(found[-1].replace(",", "").replace("−", "-")) if found else math.nan
    return value if math.isfinite(value) else None


def check(task: dict[str, Any], expected: str, where: str) -> None:
    """Refuse an expected answer that the judge can never find.

    Raises:
        BadInputError: it holds no number, or is no regular expression; names file and item.
    """
    if task["judge"] == "numeric" and last_number(expected) is None:
        raise BadInputError(f"{where}: the expected answer {expected[:80]!r} holds no number", "choose another judge")
    if task["judge"] == "regex" and task["pattern"] is None:
        try:
            re.compile(expected)
        except (re.error, OverflowError, RecursionError) as error:
            raise BadInputError(
                f"{where}: the expected answer {expected[:80]!r} is no regular expression: {error}",
                "correct it, or give the task a `pattern` whose match must equal it",
            ) from None
    if task["judge"] != "regex" and not normalised(expected):
        raise BadInputError(f"{where}: the expected answer is empty")
