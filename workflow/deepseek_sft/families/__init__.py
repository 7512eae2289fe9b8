"""The family of a model, by its ``config.json``: chosen here and nowhere else.

Who needs names, shapes or counts of a family's tensors asks ``of(config)``; nobody else imports a family's module.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from ..errors import BadInputError, looked_for
from ..tensors.tensor_spec import TensorSpec
from . import config_file, deepseek_v3, rows

CONFIG = Path("config.json")


class Family(Protocol):
    """What a family's module offers; ``config`` is in the releases' names, checked.

    Attributes:
        ROUTER_WEIGHT: last part of the names of the routers' weights.
        CORRECTION_BIAS: last part of the names of the routers' untrained biases.
        POSITIVE_INTEGERS: keys of the sizes that shapes depend on.
    """

    ROUTER_WEIGHT: str
    CORRECTION_BIAS: str
    POSITIVE_INTEGERS: tuple[str, ...]

    def checked(self, published: dict[str, Any], path: Path) -> dict[str, Any]: ...
    def require_trainable(self, config: dict[str, Any], path: Path) -> None: ...
    def is_moe_layer(self, config: dict[str, Any], layer: int) -> bool: ...
    def largest_layer(self, config: dict[str, Any]) -> int: ...
    def tensor_specs(self, config: dict[str, Any]) -> dict[str, TensorSpec]: ...
    def mtp_layers(self, config: dict[str, Any], names: Any) -> int: ...
    def is_mtp(self, config: dict[str, Any], name: str) -> bool: ...
    def is_quantised(self, config: dict[str, Any], name: str) -> bool: ...


# (architectures, model_type) of a config.json → its family.
FAMILIES: dict[tuple[str, str], Family] = {(rows.ARCHITECTURE, name): deepseek_v3 for name in rows.model_types()}


def is_known(config: Mapping[str, Any]) -> bool:
    """Whether a row has the ``model_type`` of a ``config.json``, whatever class it names."""
    return any(config.get("model_type") == model_type for _, model_type in FAMILIES)


def of(config: Mapping[str, Any], path: Path = CONFIG) -> Family:
    """The family of a ``config.json``, as published or checked.

    Raises:
        BadInputError: no row has its class and model type.
    """
    classes, model_type = config.get("architectures"), config.get("model_type")
    for (architecture, name), family in FAMILIES.items():
        if classes == [architecture] and model_type == name:
            return family
    if why := rows.why_refused(config):
        known = ", ".join(family.name for family in rows.FAMILIES)
        raise BadInputError(f"{path}: model_type {model_type!r} is not trained: {why}", f"use a base of {known}")
    trained = ", ".join(f"{architecture} (model_type {name!r})" for architecture, name in FAMILIES)
    raise BadInputError(
        f"{path}: architectures {classes}, model_type {model_type!r}; this workflow trains {trained}",
        "use a base model of the DeepSeek-V3 architecture (V3, R1, V3.1, Moonlight, Kimi-K2, GigaChat3)",
    )


def checked(published: dict[str, Any], path: Path = CONFIG) -> dict[str, Any]:
    """A ``config.json`` in the releases' names, checked by its family; see ``config_file`` for the names it comes in.

    Raises:
        BadInputError: no family has it, a size missing or impossible, or what ``config_file`` refuses.
    """
    return of(published, path).checked(published, path)


def published_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a model folder as it lies there.

    Raises:
        BadInputError: no such folder or file, a git-lfs pointer, or not a JSON object.
    """
    path = folder / "config.json"
    if not folder.is_dir():
        raise BadInputError(
            f"model folder {folder} does not exist", f"give the folder that holds config.json ({looked_for(folder)})"
        )
    if not path.is_file():
        raise BadInputError(f"{folder} holds no config.json", "give a Hugging Face model folder")
    return config_file.read_json(path)


def read_config(folder: Path) -> dict[str, Any]:
    """Read and check ``config.json`` of a model folder.

    Raises:
        BadInputError: as ``published_config`` and ``checked`` say.
    """
    return checked(published_config(folder), folder / "config.json")


def read_trainable(folder: Path) -> dict[str, Any]:
    """As ``read_config``.

    Raises:
        BadInputError: also a model that can be converted, but not trained.
    """
    config, path = read_config(folder), folder / "config.json"
    of(config, path).require_trainable(config, path)
    return config
