"""One experiment: its sections, and what must hold between them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from .. import secrets_file
from ..data.held_out_prompts import LONGEST_QUESTION
from .convert import Convert
from .data import Data
from .envs import Envs
from .evaluate import Evaluate
from .field_types import Text, matching, plain, section
from .model import Model
from .plan import Plan
from .preflight import Preflight
from .rehearse import Rehearse
from .serve import Serve
from .smoke_test import SmokeTest
from .tracking import Tracking
from .train import Train

Name = matching("^[A-Za-z0-9][A-Za-z0-9._-]*$", "letters, digits, `.`, `_` and `-`, the first a letter or a digit")


@section
class Configuration:
    experiment: Name
    """Name of the experiment; results go to `<results>/<experiment>/`, logs to `logs/<experiment>/`."""
    results: Text = "results"
    """Folder of all results, on storage that every node sees (checkpoints of 671B need 7.3 TiB each)."""
    accelerator: Literal["cuda", "cpu"] = "cuda"
    """What training and serving run on. `cpu` is for the demo and tests."""
    notify: Text | None = None
    """Shell command that is started, and not waited for, when a run has started, finished, failed or was stopped; its
    environment says which (docs/reliability.md). No run is hurt by it."""
    tracking: Tracking
    """Experiment trackers that `make track` gives a run to (docs/report.md); no key of it re-runs anything."""
    data: Data
    model: Model
    plan: Plan
    preflight: Preflight
    """Checks of the nodes before training (docs/cluster.md); no key of it re-runs anything."""
    rehearse: Rehearse
    """What target `rehearse` judges by (docs/training.md); no key of it re-runs anything."""
    train: Train
    convert: Convert
    serve: Serve
    smoke_test: SmokeTest
    evaluate: Evaluate
    """Tasks that the model is evaluated on, with gates (docs/evaluation.md)."""
    envs: Envs
    """Existing environments to use instead of the locked ones that `snakemake envs` builds."""

    def problems(self) -> Iterator[str]:
        yield from secrets_file.problems(plain(self))
        for key, path in self._paths():
            if path.rpartition("=")[2].startswith("~"):
                written = Path(path.rpartition("=")[2]).expanduser()
                yield f"{key}: {path!r} begins with ~, which nothing here expands; write {written}"
            if path.startswith("-"):
                yield f"{key}: {path!r} begins with -, which programs take for an option; write ./{path}"
        train, cpu, tiny = self.train, self.accelerator == "cpu", self.model.tiny is not None
        ranks, size, key = train.ranks_per_node, train.sequence_parallel_size, "train.ranks_per_node"
        if cpu and ranks is None:
            yield f"{key}: say how many ranks a node runs, since `accelerator: cpu` has no GPUs to count"
        if not cpu and ranks is not None:
            yield f"{key}: leave it null, since with `accelerator: cuda` it is the number of GPUs of a node"
        if cpu and train.attention == "flash":
            yield "train.attention: `flash` needs GPUs; use `auto` or `sdpa`"
        if cpu and ranks and ranks % size:  # of GPU nodes only the profile knows: Experiment.check_shapes
            yield (
                f"train.sequence_parallel_size: {size} does not divide the {ranks} ranks of a node; "
                f"allowed: {', '.join(str(n) for n in range(1, ranks + 1) if ranks % n == 0)}"
            )
        if self.evaluate.tasks and self.envs.serve and self.envs.serve.contained and not self.envs.evaluate:
            yield (
                "envs.evaluate: the model is served in a container, where `.envs/evaluate` of this project may not "
                "run; give `python`, one with lm-eval inside the container"
            )
        if train.spare_nodes and not self.preflight.in_training:
            yield (
                "train.spare_nodes: preflight chooses among the nodes; write preflight: {in_training: true}, or "
                "spare_nodes: 0"
            )
        if cpu and self.convert.dtype == "fp8":
            yield "convert.dtype: `fp8` is served by GPUs alone, not with `accelerator: cpu`; use `bf16` or `fp32`"
        if cpu and self.serve.replicas > 1:
            yield (
                "serve.data_parallel_size: replicas share experts on GPUs alone: vLLM 0.32 on CPUs lacks the "
                "all-gather that this takes, and fails at the first request; write data_parallel_size: 1"
            )
        if train.validation and not self.data.held_out:
            yield (
                "train.validation: there are no samples to measure; write data: {held_out: 0.5 %} to hold some out of "
                "training, or leave validation out"
            )
        if tiny and self.convert.mtp == "copy":
            yield "convert.mtp: the tiny model has no multi-token-prediction layer to copy; use `drop`"
        context, needed = self.serve.max_model_len, 2 * LONGEST_QUESTION
        if self.data.held_out and not self.smoke_test.prompts and context < needed:
            yield (
                f"serve.max_model_len: {context} is too short for the prompts that data.held_out gives the smoke test, "
                f"of up to {LONGEST_QUESTION} bytes; write at least {needed}, or name others in smoke_test.prompts"
            )
        if self.serve.max_model_len < self.smoke_test.max_tokens:
            yield "smoke_test.max_tokens: is above serve.max_model_len, so that no request could be accepted"

        for name, task in self.evaluate.tasks.items():
            if self.serve.max_model_len <= task.max_tokens:
                yield (
                    f"evaluate.tasks.{name}.max_tokens: {task.max_tokens} leaves no room for a prompt in "
                    f"serve.max_model_len ({self.serve.max_model_len})"
                )

    def _paths(self) -> Iterator[tuple[str, str]]:
        """Keys that name files or folders, with their values."""
        sources = [source if isinstance(source, str) else source.path for source in self.data.sources]
        found: list[tuple[str, Any]] = [(f"data.sources[{number}]", path) for number, path in enumerate(sources)]
        sets = [one if isinstance(one, str) else one.path for one in self.data.evaluation_sets]
        found += [(f"data.evaluation_sets[{number}]", path) for number, path in enumerate(sets)]
        found += [("results", self.results), ("data.tokenizer", self.data.tokenizer)]
        found += [("model.base", self.model.base), ("plan.model", self.plan.model)]
        found += [(f"smoke_test.{name}", getattr(self.smoke_test, name)) for name in ("prompts", "base_measured")]
        for name, task in self.evaluate.tasks.items():
            found += [(f"evaluate.tasks.{name}.{key}", getattr(task, key)) for key in ("data", "lm_eval")]
        found += [("train.secrets_file", self.train.secrets_file), ("serve.secrets_file", self.serve.secrets_file)]
        found.append(("serve.api_key_file", self.serve.api_key_file))
        owns = [("train", self.envs.train), ("serve", self.envs.serve), ("evaluate", self.envs.evaluate)]
        found += [(f"envs.{stage}.python", own.python) for stage, own in owns if own]
        yield from ((key, path) for key, path in found if path)
