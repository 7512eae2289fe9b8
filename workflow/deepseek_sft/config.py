"""The configuration of an experiment: defaults, validation with errors to act on, and what each rule sees of it.

The schema (workflow/schemas/config.schema.yaml, JSON Schema 2020-12) is the one source of keys, defaults and
documentation.
"""

import copy
import difflib
import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import yaml

from . import secrets_file
from .errors import BadInputError
from .planning import gpus
from .training import deepspeed_keys
from .training.settings import STEERING

SCHEMA_FILE = Path(__file__).resolve().parents[1] / "schemas" / "config.schema.yaml"

# Keys that shape how a run is operated, not what it produces: changing them re-runs nothing.
OPERATIONAL = {
    "train": {*STEERING, "environment", "spare_nodes", "secrets_file"},
    "convert": {"checkpoint", "memory", "swap", "workers", "full_check"},
    "serve": {"ready_timeout_s", "stop_grace_s", "host", "port", "api_key_file", "secrets_file"},
}


@functools.cache
def schema() -> dict[str, Any]:
    """The configuration's JSON Schema; not to be changed."""
    return yaml.safe_load(SCHEMA_FILE.read_text(encoding="utf-8"))


def resolve(config: dict[str, Any]) -> dict[str, Any]:
    """Fill defaults in and validate.

    Args:
        config: the merged configuration files.

    Returns:
        A new dictionary with every key of the schema.

    Raises:
        BadInputError: every problem found, each with the key's path, its value, what is allowed and what to write.
    """
    tree = schema()
    given = copy.deepcopy(config)
    if isinstance(given.get("plan"), dict):
        given["plan"] = gpus.fill_in(given["plan"])
    resolved = _with_defaults(given, tree)
    problems = [_explain(error, tree) for error in jsonschema.Draft202012Validator(tree).iter_errors(resolved)]
    if not problems:
        problems = list(_contradictions(resolved))
    if problems:
        raise BadInputError("the configuration is not valid\n" + "\n".join(f"  - {p}" for p in problems))
    return resolved


def merge(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """``second`` over ``first``, key by key, as Snakemake merges configuration files."""
    merged = dict(first)
    for key, value in second.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def operational(section: str, config: dict[str, Any]) -> dict[str, Any]:
    """The operational keys of a section."""
    return {key: value for key, value in settled(section, config).items() if key in OPERATIONAL[section]}


def shaping(section: str, config: dict[str, Any]) -> dict[str, Any]:
    """The keys of a section that decide its result."""
    values = settled(section, config)
    return {key: value for key, value in values.items() if key not in OPERATIONAL.get(section, ())}


def settled(section: str, config: dict[str, Any]) -> dict[str, Any]:
    """A section without the keys that came later (``x-later`` in the schema) and are at their defaults.

    Such a key changes no params and no run id of experiments that were begun before it existed. Whoever reads the
    settings of a rule fills its default in.
    """
    return _without_later_defaults(config[section], schema()["properties"][section])


def _without_later_defaults(value: Any, node: dict[str, Any]) -> Any:
    if not isinstance(value, dict):
        return value
    known = node.get("properties", {})
    return {
        key: _without_later_defaults(entry, known.get(key, {}))
        for key, entry in value.items()
        if not (known.get(key, {}).get("x-later") and entry == known[key].get("default"))
    }


def _with_defaults(value: Any, node: dict[str, Any]) -> Any:
    if node.get("type") == "number" and isinstance(value, str):
        try:
            return float(value)  # YAML 1.1 reads 2e-7 (no dot, or no sign) as text
        except ValueError:
            return value
    if isinstance(value, dict) and "properties" in node:
        for key, child in node["properties"].items():
            if value.get(key) is None and "default" in child and not _nullable(child):
                value[key] = copy.deepcopy(child["default"])  # `train:` with nothing below it is null in YAML
            elif key not in value and "default" in child:
                value[key] = copy.deepcopy(child["default"])
            elif key not in value and child.get("type") == "object":
                value[key] = {}
            if key in value:
                value[key] = _with_defaults(value[key] if value[key] is not None or _nullable(child) else {}, child)
    return value


def _nullable(node: dict[str, Any]) -> bool:
    kind = node.get("type", [])
    return "null" in (kind if isinstance(kind, list) else [kind])


def _explain(error: jsonschema.ValidationError, tree: dict[str, Any]) -> str:
    """One line for the person who must act."""
    place = ".".join(str(part) for part in error.absolute_path) or "top level"
    if error.validator == "additionalProperties":
        known = list(error.schema.get("properties", {}))
        unknown = sorted(set(error.instance) - set(known))
        return "\n  - ".join(_unknown_key(place, key, error.instance[key], known, tree) for key in unknown)
    if error.validator == "required":
        absent = next(key for key in error.validator_value if key not in error.instance)
        return f"{place}: the key `{absent}` is missing: {_describe(tree, [*error.absolute_path, absent])}"
    allowed = {
        "enum": lambda: f"one of {', '.join(map(_word, error.validator_value))}",
        "type": lambda: f"a value of type {error.validator_value}",
        "pattern": lambda: f"text like {error.validator_value}",
    }.get(error.validator, lambda: f"{error.validator} {error.validator_value}")()
    described = _describe(tree, list(error.absolute_path))
    return f"{place}: {error.instance!r} is not allowed, expected {allowed}. {described}"


def _unknown_key(place: str, key: str, value: Any, known: list[str], tree: dict[str, Any]) -> str:
    path = "" if place == "top level" else f"{place}."
    elsewhere = [section for section, node in tree["properties"].items() if key in node.get("properties", {})]
    if elsewhere:
        return f"{path}{key}: unknown key; `{key}` belongs to `{elsewhere[0]}:`"
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if not near:
        return f"{path}{key}: unknown key; known keys here: {', '.join(known)}"
    shown = value if isinstance(value, (str, int, float, bool)) else "…"
    *parents, leaf = [*([] if not path else place.split(".")), near[0]]
    lines = [f"{'  ' * depth}{name}:" for depth, name in enumerate(parents)]
    lines.append(f"{'  ' * len(parents)}{leaf}: {shown}")
    written = "".join(f"\n        {line}" for line in lines)
    return f"{path}{key}: unknown key; did you mean `{near[0]}`? Write:{written}"


def _describe(tree: dict[str, Any], path: list[Any]) -> str:
    node = tree
    for part in path:
        node = node.get("items", {}) if isinstance(part, int) else node.get("properties", {}).get(part, {})
    return str(node.get("description", "")).strip()


def _not_finite(value: Any, key: str = "") -> Iterator[str]:
    """Keys whose value YAML's ``.nan`` or ``.inf`` makes pass every comparison."""
    if isinstance(value, float) and not math.isfinite(value):
        yield key
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, part in items:
        yield from _not_finite(part, f"{key}.{name}" if key else str(name))


def _paths(config: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Keys that name files or folders, with their values."""
    sources = [source["path"] if isinstance(source, dict) else source for source in config["data"]["sources"]]
    found = [(f"data.sources[{number}]", path) for number, path in enumerate(sources)]
    found += [("results", config["results"]), ("data.tokenizer", config["data"]["tokenizer"])]
    found += [("model.base", config["model"]["base"]), ("plan.model", config["plan"]["model"])]
    found += [(f"smoke_test.{name}", config["smoke_test"][name]) for name in ("prompts", "base_measured")]
    found += [(f"{section}.secrets_file", config[section]["secrets_file"]) for section in ("train", "serve")]
    found.append(("serve.api_key_file", config["serve"]["api_key_file"]))
    for stage, own in config["envs"].items():
        if isinstance(own, dict) and "python" in own:
            found.append((f"envs.{stage}.python", own["python"]))
    yield from ((key, path) for key, path in found if isinstance(path, str))


def _contradictions(config: dict[str, Any]) -> Iterator[str]:
    """Settings that are each allowed but impossible together."""
    for key in _not_finite(config):
        yield f"{key}: is infinite or not a number, which no bound would notice"
    yield from secrets_file.problems(config)
    for key, path in _paths(config):
        if path.rpartition("=")[2].startswith("~"):
            written = Path(path.rpartition("=")[2]).expanduser()
            yield f"{key}: {path!r} begins with ~, which nothing here expands; write {written}"
    model, train, serve = config["model"], config["train"], config["serve"]
    if (model["base"] is None) == (model["tiny"] is None):
        yield "model: give exactly one of `base` (a folder) and `tiny` (make a small random model)"
    if model["layers"] and model["tiny"] is not None:
        yield "model.layers: cuts `model.base`; the tiny model has its own `tiny.layers`"
    if config["envs"]["local"]["train"] and config["envs"]["train"]:
        yield "envs.local.train: copies the locked environment; with one of your own in `envs.train` leave it null"
    yield from deepspeed_keys.problems(train["deepspeed"])
    cpu = config["accelerator"] == "cpu"
    if cpu and train["ranks_per_node"] is None:
        yield "train.ranks_per_node: say how many ranks a node runs, since `accelerator: cpu` has no GPUs to count"
    if not cpu and train["ranks_per_node"] is not None:
        yield "train.ranks_per_node: leave it null, since with `accelerator: cuda` it is the number of GPUs of a node"
    if cpu and train["attention"] == "flash":
        yield "train.attention: `flash` needs GPUs; use `auto` or `sdpa`"
    ranks = train["ranks_per_node"]  # of GPU nodes only the profile knows: Experiment.check_shapes
    size = train["sequence_parallel_size"]
    if cpu and ranks and ranks % size:
        yield (
            f"train.sequence_parallel_size: {size} does not divide the {ranks} ranks of a node; "
            f"allowed: {', '.join(str(n) for n in range(1, ranks + 1) if ranks % n == 0)}"
        )
    if train["optimizer"] == "cpu_adam" and (train["strategy"] != "zero3_offload" or train["offload"] == "parameters"):
        yield (
            "train.optimizer: `cpu_adam` needs optimizer states in host memory; set strategy `zero3_offload` and "
            "offload `both` or `optimizer`"
        )
    if train["on_spike"] != "warn" and train["spike_factor"] is None:
        yield (
            f"train.on_spike: `{train['on_spike']}` needs spikes to be looked for; give `spike_factor` a number "
            "(10.0), or write on_spike: warn"
        )
    preflight = config["preflight"]
    if preflight["all_reduce_min_gb_per_second"] is not None and "all_reduce" in preflight["skip"]:
        yield (
            "preflight.all_reduce_min_gb_per_second: cannot be judged, since `skip` has all_reduce; take it out of "
            "`skip`, or write all_reduce_min_gb_per_second: null"
        )
    if train["spare_nodes"] and not preflight["in_training"]:
        yield (
            "train.spare_nodes: preflight chooses among the nodes; write preflight: {in_training: true}, or "
            "spare_nodes: 0"
        )
    if train["min_learning_rate"] > train["learning_rate"]:
        yield "train.min_learning_rate: is above learning_rate"
    plan = config["plan"]
    if plan["mean_length"] and plan["longest_row"] and plan["mean_length"] > plan["longest_row"]:
        yield "plan.mean_length: is above longest_row"
    convert = config["convert"]
    if convert["dtype"] == "fp8" and cpu:
        yield "convert.dtype: `fp8` is served by GPUs alone, not with `accelerator: cpu`; use `bf16` or `fp32`"
    if convert["mtp"] == "copy" and model["tiny"] is not None:
        yield "convert.mtp: the tiny model has no multi-token-prediction layer to copy; use `drop`"
    if serve["max_model_len"] < config["smoke_test"]["max_tokens"]:
        yield "smoke_test.max_tokens: is above serve.max_model_len, so that no request could be accepted"
    if train["warmup_ratio"] == 1 and train["lr_schedule"] == "cosine":
        yield "train.warmup_ratio: 1 leaves no step for the cosine"


def documentation() -> str:
    """config/README.md: every key with its meaning, unit and default, generated from the schema."""
    lines = [
        "# Configuration",
        "",
        "Generated from `workflow/schemas/config.schema.yaml` by `workflow/scripts/document_config.py`.",
        "Each further `--configfile` is merged over the earlier ones, key by key.",
        "Changing an *operational* key re-runs nothing.",
        "",
        "| key | default | meaning |",
        "|---|---|---|",
    ]
    lines += [f"| `{path}` | {default} | {text} |" for path, default, text in _rows(schema(), "")]
    return "\n".join(lines) + "\n"


def _rows(node: dict[str, Any], prefix: str) -> Iterator[tuple[str, str, str]]:
    required = node.get("required", [])
    for key, child in node.get("properties", {}).items():
        path = f"{prefix}{key}"
        kind = "One of " + ", ".join(f"`{_word(v)}`" for v in child["enum"]) + ". " if "enum" in child else ""
        if "properties" not in child or child.get("description"):
            default = "required" if key in required and "default" not in child else f"`{_yaml(child.get('default'))}`"
            text = (kind + " ".join(str(child.get("description", "")).split())).replace("|", "\\|")
            yield path, default, text
        yield from _rows(child, f"{path}.")


def _word(value: Any) -> str:
    return "null" if value is None else str(value)


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip() if value != "" else '""'
