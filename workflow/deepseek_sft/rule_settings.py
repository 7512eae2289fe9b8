"""What each rule's script is given: words of its command line, or settings as JSON.

One function a rule; each gives what shapes the rule's result, then what only steers its run. Words and keys of begun
experiments stay as they are: of what came later only what is not at its default is said.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from . import config as configuration
from . import engines, environments
from .data.held_out_prompts import HELD_OUT
from .files import canonical_json
from .planning import duration
from .planning.settings import Training
from .settings.evaluate import GATES

if TYPE_CHECKING:
    from .experiment import Experiment

Words = tuple[list[Any], list[Any]]
Values = tuple[dict[str, Any], dict[str, Any]]


def _prepare_data(experiment: "Experiment") -> Words:
    data, results = experiment.config["data"], experiment.results
    sources = [source if isinstance(source, dict) else {"path": source} for source in data["sources"]]
    weights = [source.get("weight", 1) for source in sources]
    words = ["--source", *(f"{one['format']}={one['path']}" if "format" in one else one["path"] for one in sources)]
    words += ["--weights", *weights] if set(weights) != {1} else []
    words += ["--output", f"{results}/data/train.jsonl", "--rejects", f"{results}/data/rejects.jsonl"]
    words += ["--on-invalid", data["on_invalid"]]
    words += ["--fields", *(f"{name}={meaning}" for name, meaning in data["fields"].items())] if data["fields"] else []
    words += _unless(data, "unused_fields", "warn") + _unless(data, "on_empty_source", "warn")
    return words + _evaluation_sets(data) + _unless(data, "held_out", 0), []


def _evaluation_sets(data: dict[str, Any]) -> list[Any]:
    if not data["decontaminate"]:
        return []
    sets = [one if isinstance(one, str) or one["fields"] else one["path"] for one in data["evaluation_sets"]]
    texts = [one if isinstance(one, str) else canonical_json(one) for one in sets]
    return ["--decontaminate", data["decontaminate"], "--evaluation-sets", *texts]


def _tokenize_data(experiment: "Experiment") -> Words:
    data, results = experiment.config["data"], experiment.results
    words = ["--input", f"{results}/data/train.jsonl", "--tokenizer", experiment.tokenizer()]
    words += ["--template", data["template"], *_unless(data, "on_template_difference", "fail")]
    words += ["--output", f"{results}/data/tokens", "--rejects", f"{results}/data/tokenize_rejects.jsonl"]
    words += ["--statistics", f"{results}/data/statistics.json", "--max-length", data["max_length"]]
    words += ["--history-reasoning", data["history_reasoning"], "--on-too-long", data["on_too_long"]]
    words += ["--pack"] if data["pack"] else []
    return words + (
        ["--held-out", f"{results}/data/{HELD_OUT}"] if experiment.config["train"]["validation"] else []
    ), []


def _prepare_model(experiment: "Experiment") -> Words:
    model, words = experiment.config["model"], ["--output", f"{experiment.results}/base"]
    if model["tiny"] is not None:
        sizes = [(f"--{key.replace('_', '-')}", value) for key, value in sorted(model["tiny"].items())]
        words += ["--tiny", *(word for size in sizes for word in size)]
    else:
        # kept, since whether the served model gets that layer may be decided after training
        words += ["--base", model["base"], "--mtp", "keep"]
        words += ["--layers", model["layers"]] if model["layers"] else []
    return words, ["--replace"]  # a folder made from other inputs gives way once the new one is complete


def _convert(experiment: "Experiment") -> Words:
    convert, (kind, _) = experiment.config["convert"], _verify(experiment)
    steering = ["--replace", "--memory", convert["memory"], "--swap", "auto" if convert["swap"] else "off"]
    words = ["--output", f"{experiment.results}/model", *kind, "--max-shard-size", convert["max_shard_size"]]
    return words, [*steering, "--workers", convert["workers"]]


def _verify(experiment: "Experiment") -> Words:
    convert = experiment.config["convert"]
    return ["--dtype", convert["dtype"], "--mtp", convert["mtp"]], ["--full"] if convert["full_check"] else []


def _snapshot(experiment: "Experiment") -> Words:
    (_, _, *words), steering = _convert(experiment)  # to a folder of its own
    return ["--checkpoint", experiment.config["convert"]["checkpoint"], *words], steering + _verify(experiment)[1]


def _unless(values: dict[str, Any], key: str, usual: Any) -> list[Any]:
    return [f"--{key.replace('_', '-')}", values[key]] if values[key] != usual else []


def _plan(experiment: "Experiment") -> Values:
    (train, others) = _refine_plan(experiment)
    # What is told of serving and evaluating makes no plan again: params of begun experiments stay.
    told = {key: others.pop(key) for key in ("serve", "evaluate") if key in others}
    return others | train, {"train": others["train"], **told}


def _refine_plan(experiment: "Experiment") -> Values:
    """What makes this plan again is a part of train's own settings: whatever does so trains again anyway."""
    config = experiment.config
    used = [*Training.train_keys(), "ranks_per_node", "hang_minutes"]
    shaping, steering = _shaping_training(config), configuration.operational("train", config)
    others = {
        "accelerator": config["accelerator"],
        "results": config["results"],
        "data": {"max_length": config["data"]["max_length"]}
        | ({"pack": True} if config["data"]["pack"] else {})
        | ({"held_out": config["data"]["held_out"]} if config["train"]["validation"] else {}),
        "model": configuration.settled("model", config),
        "convert": {"dtype": config["convert"]["dtype"]},
        "plan": configuration.settled("plan", config),
        "train": {key: steering[key] for key in used if key in steering},
        "serve": config["serve"],
        **({"evaluate": config["evaluate"]} if config["evaluate"]["tasks"] else {}),
    }
    return {"train": {key: shaping[key] for key in used if key in shaping} | _other_engine(config)}, others


def _other_engine(config: dict[str, Any]) -> dict[str, str]:
    """The engine, where it is not the one that plans and preflights of begun experiments mean without naming it."""
    engine = config["train"]["engine"]
    return {} if engine == engines.DEFAULT else {"engine": engine}


def preflight(experiment: "Experiment") -> Values:
    """The floor of the bandwidth follows from the network that the plan assumes."""
    config = experiment.config
    chosen = {key: value for key, value in configuration.settled("preflight", config).items() if key != "in_training"}
    if chosen["all_reduce_min_gb_per_second"] is None and config["accelerator"] == "cuda":
        least = duration.LEAST_NETWORK_SHARE * config["plan"]["node_gb_per_second"]
        chosen["all_reduce_min_gb_per_second"] = round(least, 3)
    if config["train"]["attention"] == "flash":
        chosen["imports"] = ["flash_attn"]
    if own := next((tier["path"] for tier in config["train"]["checkpoints"] if tier["path"]), None):
        chosen["checkpoints"] = own
    chosen |= _other_engine(config)
    return chosen, {key: config["train"][key] for key in ("environment", "ranks_per_node")}


def _train(experiment: "Experiment") -> Values:
    config = experiment.config
    peak = config["plan"]["gpu_tflops"] if config["accelerator"] == "cuda" else None
    return _shaping_training(config), configuration.operational("train", config) | {"gpu_tflops": peak}


def _shaping_training(config: dict[str, Any]) -> dict[str, Any]:
    """Of unpacked rows each is a sample: what accumulation counts makes no difference, and no other run."""
    shaping = configuration.shaping("train", config)
    return shaping if config["data"]["pack"] else {k: v for k, v in shaping.items() if k != "accumulate_by"}


def _serve(experiment: "Experiment") -> Values:
    """The test compares the prompts that the server renders with those of training."""
    config = experiment.config
    smoke = configuration.shaping("smoke_test", config) | {"template": config["data"]["template"]}
    return configuration.shaping("serve", config) | {"smoke_test": smoke}, configuration.operational("serve", config)


def _smoke_test(experiment: "Experiment") -> Values:
    """Tasks that its job asks as well make no other smoke test."""
    shaping, steering = _serve(experiment)
    return shaping, steering | ({"evaluation": evaluation(experiment)} if experiment.evaluated() else {})


def evaluation(experiment: "Experiment") -> dict[str, Any]:
    """Section ``evaluate``, with what it is asked of."""
    config = experiment.config
    served = {key: config["serve"][key] for key in ("reasoning_parser", "dtype", "max_model_len")}
    own = {"python": experiment.environment(environments.EVALUATE).python, "template": config["data"]["template"]}
    return {**config["evaluate"], **own, "served": served}


def _evaluate(experiment: "Experiment") -> Values:
    shaping, steering = _serve(experiment)
    whole = evaluation(experiment)
    del shaping["smoke_test"]
    asked = {key: whole[key] for key in ("tasks", "template", "served")}
    return shaping | {"evaluation": asked}, steering | {"evaluation": whole}


def _evaluate_base(experiment: "Experiment") -> Values:
    """Gates are the model's."""
    shaping, steering = _evaluate(experiment)
    asked = shaping["evaluation"]
    tasks = {name: {k: v for k, v in task.items() if k not in GATES} for name, task in asked["tasks"].items()}
    return shaping | {"evaluation": asked | {"tasks": tasks}}, steering


ARGUMENTS: dict[str, Callable[["Experiment"], Words]] = {
    "prepare_data": _prepare_data,
    "tokenize_data": _tokenize_data,
    "prepare_model": _prepare_model,
    "convert_checkpoint": _convert,
    "verify_model": _verify,
    "snapshot": _snapshot,
}
SETTINGS: dict[str, Callable[["Experiment"], Values]] = {
    "plan": _plan,
    "refine_plan": _refine_plan,
    "preflight": preflight,
    **dict.fromkeys(("rehearse", "train"), _train),
    "smoke_test": _smoke_test,
    "serve": _serve,
    "evaluate": _evaluate,
    "evaluate_base": _evaluate_base,
}
