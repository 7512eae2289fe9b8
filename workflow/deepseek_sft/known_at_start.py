"""What a stage would refuse days later although it is known when an experiment starts: gates, the template."""

from collections.abc import Collection
from pathlib import Path

from . import stages
from .checkpoint.base_model import lacks_prediction_layer
from .errors import BadInputError
from .experiment import Experiment
from .planning import load as planning
from .serving import gates


def unjudged_gates(experiment: Experiment, rules: Collection[str] = stages.CHAIN) -> list[gates.Problem]:
    """What ``rules`` would refuse after the training although it is known now; see ``serving/gates.py``.

    Raises:
        BadInputError: the smoke test's prompts or the base's measurement cannot be read.
    """
    config = experiment.config
    found, smoke, base = [], config["smoke_test"], config["model"]["base"]
    named = [path for path in (smoke["prompts"], smoke["base_measured"]) if path]
    if "smoke_test" in rules and all(Path(path).is_file() for path in named):
        model = Path(base, "config.json").is_file() if base else True
        count = (lambda: planning.model_of(config).total) if model else None
        found += gates.problems(config, Path(experiment.tokenizer()), count)
    copies = "convert_checkpoint" in rules and base and config["convert"]["mtp"] == "copy"
    if copies and lacks_prediction_layer(Path(base)):
        text = f"convert.mtp: copy is not possible, since {base} holds no multi-token-prediction layer"
        found.append(gates.Problem(text, "write convert: {mtp: drop}, or give the complete release as model.base"))
    return found


def gate_warnings(experiment: Experiment) -> list[str]:
    """The same as warnings of a dry run, which may come before the prompts; an error once jobs start."""
    try:
        return [f"{problem.text}; {problem.fix}" for problem in unjudged_gates(experiment)]
    except BadInputError as error:
        return [error.problem]


def check_gates(experiment: Experiment, rules: Collection[str] = stages.CHAIN) -> None:
    """Raises BadInputError where a gate of ``rules`` is set and could not be judged once training is done."""
    if found := unjudged_gates(experiment, rules):
        raise BadInputError(
            "; ".join(problem.text for problem in found), "; ".join(dict.fromkeys(problem.fix for problem in found))
        )


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
