"""Tasks that the served model is evaluated on, and the gates on their results."""

import re
from collections.abc import Iterator
from typing import Annotated, Literal

from annotated_types import Gt, Le

from .field_types import AboveZero, NotNegative, Number, Positive, Text, section, setting

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
GATES = ("min", "max_drop")


@section
class EvaluationTask:
    data: Text | None = None
    """JSONL of items of one's own, in the form of `smoke_test.prompts`, each with an expected answer."""
    judge: Literal["exact", "numeric", "regex"] = "exact"
    """What makes an answer to `data` right: it is the expected one; its last number is; a regular expression finds
    it."""
    pattern: Text | None = None
    """Of judge `regex`: what its last match in the answer (of its first group, where it has one) must equal; null takes
    each item's expected answer as a regular expression, which must be found in the answer."""
    tolerance: NotNegative = 0
    """Of judge `numeric`: how far the number may be from the expected one."""
    lm_eval: Text | None = None
    """YAML file of a task in lm-eval's form, with local data, instead of `data`."""
    metric: Text | None = None
    """Of `lm_eval`: metric to judge by, or `metric,filter`; null takes the task's first."""
    max_tokens: Positive = 4096
    """Budget of one answer in tokens, reasoning included; an answer that it cuts is counted as truncated."""
    samples: Positive = 1
    """Answers to each item; its score is their mean."""
    temperature: NotNegative = 0
    """Temperature of sampling; 0 is greedy."""
    top_p: Annotated[Number, Gt(0), Le(1)] = 1
    """Share of the probability that is sampled from."""
    min: Number | None = None
    """Smallest mean score to pass with; null only reports it."""
    max_drop: NotNegative | None = None
    """Largest drop of the mean score from the base model's to pass with. The upper end of the drop's 95 % interval
    must not lie above it; null only reports it."""

    def problems(self) -> Iterator[str]:
        if (self.data is None) == (self.lm_eval is None):
            yield "give either data (items of your own) or lm_eval (a task file), not both"
        own = self.data is not None
        if self.pattern is not None and not (own and self.judge == "regex"):
            yield "pattern: is used by judge: regex alone"
        if self.tolerance and not (own and self.judge == "numeric"):
            yield "tolerance: is used by judge: numeric alone"
        if self.metric is not None and own:
            yield "metric: is of lm_eval; items of your own are judged by `judge`"
        if self.pattern is not None:
            try:
                re.compile(self.pattern)
            except (re.error, OverflowError, RecursionError) as error:
                yield f"pattern: {self.pattern!r} is no regular expression: {error}"
        if self.samples > 1 and not self.temperature:
            yield "samples: greedy answers are all the same; write temperature: 0.6, or samples: 1"


@section
class Evaluate:
    tasks: dict[str, EvaluationTask] = setting({}, later=True)
    """Tasks by name, each with `data` and `judge`, or `lm_eval`; `{}`: the model is not evaluated. Keys of a task:
    `data`, `judge`, `pattern`, `tolerance`, `lm_eval`, `metric`, `max_tokens`, `samples`, `temperature`, `top_p`, and
    the gates `min` and `max_drop` (docs/evaluation.md)."""
    concurrency: Positive = setting(32, later=True, operational=True)
    """Requests at the same time."""
    request_timeout_s: AboveZero = setting(3600, later=True, operational=True)
    """Deadline of one request in seconds, to its last byte."""

    def problems(self) -> Iterator[str]:
        for name, task in self.tasks.items():
            if not NAME.fullmatch(name):
                yield f"tasks.{name}: a name has letters, digits, `.`, `_` and `-`, the first a letter or a digit"
            yield from (f"tasks.{name}.{problem}" for problem in task.problems())

    @property
    def compared(self) -> bool:
        """Whether a gate asks for the base's results."""
        return any(task.max_drop is not None for task in self.tasks.values())
