"""A view of a base model with fewer layers: read and written like any other, no byte is copied to make it."""

import dataclasses
import re

from .. import families, files
from ..families import cut
from .base_model import BaseModel


def cut_base(base: BaseModel, layers: int) -> BaseModel:
    """The first layers of a base, renumbered where one moves; multi-token-prediction layers come after them.

    Raises:
        BadInputError: see ``model.cut.kept_layers``.
    """
    path = base.folder / "config.json"
    published = cut.config_of(base.published, layers, path)
    config = families.checked(published, path)
    family = families.of(config)
    total = base.config["num_hidden_layers"]
    places = {old: new for new, old in enumerate(cut.kept_layers(base.config, layers, path))}
    tensors = {}
    for name, tensor in base.tensors.items():
        match = re.match(r"model\.layers\.(\d+)\.", name)
        if match is None:
            tensors[name] = tensor
            continue
        old = int(match[1])
        new = places.get(old) if old < total else layers + old - total
        if new is not None:
            tensors[f"model.layers.{new}.{name[match.end() :]}"] = tensor
    return dataclasses.replace(
        base,
        config=config,
        published=published,
        tensors=tensors,
        expected=family.tensor_specs(config),
        mtp=[name for name in tensors if family.is_mtp(config, name)],
        fingerprint=f"model:{files.digest([base.fingerprint, layers], 64)}",
    )
