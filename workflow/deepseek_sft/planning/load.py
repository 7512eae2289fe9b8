"""A plan from a resolved configuration, the profile's resources and, once counted, the tokens."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

from .. import families
from ..convert import tiny_model
from ..expert_shards import AUTO
from ..families import cut
from . import deployment, evaluation_time, expert_choice
from . import plan as planning
from .counting import Model, count
from .settings import Cluster, Samples, Training

SHAPES = Path(__file__).resolve().parents[3] / "resources/models"  # config.json of public models, sizes alone


def shapes() -> list[str]:
    """Names of the public models whose shapes come with the project."""
    return sorted(path.parent.name for path in SHAPES.glob("*/config.json"))


def model_of(config: dict[str, Any]) -> Model:
    """The model that will be trained: counted from the base's ``config.json``, or from the tiny model's sizes.

    As long as the base is not there, ``plan.model`` stands for it.

    Raises:
        BadInputError: no base folder, no ``config.json`` in it, or one of a model that is not trained here.
    """
    small, base, named = config["model"]["tiny"], config["model"]["base"], config["plan"].get("model")
    if small is None:
        there = base and Path(base, "config.json").is_file()
        folder = SHAPES / named if named and not there else Path(base)
        path = folder / "config.json"
        found = families.read_config(folder)
        if layers := config["model"].get("layers"):
            found = families.checked(cut.config_of(families.published_config(folder), layers, path), path)
        families.of(found, path).require_trainable(found, path)
        return count(found)
    shape = tiny_model.TinyShape(**{key: value for key, value in small.items() if key != "seed"})
    return count(tiny_model.config_of(shape))


def free_bytes(folder: str) -> int:
    """Free space of the file system that ``folder`` lies on or will be made on."""
    path = Path(folder).absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def from_config(
    config: dict[str, Any],
    resources: dict[str, Any],
    tokens: dict[str, Any] | None = None,
    node_mb: int | None = None,
    serve: deployment.Served | None = None,
    evaluate: evaluation_time.Evaluated | None = None,
) -> planning.Plan:
    """Plan an experiment.

    Args:
        config: the resolved configuration.
        resources: what the profile gives to ``train``: nodes, gpus_per_node, mem_mb, runtime, signal_lead_s.
        tokens: receipt of tokenize_data, or None for an estimate.
        node_mb: memory of a node as Slurm says it; None where it does not.
        serve: how the model is served; None plans no deployment.
        evaluate: on what it is then evaluated.

    Raises:
        BadInputError: what is missing to plan.
    """
    samples = Samples.counted(tokens) if tokens else Samples.estimated(config)
    cluster = Cluster.from_config(config, resources, free_bytes(config["results"]), node_mb)
    model, dtype = model_of(config), config["convert"]["dtype"]
    training = Training.from_config(config["train"], config["plan"], model.config).for_rows(samples)
    found = planning.make(model, training, samples, cluster, dtype)
    if config["train"].get("expert_parallel_size") == AUTO:
        found = expert_choice.choose(found, config["train"]["experts_per_shard"])
    if serve is None or cluster.gpu_bytes is None:
        return found
    served, base = (
        deployment.plan(model, serve, kind, cluster.gpu_bytes, cluster.ranks_per_node)
        for kind in (dtype, deployment.OF_BASE)
    )
    asked = evaluation_time.plan(model, cluster, samples, evaluate, served, base) if evaluate else ()
    return dataclasses.replace(found, deployment=served, evaluation=asked)
