"""What a stage would refuse days later although it is known when an experiment starts: gates, the template."""

import re
from collections.abc import Collection
from pathlib import Path

from . import rule_settings, stages
from .convert.base_model import lacks_prediction_layer
from .errors import BadInputError
from .evaluation import gate_inputs
from .experiment import Experiment
from .planning import load as planning
from .preflight import cuda_stack, software
from .settings import reading
from .settings.served_evaluation import ServedEvaluation
from .task_evaluation import items, stage


def unjudged_gates(experiment: Experiment, rules: Collection[str] = stages.CHAIN) -> list[gate_inputs.Problem]:
    """What ``rules`` would refuse after the training although it is known now; see ``evaluation/gate_inputs.py``.

    Raises:
        BadInputError: the smoke test's prompts or the base's measurement cannot be read.
    """
    config = experiment.config
    found, smoke, base = [], config["smoke_test"], config["model"]["base"]
    named = [path for path in (smoke["prompts"], smoke["base_measured"]) if path]
    if "smoke_test" in rules and all(Path(path).is_file() for path in named):
        model = Path(base, "config.json").is_file() if base else True
        count = (lambda: planning.model_of(config).total) if model else None
        found += gate_inputs.problems(config, Path(experiment.tokenizer()), count)
    copies = "convert_checkpoint" in rules and base and config["convert"]["mtp"] == "copy"
    if copies and lacks_prediction_layer(Path(base)):
        text = f"convert.mtp: copy is not possible, since {base} holds no multi-token-prediction layer"
        found.append(
            gate_inputs.Problem(text, "write convert: {mtp: drop}, or give the complete release as model.base")
        )
    return found


def gate_warnings(experiment: Experiment) -> list[str]:
    """The same as warnings of a dry run, which may come before the prompts; an error once jobs start."""
    try:
        found = [f"{problem.text}; {problem.fix}" for problem in unjudged_gates(experiment)]
        if not any(key.startswith("evaluate.") for key in experiment.missing_paths()):
            check_tasks(experiment)
        return found
    except BadInputError as error:
        return [error.problem]


def check_gates(experiment: Experiment, rules: Collection[str] = stages.CHAIN) -> None:
    """Raises BadInputError where a gate of ``rules`` is set and could not be judged once training is done."""
    if found := unjudged_gates(experiment, rules):
        raise BadInputError(
            "; ".join(problem.text for problem in found), "; ".join(dict.fromkeys(problem.fix for problem in found))
        )


EVALUATING = ("smoke_test", "evaluate", "evaluate_base")


def check_tasks(experiment: Experiment, rules: Collection[str] = stages.CHAIN) -> None:
    """Raises BadInputError where a task of the evaluation could not be asked, or its answers not judged."""
    if set(EVALUATING) & set(rules):
        items.check(experiment.config["evaluate"]["tasks"])


def evaluated_without_nodes(experiment: Experiment, rules: Collection[str], dry_run: bool) -> set[str]:
    """Rules of the evaluation that need no nodes in this start; see ``task_evaluation/stage.py``.

    What kept an earlier smoke test's job from evaluating is forgotten where the model is served for it now.
    """
    if not set(EVALUATING) & set(rules) or not experiment.evaluated():
        return set()
    results = Path(experiment.results)
    settings = reading.parse(ServedEvaluation, rule_settings.evaluation(experiment), "evaluate")
    try:
        found = stage.without_nodes(settings, results, rules)
    except BadInputError:  # a task that cannot be read: refused once jobs start
        return set()
    if not dry_run and "evaluate" in rules and "evaluate" not in found:
        stage.reason(results).unlink(missing_ok=True)
    return found


DRIVER = Path("/proc/driver/nvidia/version")


def check_stack(experiment: Experiment, rules: Collection[str] = stages.CHAIN, driver: Path = DRIVER) -> list[str]:
    """Look at training's environment from here, where ``train`` is to run on GPUs and the environment is built.

    Args:
        driver: what the kernel says of NVIDIA's driver; absent where this machine has none.

    Returns:
        What a person should know: this machine may differ from the nodes, whose preflight judges.

    Raises:
        BadInputError: a package is missing, so everywhere; torch is a build for CPUs; no libcuda in ``cuda_compat``.
    """
    own = experiment.config["envs"]["train"] or {}
    python = Path(experiment.environment("train").python)
    if "train" not in rules or experiment.config["accelerator"] != "cuda" or own.get("activate"):
        return []
    if experiment.environment("train").container:  # preflight looks, inside it
        return []
    compatibility = cuda_stack.compatibility_driver(own.get("cuda_compat") or "")
    if (folder := own.get("cuda_compat")) and Path(folder).is_dir() and compatibility is None:
        raise BadInputError(
            f"envs.train.cuda_compat: {folder} holds no libcuda.so.1 that names its version",
            "give the folder of the forward-compatibility package that holds it (envs/README.md)",
        )
    if not python.exists():  # built by a job of its own, or on the nodes' disks
        return []
    imports = rule_settings.preflight(experiment)[0].get("imports", ())
    engine = experiment.config["train"]["engine"]
    variables = {name: str(value) for name, value in experiment.config["train"]["environment"].items()}
    error = software.import_error(imports, str(python), engine=engine, variables=variables)
    if "No module named" in error:
        raise BadInputError(
            f"{python}: {error}",
            "install it there, or take the locked environment (envs: {train: null}); flash-attn is needed by "
            "train.attention: flash alone",
        )
    found = [f"{python} on this machine: {error}; preflight tries it on the nodes"] if error else []
    torch = next(python.parent.parent.glob("lib/python*/site-packages/torch"), None)
    cuda = cuda_stack.built_for(torch) if torch else None
    if cuda == 0:
        raise BadInputError(
            f"{python} holds a torch that was built for CPUs alone",
            "take the environment train-cuda, or write accelerator: cpu",
        )
    said = driver.read_text() if driver.exists() else ""
    if cuda and (version := re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", said)):
        wrong = cuda_stack.problems(cuda, version[1], None, compatibility)
        found += [f"this machine: {text}; preflight looks at the nodes' drivers" for text in wrong]
    return found


def check_template(experiment: Experiment, rules: Collection[str] = stages.CHAIN) -> list[str]:
    """Compare the template with the base's own, where ``tokenize_data`` is to run and the base is there already.

    Returns:
        What a person should know.

    Raises:
        GateError: the prompts differ, and the configuration does not say to go on.
        BadInputError: ``auto``, and no template fits; a file of the base cannot be read.
    """
    data, base = experiment.config["data"], experiment.config["model"]["base"]
    folders = dict.fromkeys(folder for folder in (data["tokenizer"], base) if folder)
    if "tokenize_data" not in rules or not folders:
        return []
    from .data.template_check import check_folders  # reads a tokenizer: only where it is needed

    return check_folders([Path(folder) for folder in folders], data["template"], data["on_template_difference"])
