"""What each rule's script is given: words of its command line, or JSON; what shapes its result, and the rest.

One function a rule, in four tables that ``Experiment`` looks into. Words and keys of begun experiments stay as they
are: of what came later only what is not at its default is said.
"""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from . import config as configuration
from .planning import duration
from .planning.settings import Training

if TYPE_CHECKING:
    from .experiment import Experiment

Words = Iterable[Any]
Values = dict[str, Any]


def _prepare_data(experiment: "Experiment") -> Words:
    data, results = experiment.config["data"], experiment.results
    weights = [1 if isinstance(source, str) else source.get("weight", 1) for source in data["sources"]]
    yield from ("--source", *map(_source, data["sources"]))
    yield from ("--weights", *weights) if set(weights) != {1} else ()
    yield from ("--output", f"{results}/data/train.jsonl", "--rejects", f"{results}/data/rejects.jsonl")
    yield from ("--on-invalid", data["on_invalid"])
    yield from (
        ("--fields", *(f"{name}={meaning}" for name, meaning in data["fields"].items())) if data["fields"] else ()
    )
    yield from _unless(data, "unused_fields", "warn")
    yield from _unless(data, "on_empty_source", "warn")


def _tokenize_data(experiment: "Experiment") -> Words:
    data, results = experiment.config["data"], experiment.results
    yield from ("--input", f"{results}/data/train.jsonl", "--tokenizer", experiment.tokenizer())
    yield from ("--template", data["template"])
    yield from _unless(data, "on_template_difference", "fail")
    yield from ("--output", f"{results}/data/tokens", "--rejects", f"{results}/data/tokenize_rejects.jsonl")
    yield from ("--statistics", f"{results}/data/statistics.json", "--max-length", data["max_length"])
    yield from ("--history-reasoning", data["history_reasoning"], "--on-too-long", data["on_too_long"])
    yield from ["--pack"] if data["pack"] else ()


def _prepare_model(experiment: "Experiment") -> Words:
    model = experiment.config["model"]
    yield from ("--output", f"{experiment.results}/base")
    if model["tiny"] is not None:
        yield "--tiny"
        for key, value in sorted(model["tiny"].items()):
            yield from (f"--{key.replace('_', '-')}", value)
        return
    # kept, since whether the served model gets that layer may be decided after training
    yield from ("--base", model["base"], "--mtp", "keep")
    yield from ("--layers", model["layers"]) if model["layers"] else ()


def _model_format(experiment: "Experiment") -> Words:
    """What convert_checkpoint makes and verify_model expects."""
    convert = experiment.config["convert"]
    return ["--dtype", convert["dtype"], "--mtp", convert["mtp"]]


def _convert(experiment: "Experiment") -> Words:
    size = experiment.config["convert"]["max_shard_size"]
    return ["--output", f"{experiment.results}/model", *_model_format(experiment), "--max-shard-size", size]


def _snapshot(experiment: "Experiment") -> Words:
    convert = experiment.config["convert"]
    words = ["--checkpoint", convert["checkpoint"], *_model_format(experiment)]
    return [*words, "--max-shard-size", convert["max_shard_size"]]


def _replacing(experiment: "Experiment") -> Words:
    """A folder made from other inputs gives way once the new one is complete."""
    return ["--replace"]


def _converting(experiment: "Experiment") -> Words:
    convert = experiment.config["convert"]
    words = ["--memory", convert["memory"], "--swap", "auto" if convert["swap"] else "off"]
    return [*_replacing(experiment), *words, "--workers", convert["workers"]]


def _verifying(experiment: "Experiment") -> Words:
    return ["--full"] if experiment.config["convert"]["full_check"] else []


def _plan(experiment: "Experiment") -> tuple[Values, Values]:
    """The part of train's settings that a plan depends on and that makes it again; the rest of what it depends on."""
    config = experiment.config
    used = [*Training.train_keys(), "ranks_per_node", "hang_minutes"]
    shaping, steering = configuration.shaping("train", config), configuration.operational("train", config)
    others = {
        "accelerator": config["accelerator"],
        "results": config["results"],
        "data": {"max_length": config["data"]["max_length"]},
        "model": configuration.settled("model", config),
        "convert": {"dtype": config["convert"]["dtype"]},
        "plan": configuration.settled("plan", config),
        "train": {key: steering[key] for key in used if key in steering},
    }
    return {"train": {key: shaping[key] for key in used if key in shaping}}, others


def _plan_shaping(experiment: "Experiment") -> Values:
    train, others = _plan(experiment)
    return others | train


def _plan_steering(experiment: "Experiment") -> Values:
    return {"train": _plan(experiment)[1]["train"]}


def _refine_shaping(experiment: "Experiment") -> Values:
    """A part of train's own settings: whatever makes this plan again trains again anyway."""
    return _plan(experiment)[0]


def _refine_steering(experiment: "Experiment") -> Values:
    return _plan(experiment)[1]


def preflight(experiment: "Experiment") -> Values:
    """Settings of preflight; the floor of the bandwidth follows from the network that the plan assumes."""
    settled = configuration.settled("preflight", experiment.config)
    chosen = {key: value for key, value in settled.items() if key != "in_training"}
    if chosen["all_reduce_min_gb_per_second"] is None and experiment.config["accelerator"] == "cuda":
        least = duration.NETWORK_SHARE[0] * experiment.config["plan"]["node_gb_per_second"]
        chosen["all_reduce_min_gb_per_second"] = round(least, 3)
    if experiment.config["train"]["attention"] == "flash":
        chosen["imports"] = ["flash_attn"]
    return chosen


def _preflight_steering(experiment: "Experiment") -> Values:
    return {key: experiment.config["train"][key] for key in ("environment", "ranks_per_node")}


def _train(experiment: "Experiment") -> Values:
    return configuration.shaping("train", experiment.config)


def _train_steering(experiment: "Experiment") -> Values:
    peak = experiment.config["plan"]["gpu_tflops"] if experiment.config["accelerator"] == "cuda" else None
    return configuration.operational("train", experiment.config) | {"gpu_tflops": peak}


def _serve(experiment: "Experiment") -> Values:
    """The test compares the prompts that the server renders with those of training."""
    smoke = configuration.shaping("smoke_test", experiment.config) | {"template": experiment.config["data"]["template"]}
    return configuration.shaping("serve", experiment.config) | {"smoke_test": smoke}


def _serve_steering(experiment: "Experiment") -> Values:
    return configuration.operational("serve", experiment.config)


def _source(source: str | dict[str, Any]) -> str:
    return source if isinstance(source, str) else f"{source.get('format', 'auto')}={source['path']}"


def _unless(values: Values, key: str, usual: Any) -> Words:
    return [f"--{key.replace('_', '-')}", values[key]] if values[key] != usual else []


ARGUMENTS: dict[str, Callable[["Experiment"], Words]] = {
    "prepare_data": _prepare_data,
    "tokenize_data": _tokenize_data,
    "prepare_model": _prepare_model,
    "convert_checkpoint": _convert,
    "verify_model": _model_format,
    "snapshot": _snapshot,
}
STEERING_ARGUMENTS: dict[str, Callable[["Experiment"], Words]] = {
    "prepare_model": _replacing,
    "convert_checkpoint": _converting,
    "verify_model": _verifying,
    "snapshot": lambda experiment: [*_converting(experiment), *_verifying(experiment)],
}
SETTINGS: dict[str, tuple[Callable[["Experiment"], Values], Callable[["Experiment"], Values]]] = {  # shaping, steering
    "plan": (_plan_shaping, _plan_steering),
    "refine_plan": (_refine_shaping, _refine_steering),
    "preflight": (preflight, _preflight_steering),
    "rehearse": (_train, _train_steering),
    "train": (_train, _train_steering),
    "smoke_test": (_serve, _serve_steering),
    "serve": (_serve, _serve_steering),
}
