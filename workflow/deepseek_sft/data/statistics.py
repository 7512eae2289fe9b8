"""What ``statistics.json`` says about the samples."""

from array import array
from collections import Counter
from typing import Any

import numpy as np

from .samples import Made, Sample
from .tokens import NO_LOSS

EXAMPLES = 3
EDGES = [0, *(2**power for power in range(4, 21))]  # 0, 16, 32, … 1,048,576 tokens


class Statistics:
    """Counts over samples; lengths are kept as 4-byte integers, a few megabytes for a million samples."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.rejects: Counter[str] = Counter()
        self.examples: dict[str, list[dict[str, str]]] = {}
        self.lengths, self.reasoning, self.answers = array("i"), array("i"), array("i")

    def add_record(self, made: Made) -> None:
        """Count a record and what became of it, except its samples."""
        self.counts["records"] += 1
        self.counts["untrained_turns"] += made.untrained
        self.counts["records_spelling_control_tokens"] += made.mentions
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

    def figures(self) -> dict[str, Any]:
        """Counts and lengths, JSON-serialisable; lengths in tokens."""
        names = ("records", "samples", "turns", "untrained_turns", "tokens", "trained_tokens", "truncated")
        counts = {name: self.counts[name] for name in (*names, "records_spelling_control_tokens")}
        tokens = counts["tokens"]
        return {
            **counts,
            "trained_share": round(counts["trained_tokens"] / tokens, 4) if tokens else 0.0,
            "turns_with_reasoning": len(self.reasoning),
            "length": _summary(self.lengths),
            "reasoning_length": _summary(self.reasoning),
            "answer_length": _summary(self.answers),
            "rejected": sum(self.rejects.values()),
            "rejects": dict(sorted(self.rejects.items())),
        }

    def report(self) -> dict[str, Any]:
        """The content of ``statistics.json``: figures, length histogram, examples of rejects."""
        heights, _ = np.histogram(np.frombuffer(self.lengths, np.int32), [*EDGES, np.iinfo(np.int32).max])
        last = max((i for i, height in enumerate(heights) if height), default=0)
        bins = [
            {"from": EDGES[i], "below": EDGES[i + 1] if i + 1 < len(EDGES) else None, "samples": int(heights[i])}
            for i in range(last + 1)
        ]
        examples = dict(sorted(self.examples.items()))
        return {**self.figures(), "length_histogram": bins, "reject_examples": examples}


def _summary(lengths: array) -> dict[str, float]:  # type: ignore[type-arg]
    if not lengths:
        return {"count": 0, "mean": 0.0, "median": 0, "p95": 0, "max": 0}
    values = np.frombuffer(lengths, np.int32)
    median, p95 = np.percentile(values, [50, 95], method="higher")
    mean = round(float(values.mean()), 2)
    return {"count": len(values), "mean": mean, "median": int(median), "p95": int(p95), "max": int(values.max())}
