"""What the rules ask about an experiment: paths, command-line arguments, settings, and whether its inputs are there.

Everything here is a pure function of the configuration, apart from looking at external paths.
"""

import dataclasses
import difflib
import glob
import shlex
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml

from . import config as configuration
from . import (
    containers,
    environments,
    expert_shards,
    files,
    place,
    receipts,
    rule_settings,
    secrets_file,
    shapes,
    stages,
)
from .data.held_out_prompts import PROMPTS_FILE
from .data.sources import split_argument
from .data.tokens import made_unpacked
from .errors import BadInputError
from .planning import deployment, gate
from .planning import load as planning
from .planning.plan import Plan
from .planning.settings import COUNTED, GIB
from .planning.training_resources import read_resources
from .settings import reading
from .settings.serve import Serve
from .slurm.sbatch import Allocation


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One experiment.

    Attributes:
        config: the resolved configuration.
        results: ``<results>/<experiment>``.
        logs: ``logs/<experiment>``.
        notes: what a person should know of how the configuration was read.
    """

    config: dict[str, Any]
    results: str
    logs: str
    notes: tuple[str, ...] = ()

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Experiment":
        """Validate a merged configuration; raises BadInputError with every problem."""
        resolved = configuration.resolve(config)
        name = resolved["experiment"]
        place.check_results(resolved["results"])
        results = f"{resolved['results'].rstrip('/')}/{name}"
        notes = []
        if resolved["data"]["pack"] == "auto":
            tokens = Path(results, "data/tokens")
            resolved["data"]["pack"] = not made_unpacked(tokens)
            if not resolved["data"]["pack"]:
                notes.append(f"data.pack: auto leaves {tokens} unpacked, as it was made; `true` packs, and trains anew")
        if resolved["train"]["experts_per_shard"] == expert_shards.AUTO:
            begun = expert_shards.begun_with(Path(results, "train/runs"))
            if begun is None and made_unpacked(Path(results, "data/tokens")):
                begun = 8  # of the shipped configuration before it packed and said ``auto``
            if begun:
                resolved["train"]["experts_per_shard"] = begun
                notes.append(f"train.experts_per_shard: auto leaves {begun}, with which this experiment began")
        if resolved["data"]["held_out"] and not resolved["smoke_test"]["prompts"]:
            resolved["smoke_test"]["prompts"] = f"{results}/data/{PROMPTS_FILE}"
        notes += containers.unjudged(resolved["envs"])
        return cls(resolved, results, f"logs/{name}", tuple(notes))

    def write_config(self) -> None:
        """Write the resolved configuration to ``<results>/config.yaml``, for people; never an input."""
        head = "# The resolved configuration of the last start, defaults filled in. Changing it does nothing.\n"
        files.write_text(f"{self.results}/config.yaml", head + yaml.safe_dump(self.config, sort_keys=False))

    def environment(self, kind: str) -> environments.Environment:
        """What runs the stages of one kind: ``workflow``, ``train`` or ``serve``."""
        return environments.of(kind, self.config)

    # ---- what each rule is given

    def arguments(self, rule: str) -> str:
        """Command-line arguments of a rule's script that decide its result, in a fixed order, shell-quoted."""
        return shlex.join(map(str, rule_settings.ARGUMENTS[rule](self)[0]))

    def operational_arguments(self, rule: str) -> str:
        """Arguments that steer a rule's run without changing its result."""
        return shlex.join(map(str, rule_settings.ARGUMENTS[rule](self)[1]))

    def settings(self, rule: str) -> str:
        """Canonical JSON of the settings that decide the result of plan, preflight, train, smoke_test or serve."""
        return files.canonical_json(rule_settings.SETTINGS[rule](self)[0])

    def operational(self, rule: str) -> str:
        """Canonical JSON of the settings of the same rules that change no result."""
        return files.canonical_json(rule_settings.SETTINGS[rule](self)[1])

    def evaluated(self) -> bool:
        """Whether the model is evaluated on tasks."""
        return bool(self.config["evaluate"]["tasks"])

    def compared_with_base(self) -> bool:
        """Whether a gate of the evaluation asks for the base's results."""
        return any(task["max_drop"] is not None for task in self.config["evaluate"]["tasks"].values())

    def kinds_of_environments(self) -> tuple[str, ...]:
        """Kinds of environments that this experiment needs beside the workflow's own."""
        return (*environments.CHOSEN, *([environments.EVALUATE] if self.evaluated() else []))

    def rehearsal_options(self) -> str:
        """Canonical JSON of what a rehearsal is judged by, training's resources apart."""
        options = {"accelerator": self.config["accelerator"], **self.config["rehearse"]}
        options["cost_per_gpu_hour"] = options["cost_per_gpu_hour"] or self.config["plan"]["price_per_gpu_hour"]
        return files.canonical_json(options)

    def check_plan(self, resources: dict[str, Any], tokens_are_current: bool, node_mb: int | None = None) -> Plan:
        """Plan with what is known now, before any job starts.

        Args:
            resources: what profile and command line give to ``train``.
            tokens_are_current: whether tokenize_data has nothing to do, so that its receipt counts.
            node_mb: memory of a node as Slurm says it; None where it does not.

        Returns:
            The plan.

        Raises:
            GateError: the plan does not fit, or a time-out would end what is healthy by it, and the configuration does
                not say to go on.
            BadInputError: it cannot be made.
        """
        receipt = Path(self.results, "receipts", "tokenize_data.json")
        tokens = receipts.read(receipt, "tokenize_data", COUNTED) if tokens_are_current and receipt.exists() else None
        plan = planning.from_config(self.config, read_resources(resources), tokens, node_mb, self.served())
        gate.check_possible(plan)
        gate.stop_unless_it_fits(plan, self.config["plan"]["on_misfit"])
        gate.check_limits(plan, self.config["train"]["hang_minutes"], self.config["plan"]["on_misfit"])
        return plan

    def served(self) -> Serve:
        """How the model is served."""
        return reading.parse(Serve, self.config["serve"], "serve")

    def check_deployment(self, allocation: Allocation) -> None:
        """Hold the deployment against the model and its GPUs, before any job starts.

        Args:
            allocation: of the rule smoke_test.

        Raises:
            GateError: vLLM could not start so, and the configuration does not say to go on.
        """
        config, gpus = self.config, allocation.gpus_per_node()
        base = config["model"]["base"]
        there = config["model"]["tiny"] or config["plan"]["model"] or (base and Path(base, "config.json").is_file())
        if config["accelerator"] == "cpu" or not gpus or not there:
            return
        memory = config["plan"]["gpu_memory_gib"] * GIB
        found = deployment.plan(planning.model_of(config), self.served(), config["convert"]["dtype"], memory, gpus)
        gate.check_deployment(found, config["plan"]["on_misfit"])

    def render_arguments(self, rule: str) -> str:
        """Arguments of render_sbatch.py that say where things lie and what runs them."""
        words = ["--results", self.results, "--logs", self.logs, "--accelerator", self.config["accelerator"]]
        words += self.environment(stages.environment_of(rule)).words()
        if rule in ("train", "rehearse") and self.config["preflight"]["in_training"]:
            words += ["--preflight", self.settings("preflight")]
        return shlex.join(words)

    def tokenizer(self) -> str:
        """Folder with tokenizer.json."""
        return self.config["data"]["tokenizer"] or self.config["model"]["base"] or f"{self.results}/base"

    def tokenizer_is_made(self) -> bool:
        """Whether the tokenizer comes with the tiny model that prepare_model makes."""
        return self.tokenizer() == f"{self.results}/base"

    # ---- external files

    def state_of_sources(self) -> list[str]:
        """Name, size and time of every source file and evaluation set: a changed one re-runs prepare_data."""
        patterns = [*self._patterns(), *self._evaluation_sets()]
        return [_state(path) for pattern in patterns for path in _matches(pattern)]

    def state_of_base(self) -> str:
        """State of the base model's config and index."""
        base = self.config["model"]["base"]
        return ", ".join(_state(f"{base}/{n}") for n in ("config.json", "model.safetensors.index.json") if base)

    def state_of_prompts(self) -> str:
        """State of the smoke test's samples and of the base's measurement."""
        paths = (self._own_prompts(), self.config["smoke_test"]["base_measured"])
        return ", ".join(_state(path) for path in paths if path)

    def state_of_tasks(self) -> str:
        """State of the evaluation's files, as far as the configuration names them."""
        tasks = self.config["evaluate"]["tasks"].values()
        return ", ".join(_state(path) for task in tasks for path in (task["data"], task["lm_eval"]) if path)

    def _own_prompts(self) -> str | None:
        """The smoke test's prompts, where they are not those that prepare_data holds out."""
        prompts = self.config["smoke_test"]["prompts"]
        return None if prompts == f"{self.results}/data/{PROMPTS_FILE}" else prompts

    def paths_of_nodes(self, rules: Collection[str]) -> list[tuple[str, str]]:
        """Key and path of what jobs of ``rules`` read or write outside the project, for ``starting.check_shared``."""
        read = [(key, path) for rule, key, path in self._named() if rule in rules and path]
        return list(dict.fromkeys([("results", self.config["results"]), *read]))

    def _named(self) -> list[tuple[str, str, str | None]]:
        """Rule, key and path of external files."""
        config = self.config
        named = [("prepare_data", f"data.sources[{i}]", pattern) for i, pattern in enumerate(self._patterns())]
        sets = enumerate(self._evaluation_sets())
        named += [("prepare_data", f"data.evaluation_sets[{number}]", pattern) for number, pattern in sets]
        if not config["plan"]["model"]:  # else its shape stands for the base
            named += [(rule, "model.base", config["model"]["base"]) for rule in ("plan", "refine_plan")]
        named += [
            ("tokenize_data", "data.tokenizer", config["data"]["tokenizer"]),
            ("prepare_model", "model.base", config["model"]["base"]),
            ("smoke_test", "smoke_test.prompts", self._own_prompts()),
            ("smoke_test", "smoke_test.base_measured", config["smoke_test"]["base_measured"]),
        ]
        for name, task in config["evaluate"]["tasks"].items():
            keys = [(f"evaluate.tasks.{name}.{key}", task[key]) for key in ("data", "lm_eval")]
            named += [(rule, *key) for rule in ("smoke_test", "evaluate", "evaluate_base") for key in keys]
        return named

    def missing_paths(self, rules: Collection[str] = stages.CHAIN) -> list[str]:
        """One sentence for each external path that does not exist and that one of ``rules`` reads."""
        envs, named = self.config["envs"], self._named()
        for stage in environments.CHOSEN:
            own = envs.get(stage)
            if (container := self.environment(stage).container) and (image := container.image_path()):
                named += [(rule, container.key, str(image)) for rule in stages.run_by(stage)]
            elif own and not container and not own["activate"]:  # an activated one may exist on compute nodes only
                named += [(rule, f"envs.{stage}.python", own["python"]) for rule in stages.run_by(stage)]
        if self.evaluated() and (own := envs["evaluate"]):
            named += [(rule, "envs.evaluate.python", own["python"]) for rule in ("smoke_test", "evaluate")]
        missing = [
            f"{key}: {path} does not exist{_near(path)}"
            for rule, key, path in named
            if rule in rules and path and not _matches(path)
        ]
        return list(dict.fromkeys(missing))  # several rules read the same path

    def check_external_paths(self, rules: Collection[str] = stages.CHAIN) -> None:
        """Raises BadInputError naming every missing path that ``rules`` read."""
        readers = [("train", "train"), ("rehearse", "train"), *((rule, "serve") for rule in stages.run_by("serve"))]
        for rule, section in readers:
            if rule in rules and (path := self.config[section]["secrets_file"]):
                secrets_file.check(Path(path))
        if problems := self.missing_paths(rules):
            raise BadInputError(
                "the configuration names files that do not exist\n" + "\n".join(f"  - {p}" for p in problems),
                "correct the path in the configuration (relative paths start at the project's folder)",
            )
        if problems := self.unseen_in_containers(rules):
            raise BadInputError(
                "containers would not see what their stages need\n" + "\n".join(f"  - {p}" for p in problems),
                "mount it under the path that it has outside (docs/containers.md)",
            )

    def unseen_in_containers(self, rules: Collection[str]) -> list[str]:
        """One sentence for each path that a container of ``rules`` must see and does not."""
        config, found = self.config, []
        for kind in environments.CHOSEN:
            environment, used = self.environment(kind), set(stages.run_by(kind)) & set(rules)
            if not used or not environment.container:
                continue
            paths = [("the project", ".", False), ("results", config["results"], True)]
            if "/" in environment.python and not environment.python.startswith("/"):
                paths.append((f"envs.{kind}.python", str(Path(environment.python).parent), False))
            own = [tier["path"] for tier in config["train"]["checkpoints"] if kind == "train" and tier["path"]]
            paths += [("train.checkpoints", path, True) for path in own if "$" not in path]
            named = [("model.base", config["model"]["base"])] if kind == "train" else []
            named += [(key, path) for rule, key, path in self._named() if rule in used and kind == "serve"]
            named += [(f"{kind}.secrets_file", config[kind]["secrets_file"])]
            named += [("serve.api_key_file", config["serve"]["api_key_file"])] if kind == "serve" else []
            paths += [(key, path, False) for key, path in named if path]
            found += environment.container.unseen(paths)
        return list(dict.fromkeys(found))

    def check_shapes(self, allocations: dict[str, Allocation]) -> None:
        """Raises BadInputError where training's or serving's parallel sizes do not fit the profile's nodes and GPUs."""
        train = allocations.get("train")
        problems = []
        if self.config["accelerator"] == "cuda" and train and (gpus := train.gpus_per_node()):
            size = self.config["train"]["sequence_parallel_size"]
            if gpus % size:
                allowed = ", ".join(str(n) for n in range(1, gpus + 1) if gpus % n == 0)
                problems.append(
                    f"train.sequence_parallel_size: {size} does not divide the {gpus} GPUs of a node "
                    f"(profile, set-resources: train: gres: {train.gres}); allowed: {allowed}"
                )
        if preflight := allocations.get("preflight"):
            problems += shapes.of_preflight(self.config, preflight)
        for rule in stages.run_by("serve"):
            if serve := allocations.get(rule):
                problems += shapes.of_serving(self.config, rule, serve)
        if problems:
            raise BadInputError("configuration and profile do not fit\n" + "\n".join(f"  - {p}" for p in problems))

    def _evaluation_sets(self) -> list[str]:
        return [one if isinstance(one, str) else one["path"] for one in self.config["data"]["evaluation_sets"]]

    def _patterns(self) -> list[str]:
        sources = self.config["data"]["sources"]
        return [split_argument(source)[1] if isinstance(source, str) else source["path"] for source in sources]


def _matches(pattern: str) -> list[str]:
    return sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207  patterns may be absolute


def _state(path: str | Path) -> str:
    try:
        status = Path(path).stat()
    except OSError:
        return f"{path}: missing"
    return f"{path}: {status.st_size} bytes, {status.st_mtime_ns}"


def _near(path: str | Path) -> str:
    folder = Path(path).parent
    if not folder.is_dir():
        return f" (nor does its folder {folder})"
    near = difflib.get_close_matches(Path(path).name, [p.name for p in folder.iterdir()], n=1)
    return f"; did you mean {folder / near[0]}?" if near else ""
