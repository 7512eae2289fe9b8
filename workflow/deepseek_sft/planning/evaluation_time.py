"""What evaluating on tasks takes: items × answers × their tokens, at the speed of decoding on the planned deployment.

Answers are taken to be between as long as a sample of the training data on average and as long as their budget. A step
of decoding gives every request that is answered at once its next token: each GPU reads its weights, of the routed
experts those that these tokens choose, and their contexts; every layer costs some time by itself. Nothing of this was
measured here; docs/planning.md has the reasons.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from .counting import Model
from .deployment import Deployment
from .duration import FLOP_SHARE, HOURS
from .gpu_models import GPUS
from .settings import Cluster, Samples
from .terms import show, total

UNKNOWN_ITEMS = 1000  # what a task whose number of items is not known is planned by
RULES = ("evaluate", "evaluate_base")


@dataclasses.dataclass(frozen=True)
class Speed:
    """How well a deployment decodes.

    Attributes:
        memory_share: of a GPU's memory bandwidth, by the kernels that read weights and contexts.
        layer_seconds: of a layer and step beside reading: kernels' starts, exchanges between GPUs.
        flop_share: of the peak.
    """

    memory_share: float
    layer_seconds: float
    flop_share: float


# Judgements, as no GPU was at hand.
FASTEST, SLOWEST = Speed(0.70, 2e-4, max(FLOP_SHARE)), Speed(0.40, 6e-4, min(FLOP_SHARE))


class Task(Protocol):
    """A task's settings, as far as a plan goes; ``settings/evaluate.py`` has them."""

    data: str | None
    max_tokens: int
    samples: int


class Evaluated(Protocol):
    """The section ``evaluate``, as far as a plan goes."""

    concurrency: int

    @property
    def tasks(self) -> Mapping[str, Any]: ...

    @property
    def compared(self) -> bool: ...


@dataclasses.dataclass(frozen=True)
class Asked:
    """One task as planned.

    Attributes:
        items: None where only lm-eval knows.
        samples: answers to each.
        tokens: of an answer, fewest and most.
        seconds: fastest and slowest; of ``UNKNOWN_ITEMS`` where the number of items is not known.
    """

    name: str
    items: int | None
    samples: int
    tokens: tuple[int, int]
    seconds: tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Stage:
    """``evaluate`` or ``evaluate_base`` as planned.

    Attributes:
        loading: seconds in which the model is read; 0 where the smoke test's job has it loaded.
        gpus: that it holds.
    """

    rule: str
    asked: tuple[Asked, ...]
    loading: float
    gpus: int

    @property
    def seconds(self) -> tuple[float, float]:
        """Fastest and slowest, of the tasks whose number of items is known."""
        known = [one.seconds for one in self.asked if one.items is not None]
        return self.loading + sum(one[0] for one in known), self.loading + sum(one[1] for one in known)

    @property
    def gpu_hours(self) -> tuple[float, float]:
        fastest, slowest = self.seconds
        return fastest * self.gpus / HOURS, slowest * self.gpus / HOURS


def plan(
    model: Model, cluster: Cluster, samples: Samples, evaluate: Evaluated, served: Deployment, base: Deployment
) -> tuple[Stage, ...]:
    """Plan the evaluation of a served model, and of its base where a gate compares with it; nothing without tasks.

    Args:
        served: the trained model's deployment.
        base: the base's, which is served as it was prepared.
    """
    if not evaluate.tasks:
        return ()
    found = [Stage(RULES[0], _asked(model, cluster, samples, evaluate, served), 0.0, served.serve.ranks)]
    if evaluate.compared:
        loading = base.node_reads * base.nodes / (cluster.storage_gb_per_second * 1e9)
        found.append(Stage(RULES[1], _asked(model, cluster, samples, evaluate, base), loading, base.serve.ranks))
    return tuple(found)


def _asked(
    model: Model, cluster: Cluster, samples: Samples, evaluate: Evaluated, served: Deployment
) -> tuple[Asked, ...]:
    found = []
    for name, task in evaluate.tasks.items():
        items = _items(task)
        tokens = (min(task.max_tokens, max(1, round(samples.mean_length / samples.per_row))), task.max_tokens)
        requests = task.samples * (UNKNOWN_ITEMS if items is None else items)
        most = min(evaluate.concurrency, requests)
        fastest, slowest = (
            _seconds(model, cluster, served, most, requests, length, speed)
            for length, speed in zip(tokens, (FASTEST, SLOWEST), strict=True)
        )
        found.append(Asked(name, items, task.samples, tokens, (fastest, slowest)))
    return tuple(found)


def _items(task: Task) -> int | None:
    """Lines of its file; None for a task of lm-eval, and where the file cannot be read."""
    try:
        with open(Path(task.data or ""), "rb") as stream:
            return sum(bool(line.strip()) for line in stream)
    except OSError:
        return None


def _seconds(
    model: Model, cluster: Cluster, served: Deployment, most: int, requests: int, length: int, speed: Speed
) -> float:
    """Of ``requests`` answers of ``length`` tokens, up to ``most`` at once and as many as their contexts fit."""
    at_once = max(1, min(most, served.cached_tokens * served.serve.replicas // length))
    steps = max(length, requests * length / at_once)
    return steps * step_seconds(model, cluster, served, at_once, length, speed)


def step_seconds(model: Model, cluster: Cluster, served: Deployment, at_once: int, length: int, speed: Speed) -> float:
    """Until ``at_once`` answers of ``length`` tokens in the end, halfway on average, have each a token more."""
    stages, replicas = served.serve.pipeline_parallel_size, served.serve.replicas
    together = max(1.0, at_once / stages)  # in one stage, while the others work on the rest
    chosen = 1 - (1 - model["num_experts_per_tok"] / model["n_routed_experts"]) ** together
    experts = next(term.value for term in served.weights if term.name == "routed experts")
    weights = total(served.weights) - experts * (1 - chosen)
    contexts = together / replicas * length / 2 * served.token_bytes
    bandwidth = GPUS[cluster.gpu or "h100"].memory_tb_per_second * 1e12 * speed.memory_share
    of_stage = (weights + contexts) / bandwidth + model.layers / stages * speed.layer_seconds
    computing = 2 * model.activated * at_once / (served.serve.ranks * cluster.gpu_tflops * 1e12 * speed.flop_share)
    return stages * of_stage + computing


def lines(found: tuple[Stage, ...], price: float | None) -> list[str]:
    """For the plan's text."""
    if not found:
        return []
    told = [_words(one) for one in found[0].asked]
    for stage in found:
        (fastest, slowest), hours = stage.seconds, stage.gpu_hours
        where = f"with {show(stage.loading, 's')} of loading" if stage.loading else "in the smoke test's job"
        money = f", {hours[0] * price:,.0f} to {hours[1] * price:,.0f} at {price:g} an hour" if price else ""
        told.append(
            f"{stage.rule} {show(fastest, 's')} to {show(slowest, 's')} {where}: "
            f"{hours[0]:,.1f} to {hours[1]:,.1f} GPU hours{money}"
        )
    return [f"{'evaluate' if not number else '':10}{text}" for number, text in enumerate(told)]


def _words(one: Asked) -> str:
    (fewest, most), answers = one.tokens, f"{one.samples} answers" if one.samples > 1 else "an answer"
    budget = f"{fewest:,} to {most:,}" if fewest < most else f"{most:,}"
    if one.items is None:
        return (
            f"{one.name}: items of lm-eval, not counted below: {UNKNOWN_ITEMS:,} × {answers} of {budget} tokens take "
            f"{show(one.seconds[0], 's')} to {show(one.seconds[1], 's')}"
        )
    return f"{one.name}: {one.items:,} items × {answers} of {budget} tokens"


def figures(found: tuple[Stage, ...]) -> dict[str, Any]:
    """For the receipt and ``--json``."""
    return {
        stage.rule: {
            "seconds": [round(each) for each in stage.seconds],
            "gpu_hours": [round(each, 2) for each in stage.gpu_hours],
            "loading_s": round(stage.loading),
            "tasks": {
                one.name: {"items": one.items, "answers": one.samples, "tokens": list(one.tokens)}
                | {"seconds" if one.items is not None else "seconds_of_1000": [round(each) for each in one.seconds]}
                for one in stage.asked
            },
        }
        for stage in found
    }
