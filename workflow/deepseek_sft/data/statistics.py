"""What ``statistics.json`` says about the samples."""

import bisect
from array import array
from collections import Counter
from typing import Any

import numpy as np

from .samples import Made, Sample
from .similarity import NearDuplicates
from .tokens import NO_LOSS

EXAMPLES = 3
EDGES = [0, *(2**power for power in range(4, 21))]  # 0, 16, 32, … 1,048,576 tokens


class Statistics:
    """Counts over samples; lengths are kept as 4-byte integers, a few megabytes for a million samples.

    Args:
        max_length: longest sample allowed; the cut of the length histogram.
    """

    def __init__(self, max_length: int = 0) -> None:
        self.max_length = max_length
        self.counts: Counter[str] = Counter()
        self.rejects: Counter[str] = Counter()
        self.examples: dict[str, list[dict[str, str]]] = {}
        self.spelling = ""  # of the first trained answer that spells a control token
        self.lengths, self.reasoning, self.answers = array("i"), array("i"), array("i")
        self.too_long = array("i")
        self.languages: Counter[str] = Counter()
        self.weights: dict[float, Counter[str]] = {}
        self.pairs: Counter[tuple[int, int]] = Counter()  # bins of (reasoning, answer) of trained turns
        self.near_duplicates = NearDuplicates()

    def add_record(self, made: Made) -> None:
        """Count a record and what became of it, except its samples."""
        self.counts["records"] += 1
        self.counts["untrained_turns"] += made.untrained
        self.counts["records_spelling_control_tokens"] += made.mentions
        self.counts["answers_spelling_control_tokens"] += made.spelled
        self.spelling = self.spelling or made.spelling
        self.counts["records_with_tools"] += made.tools or made.calls
        self.counts["records_with_tools_not_shown"] += made.tools_lost
        self.too_long.extend(made.too_long)
        self.counts["copies"] += made.copies
        self.counts["records_left_out_by_weight"] += not made.copies
        weight = self.weights.setdefault(made.weight, Counter())
        weight["records"] += 1
        weight["copies"] += made.copies
        if made.language:
            self.languages[made.language] += 1
        if made.signature is not None:
            self.near_duplicates.add(made.signature)
        for name, reason, message in made.rejects:
            self.rejects[reason] += 1
            examples = self.examples.setdefault(reason, [])
            if len(examples) < EXAMPLES:
                examples.append({"id": name, "message": message})

    def add_sample(self, sample: Sample) -> None:
        """Count a sample."""
        self.counts["samples"] += 1
        self.counts["turns"] += sample.turns
        self.counts["tokens"] += len(sample.input_ids)
        self.counts["trained_tokens"] += int((sample.labels != NO_LOSS).sum())
        self.counts["truncated"] += sample.truncated
        self.lengths.append(len(sample.input_ids))
        self.reasoning.extend(length for length in sample.reasoning if length)
        self.answers.extend(sample.answers)
        for reasoning, answer in zip(sample.reasoning, sample.answers, strict=True):
            if reasoning:
                self.pairs[_bin(reasoning), _bin(answer)] += 1

    def figures(self) -> dict[str, Any]:
        """Counts and lengths, JSON-serialisable; lengths in tokens."""
        names = (
            "records",
            "copies",
            "records_left_out_by_weight",
            "records_with_tools",
            "records_with_tools_not_shown",
            "samples",
            "turns",
            "untrained_turns",
            "tokens",
            "trained_tokens",
            "truncated",
        )
        rare = ("records_spelling_control_tokens", "answers_spelling_control_tokens")
        counts = {name: self.counts[name] for name in (*names, *rare)}
        tokens = counts["tokens"]
        return {
            **counts,
            "trained_share": round(counts["trained_tokens"] / tokens, 4) if tokens else 0.0,
            "turns_with_reasoning": len(self.reasoning),
            "length": _summary(self.lengths),
            "reasoning_length": _summary(self.reasoning),
            "answer_length": _summary(self.answers),
            "near_duplicates": self.near_duplicates.count(),
            "languages": dict(self.languages.most_common()),
            **({"first_spelling": self.spelling} if self.spelling else {}),
            **({"weights": weights} if (weights := self._weights()) else {}),
            "rejected": sum(self.rejects.values()),
            "rejects": dict(sorted(self.rejects.items())),
        }

    def report(self) -> dict[str, Any]:
        """The content of ``statistics.json``: figures, histograms, examples of rejects."""
        edges = [*EDGES, np.iinfo(np.int32).max]
        heights, over = (
            np.histogram(np.frombuffer(found, np.int32), edges)[0] for found in (self.lengths, self.too_long)
        )
        last = max((i for i, both in enumerate(heights + over) if both), default=0)
        bins = [{**_edges(i), "samples": int(heights[i]), "too_long": int(over[i])} for i in range(last + 1)]
        pairs = [
            {"reasoning": _edges(r), "answer": _edges(a), "turns": turns}
            for (r, a), turns in sorted(self.pairs.items())
        ]
        return {
            **self.figures(),
            "max_length": self.max_length,
            "length_histogram": bins,
            "reasoning_by_answer": pairs,
            "reject_examples": dict(sorted(self.examples.items())),
        }

    def _weights(self) -> dict[str, str]:
        """Records and their uses by weight; empty where every weight is 1."""
        if set(self.weights) <= {1.0}:
            return {}
        return {f"{w:g}": f"{c['records']} records used {c['copies']} times" for w, c in sorted(self.weights.items())}


def _bin(length: int) -> int:
    return bisect.bisect_right(EDGES, length) - 1


def _edges(number: int) -> dict[str, int | None]:
    return {"from": EDGES[number], "below": EDGES[number + 1] if number + 1 < len(EDGES) else None}


def _summary(lengths: array) -> dict[str, float]:  # type: ignore[type-arg]
    if not lengths:
        return {"count": 0, "mean": 0.0, "median": 0, "p95": 0, "max": 0}
    values = np.frombuffer(lengths, np.int32)
    median, p95 = np.percentile(values, [50, 95], method="higher")
    mean = round(float(values.mean()), 2)
    return {"count": len(values), "mean": mean, "median": int(median), "p95": int(p95), "max": int(values.max())}
